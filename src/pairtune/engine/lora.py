"""LoRA adapters, K of them side by side over one frozen base (Hu et al. 2021, "LoRA", eq. 3).

Activations are [K, tokens, size]: the base's product is one over K * tokens rows, the adapters' are batched. With K = 1
this is plain LoRA; the numbers of each adapter do not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear

from pairtune.config import TrialConfig
from pairtune.errors import BadInput


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter looks like.

    Attributes:
        rank: of the two factors.
        alpha: the update is scaled by alpha / rank (rsLoRA: by alpha / sqrt(rank), Kalajdzievski 2023).
        dropout: share of the input that the adapter does not see in training.
        rslora: whether to scale by the square root.
        targets: last parts of the names of the layers that have adapters; None: all linear layers.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] | None = None

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def settings_of(trial: TrialConfig) -> LoraSettings:
    """The adapter that a trial asks for."""
    return LoraSettings(trial.lora_rank, trial.lora_alpha, trial.lora_dropout, trial.rslora, trial.lora_targets)


class LoraLinear(nn.Module):
    """A frozen linear layer with K adapters.

    Args:
        base: the frozen layer, weight [out, in].
        settings: of the adapters.
        trials: K.
    """

    def __init__(self, base: nn.Linear, settings: LoraSettings, trials: int) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale, self.dropout = settings.scale, settings.dropout
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.zeros(trials, settings.rank, base.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(trials, base.out_features, settings.rank, device=device))
        self.noise = 0  # what dropout is drawn from: the same in a layer that is computed twice, and in every trial

    def keep(self, trials: list[int]) -> None:
        """Drop all adapters but these."""
        self.lora_a = nn.Parameter(self.lora_a.detach()[trials])
        self.lora_b = nn.Parameter(self.lora_b.detach()[trials])

    def forward(self, x: Tensor) -> Tensor:
        """[K, tokens, in] to [K, tokens, out]; with one adapter the first dimension may be any."""
        shape, x = x.shape, x.reshape(len(self.lora_a), -1, self.in_features)
        if self.dropout and self.training:
            generator = torch.Generator(x.device).manual_seed(self.noise)
            kept = torch.rand(x.shape[1:], generator=generator, device=x.device) >= self.dropout
            seen = x * kept / (1 - self.dropout)
            update = seen @ self.lora_a.to(x.dtype).mT @ self.lora_b.to(x.dtype).mT
            result = linear(x, self.weight, self.bias) + self.scale * update
        else:
            result = _LoraLinear.apply(x, self.weight, self.bias, self.lora_a, self.lora_b, self.scale)
        return result.view(*shape[:-1], self.out_features)


class _LoraLinear(Function):
    """y = x W' + b + scale (x A') B', with a backward pass of its own: fewer copies than autograd's, nothing for W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        y = linear(x, weight, bias)
        inner = torch.bmm(x, a.mT)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, a, b, inner)
        return y.baddbmm_(inner, b.mT, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        (grad,) = grads
        x, weight, a, b, inner = ctx.saved_tensors
        grad_inner = torch.bmm(grad, b).mul_(ctx.scale)
        grad_a = torch.bmm(grad_inner.mT, x).float()
        grad_b = torch.bmm(inner.mT, grad).float().mul_(ctx.scale).mT  # this way round is twice as fast
        grad_x = (grad @ weight).baddbmm_(grad_inner, a) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_a, grad_b, None


def add_adapters(model: nn.Module, settings: LoraSettings, seeds: list[int]) -> dict[str, LoraLinear]:
    """Freeze a model and put adapters on its linear layers: on all but the output embedding, as PEFT's "all-linear"
    does, or on those that the settings name.

    A is drawn (see `draw_starts`), B is 0, so that each adapter starts exactly at the base.

    Args:
        model: of transformers; changed in place.
        settings: of the adapters.
        seeds: one per trial; a trial's A depends on its seed alone.

    Returns:
        The adapted layers by name.

    Raises:
        BadInput: a target is no linear layer of this model.
    """
    model.requires_grad_(False)
    head = model.get_output_embeddings()  # type: ignore[operator]
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    kinds = {name.rpartition(".")[2] for name, layer in layers if layer is not head}
    if unknown := set(settings.targets or ()) - kinds:
        raise BadInput(
            f"--lora-target {min(unknown)}: no linear layer of this model; it has {', '.join(sorted(kinds))}"
        )
    adapted = {}
    for name, layer in layers:
        if layer is head or name.rpartition(".")[2] not in (settings.targets or kinds):
            continue
        adapted[name] = LoraLinear(layer, settings, len(seeds))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapted[name])
    for trial, seed in enumerate(seeds):
        factors = [each.lora_a for each in adapted.values()]
        for factor, start in zip(factors, draw_starts([each[0] for each in factors], seed), strict=True):
            factor.data[trial] = start
    return adapted


def draw_starts(factors: Iterable[Tensor], seed: int) -> Iterator[Tensor]:
    """What the factors A, [rank, in] each, start as: drawn from U(-1/sqrt(in), 1/sqrt(in)), as in PEFT.

    The draw depends on the seed and on the shapes in their order alone, so every engine starts from the same adapters.
    """
    generator = torch.Generator().manual_seed(seed)
    for factor in factors:
        bound = 1 / math.sqrt(factor.shape[1])
        yield torch.empty(factor.shape).uniform_(-bound, bound, generator=generator)


def peft_tensors(adapted: Mapping[str, LoraLinear], trial: int) -> dict[str, Tensor]:
    """One trial's adapter under the names that PEFT gives it."""
    return {name: tensor.clone() for name, tensor in _named(adapted, trial)}


def peft_config(adapted: Mapping[str, LoraLinear], settings: LoraSettings) -> LoraConfig:
    """What PEFT needs to know to load an adapter of these layers."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=sorted({name.rpartition(".")[2] for name in adapted}),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def load_peft_tensors(adapted: Mapping[str, LoraLinear], trial: int, tensors: Mapping[str, Tensor]) -> None:
    """Set one trial's adapter from what `peft_tensors` or PEFT's own file holds.

    Raises:
        ValueError: a layer is missing or has another shape, or there is one more.
    """
    ours = dict(_named(adapted, trial))
    if ours.keys() != tensors.keys():
        raise ValueError(f"adapters of other layers: {sorted(ours.keys() ^ tensors.keys())[:4]}")
    for name, tensor in ours.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{name}: shape {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}")
        tensor.copy_(tensors[name])


def _named(adapted: Mapping[str, LoraLinear], trial: int) -> Iterator[tuple[str, Tensor]]:
    for name, layer in adapted.items():
        yield f"base_model.model.{name}.lora_A.weight", layer.lora_a.detach()[trial]
        yield f"base_model.model.{name}.lora_B.weight", layer.lora_b.detach()[trial]
