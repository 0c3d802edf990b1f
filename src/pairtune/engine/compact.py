"""Full fine-tuning in eight to ten bytes of optimizer and weights per number, instead of eighteen.

AdamW's moments take 8 bits each (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", through
bitsandbytes), and each weight exists once: what a float32 master has beyond its bfloat16 value is kept in 16 bits. The
weights are updated in float32, a few million at a time, so that no second copy of the model is ever in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from pairtune.config import TrialConfig
from pairtune.engine.optimize import LinearDecay

_BLOCK = 256  # numbers that share a scale; fixed by bitsandbytes
_SMALL = 4096  # smaller tensors (norms, biases) keep float32 moments, as in bitsandbytes
_AT_ONCE = 1 << 22  # numbers; a multiple of _BLOCK
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # AdamW's defaults, as in TRL


class CompactWeights:
    """All weights of a model, and what their float32 masters have beyond them.

    Args:
        model: the model, still with float32 weights, which are rounded in place to what `dtype` has.
        dtype: the dtype that it will compute in: bfloat16, or float32, where the weights are their own masters.
    """

    shapes: Sequence[torch.Size] | None = None

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.parameters = list(model.parameters())
        self.grads: list[Tensor | None] = [None] * len(self.parameters)
        self.rests: list[Tensor | None] = [
            None if dtype == torch.float32 else _round_in_place(each.detach()) for each in self.parameters
        ]

    def collect_gradients(self) -> None:
        """Take over a row's gradients; those of several rows are added up in float32."""
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                before = self.grads[index]
                self.grads[index] = parameter.grad if before is None else before.float().add_(parameter.grad)
                parameter.grad = None

    @property
    def summed(self) -> Sequence[Tensor]:
        """Nothing: with several processes this is refused."""
        return ()

    def forget_gradients(self) -> None:
        """Drop all gradients, those of a row that was cut off included."""
        self.grads = [None] * len(self.parameters)
        for parameter in self.parameters:
            parameter.grad = None

    def take_gradients(self) -> None:
        """Do nothing: they are taken over row by row."""

    def assign(self, trial: int) -> None:
        """Do nothing: full training has a single trial."""

    def updated(self) -> None:
        """Do nothing: the model's own weights are updated."""


@dataclass
class _Moments:
    """AdamW's moments of one tensor: codes, [numbers] of 8 bits, and scales, one for each block; or float32."""

    first: Tensor
    second: Tensor
    scales: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, weights: Tensor) -> _Moments:
        device, count = weights.device, weights.numel()
        if count < _SMALL:
            return cls(torch.zeros(count, device=device), torch.zeros(count, device=device))
        blocks = -(-count // _BLOCK)
        codes = [torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2)]
        return cls(codes[0], codes[1], (torch.zeros(blocks, device=device), torch.zeros(blocks, device=device)))

    def tensors(self) -> dict[str, Tensor]:
        scales = {} if self.scales is None else {"scale": self.scales[0], "scale_sq": self.scales[1]}
        return {"exp_avg": self.first, "exp_avg_sq": self.second, **scales}


