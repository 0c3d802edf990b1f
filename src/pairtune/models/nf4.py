"""Base models whose linear layers are stored in 4 bits (NF4: Dettmers et al. 2023, "QLoRA", section 3 and appendix E).

`--model NAME@nf4` rounds a model once: each weight of its linear layers becomes one of 16 values times a scale that 64
weights share. The rounded model is an ordinary one, kept in the cache, and it is the base that adapters are trained on,
evaluated with and merged into. Where memory matters, its layers are stored packed, in about a seventh of the memory
of float32, and unpacked one at a time: to the same bits, so packing changes no result.

Unlike in bitsandbytes, the 16 values and the scales are rounded to bfloat16. Their products, rounded to bfloat16 once,
are then the same on every machine, and packing a rounded model again finds the same 4 bits.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

# Weights that share a scale.
BLOCK = 64

# The quantiles of a normal distribution that QLoRA's appendix E lists, scaled to [-1, 1], with an exact zero.
_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_CODES = torch.tensor(_VALUES, dtype=torch.bfloat16)
_BETWEEN = (_CODES[1:].float() + _CODES[:-1].float()) / 2
# Both values of a byte, the upper four bits first, as one number: numbers are looked up three times as fast as pairs.
_OF_BYTE = torch.stack([_CODES.repeat_interleave(16), _CODES.repeat(16)], 1).view(torch.int32).view(256)
# Weights that are packed or unpacked at once, so that what is computed between takes little memory.
_AT_ONCE = 1 << 24


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to NF4.

    Args:
        weight: any shape with n numbers, n a multiple of `BLOCK`.

    Returns:
        Two weights per byte, [n / 2], uint8, and the scales, [n / BLOCK], bfloat16.
    """
    parts = [_pack(part) for part in weight.reshape(-1).split(_AT_ONCE)]
    return torch.cat([packed for packed, _ in parts]), torch.cat([scales for _, scales in parts])


def _pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    blocks = weight.view(-1, BLOCK).float()
    scales = blocks.abs().amax(1).bfloat16()
    divisors = scales.float().masked_fill(scales == 0, 1.0)  # a block of zeros stays one
    codes = torch.bucketize(blocks / divisors[:, None], _BETWEEN.to(weight.device), out_int32=True)
    upper, lower = codes.view(-1, 2).unbind(1)
    return (upper * 16 + lower).to(torch.uint8), scales


@cache
def _table(device: torch.device) -> Tensor:
    """`_OF_BYTE` on a device; kept there, since nothing can be copied to one while a CUDA graph is recorded."""
    return _OF_BYTE.to(device)


def unpack(packed: Tensor, scales: Tensor) -> Tensor:
    """The weights that were rounded, [n], in the dtype of the scales.

    Args:
        packed: see `pack`.
        scales: see `pack`; they may have been cast to a wider dtype.
    """
    found = scales.new_empty(2 * len(packed))
    table = _table(packed.device)
    of_scales = _AT_ONCE // BLOCK
    for part, own, out in zip(packed.split(_AT_ONCE // 2), scales.split(of_scales), found.split(_AT_ONCE), strict=True):
        values = table.index_select(0, part.int()).view(torch.bfloat16).view(-1, BLOCK)
        out.copy_(values.mul_(own.to(torch.bfloat16)[:, None]).view(-1))
    return found


class Nf4Linear(nn.Linear):
    """A frozen linear layer whose weight is stored packed, and unpacked whenever it is read.

    Args:
        base: the layer, with a weight [out, in] of a multiple of `BLOCK` numbers; its scales are kept in its dtype.
    """

    packed: Tensor

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias
        packed, scales = pack(base.weight.detach())
        self.register_buffer("packed", packed)
        self.scales = nn.Parameter(scales.to(base.weight.dtype), requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, [out, in]: a new tensor, so changing it does not change the layer."""
        return unpack(self.packed, self.scales).view(self.out_features, self.in_features)


def round_linears(model: nn.Module) -> int:
    """Round the weights of a model's linear layers in place; returns the number of layers."""
    layers = list(roundable(model))
    for _, layer in layers:
        rounded = unpack(*pack(layer.weight.detach()))
        layer.weight.data = rounded.view_as(layer.weight).to(layer.weight.dtype)
    return len(layers)


def pack_linears(model: nn.Module) -> None:
    """Replace the linear layers of a rounded model by packed ones."""
    for name, layer in list(roundable(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Nf4Linear(layer))


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters by name, in the order of the names; those of packed layers unpacked, one at a time."""
    packed = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, Nf4Linear)}
    stored = {f"{name.removesuffix('weight')}scales" for name in packed}
    plain = {name: tensor for name, tensor in model.named_parameters() if name not in stored}
    for name in sorted(plain.keys() | packed.keys()):
        yield name, plain[name] if name in plain else packed[name].weight


def roundable(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that are rounded: all but the output embedding, and those that blocks do not divide."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head and module.weight.numel() % BLOCK == 0:
            yield name, module