class CompactOptimizer(LinearDecay):
    """AdamW with 8-bit moments, gradient clipping and linear decay.

    Args:
        trial: sets the learning rate and the norm to which gradients are clipped.
        weights: the model's weights.
        steps: number of steps over which the learning rate decays to 0.
    """

    def __init__(self, trial: TrialConfig, weights: CompactWeights, steps: int) -> None:
        super().__init__(trial, steps)
        self.compact = weights
        self._moments = [_Moments.of(each.detach()) for each in weights.parameters]
        self._clipping = 1.0

    def clip(self) -> float:
        """Measure the gradients' norm, by which `update` will scale them as `torch.nn.utils.clip_grad_norm_` does."""
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in self.compact.grads if grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(norms)).item() if norms else 0.0
        self._clipping = min(1.0, self.trial.max_grad_norm / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def update(self) -> None:
        """Update the weights and drop the gradients."""
        rate, number = self.learning_rate, self.step + 1
        weights = self.compact
        for parameter, rest, grad, moments in zip(
            weights.parameters, weights.rests, weights.grads, self._moments, strict=True
        ):
            if grad is not None:
                flat = parameter.data.view(-1)
                for start in range(0, len(flat), _AT_ONCE):
                    part = slice(start, min(start + _AT_ONCE, len(flat)))
                    left = None if rest is None else rest.view(-1)[part]
                    self._update_part(flat[part], left, grad.reshape(-1)[part], moments, part, rate, number)
        weights.forget_gradients()
        self.step += 1

    def _update_part(
        self,
        weights: Tensor,
        rest: Tensor | None,
        grad: Tensor,
        moments: _Moments,
        part: slice,
        rate: float,
        number: int,
    ) -> None:
        master = weights if rest is None else _joined(weights, rest)
        first, second = moments.first[part], moments.second[part]
        if moments.scales is None:
            grad = grad.float() * self._clipping
            first.lerp_(grad, 1 - _BETAS[0])
            second.lerp_(grad.square(), 1 - _BETAS[1])
            spread = (second / (1 - _BETAS[1] ** number)).sqrt_().add_(_EPSILON)
            master.addcdiv_(first, spread, value=-rate / (1 - _BETAS[0] ** number))
        else:
            from bitsandbytes.functional import optimizer_update_8bit_blockwise

            blocks = slice(part.start // _BLOCK, -(-part.stop // _BLOCK))
            optimizer_update_8bit_blockwise(
                "adam",
                grad.float(),
                master,
                first,
                second,
                beta1=_BETAS[0],
                beta2=_BETAS[1],
                beta3=0.0,  # of another optimizer, as alpha is
                alpha=0.0,
                eps=_EPSILON,
                step=number,
                lr=rate,
                qmap1=self._codes[0],
                qmap2=self._codes[1],
                absmax1=moments.scales[0][blocks],
                absmax2=moments.scales[1][blocks],
                gnorm_scale=self._clipping,
            )
        if rest is not None:
            _split(master, weights, rest)

    @cached_property
    def _codes(self) -> tuple[Tensor, Tensor]:
        """What the codes of both moments stand for, [256] each: 8-bit floats whose exponent's length varies."""
        from bitsandbytes.functional import create_dynamic_map

        device = self.compact.parameters[0].device
        return create_dynamic_map(signed=True).to(device), create_dynamic_map(signed=False).to(device)

    def state(self) -> dict[str, Tensor]:
        """Weights, what their masters have beyond them, and moments, by name."""
        found: dict[str, Tensor] = {}
        for index, (weights, rest, moments) in enumerate(
            zip(self.compact.parameters, self.compact.rests, self._moments, strict=True)
        ):
            named = {"weights": weights.data, **({} if rest is None else {"rest": rest}), **moments.tensors()}
            found |= {f"{index}.{name}": tensor for name, tensor in named.items()}
        return found

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors that `state` returned after a step."""
        self.step = step
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def _round_in_place(masters: Tensor) -> Tensor:
    """Round float32 numbers in place to those that bfloat16 has, and return what is lost, in units of the last bit."""
    flat = masters.view(-1)
    rest = torch.empty(len(flat), dtype=torch.int16, device=masters.device)
    for start in range(0, len(flat), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        rounded = torch.empty(len(flat[part]), dtype=torch.bfloat16, device=masters.device)
        _split(flat[part], rounded, rest[part])
        flat[part] = rounded
    return rest.view(masters.shape)


def _split(masters: Tensor, rounded: Tensor, rest: Tensor) -> None:
    """Write float32 numbers as bfloat16, as a cast does, and what is lost, in 16 bits.

    A cast breaks ties to even numbers, so that half a step could be lost in either direction, which is one value more
    than 16 bits have. A master that a tie would round down is therefore lowered by the last of its 24 bits first.
    """
    bits = masters.contiguous().view(torch.int32)
    bits = bits - ((bits & 0x1FFFF) == 0x8000).to(torch.int32)
    high = (bits + 0x8000) >> 16
    rounded.copy_(high.to(torch.int16).view(torch.bfloat16))
    rest.copy_(bits - (high << 16))


def _joined(rounded: Tensor, rest: Tensor) -> Tensor:
    """The float32 numbers that `_split` wrote."""
    bits = (rounded.contiguous().view(torch.int16).to(torch.int32) << 16) + rest
    return bits.view(torch.float32)
