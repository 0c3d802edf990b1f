"""K LoRA adapters side by side on one frozen base model (Hu et al. 2021, "LoRA", eq. 3).

Activations are [K, tokens, size]: the base model's product is a single one over K * tokens rows, the adapters' products
are batched. With K = 1 this is plain LoRA; each adapter's results do not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pairtune.config import TrialConfig
from pairtune.engine.linears import Linear, plain_linear, project
from pairtune.engine.products import Products, linear_layers, matrix_of
from pairtune.errors import BadInput, one_line

if TYPE_CHECKING:
    from peft import LoraConfig

# The settings that an adapter made elsewhere must have for the engine's kernels to run it.
_PLAIN_LORA: dict[str, Any] = {
    "layers_to_transform": None,
    "lora_bias": False,
    "trainable_token_indices": None,
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
}


@dataclass(frozen=True)
class LoraSettings:
    """The hyperparameters of an adapter.

    Attributes:
        rank: rank of the two factors.
        alpha: the update is scaled by alpha / rank (rsLoRA: by alpha / sqrt(rank), Kalajdzievski 2023).
        dropout: dropout probability on the adapter's input in training.
        rslora: whether to scale by the square root of the rank.
        targets: last parts of the names of the adapted layers; None: all linear layers.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] | None = None

    @property
    def scale(self) -> float:
        """Scaling factor of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def settings_of(trial: TrialConfig) -> LoraSettings:
    """The adapter settings of a trial."""
    return LoraSettings(trial.lora_rank, trial.lora_alpha, trial.lora_dropout, trial.rslora, trial.lora_targets)


def settings_of_adapter(folder: Path) -> LoraSettings:
    """The LoRA settings of a saved adapter, which may have been made elsewhere.

    Raises:
        BadInput: the engine's kernels cannot run it.
    """
    from peft import PeftConfig

    try:
        settings: Any = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{folder}: the adapter's settings cannot be read ({one_line(error)})") from error
    beyond = [name for name, plain in _PLAIN_LORA.items() if (getattr(settings, name, plain) or plain) != plain]
    if str(settings.peft_type) not in ("LORA", "PeftType.LORA") or beyond:
        what = ", ".join(beyond) or settings.peft_type
        raise BadInput(
            f"{folder}: is not a plain LoRA adapter ({what}); merge it into its base (peft's merge_and_unload), and "
            "give the merged model"
        )
    targets = settings.target_modules
    if not targets or (isinstance(targets, str) and targets != "all-linear"):
        raise BadInput(
            f"{folder}: target_modules is {targets!r}; merge it into its base (peft's merge_and_unload), and give the "
            "merged model"
        )
    return LoraSettings(
        settings.r,
        settings.lora_alpha,
        rslora=settings.use_rslora,
        targets=None if isinstance(targets, str) else tuple(sorted(targets)),
    )


class LoraLinear(nn.Module):
    """A frozen linear layer with K adapters.

    Args:
        base: the frozen layer, weight [out, in], or [in, out] for a Conv1D (GPT-2).
        settings: the adapters' settings.
        trials: K.
    """

    def __init__(self, base: nn.Linear | Conv1D, settings: LoraSettings, trials: int) -> None:
        super().__init__()
        self.base = base
        self.stored_as_matrix = isinstance(base, Conv1D)
        self.in_features, self.out_features = matrix_of(base).shape
        self.scale, self.dropout = settings.scale, settings.dropout
        device = plain_linear(base).weights.stored.device
        self.lora_a = nn.Parameter(torch.zeros(trials, settings.rank, self.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(trials, self.out_features, settings.rank, device=device))
        self.products = Products()
        # For each pair a dropout seed and the pair's number of tokens. The mask is therefore the same when a layer is
        # recomputed, in every trial, and whatever other pairs are in the row.
        self.noise: Sequence[tuple[int, int]] = ()
        # Where all adapters lie in one tensor, the factors as views of it in the dtype of the row being computed.
        self.spread: tuple[Tensor, Tensor] | None = None

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of all adapters, [K, rank, in] and [K, out, rank]."""
        return self.lora_a, self.lora_b

    def keep(self, trials: list[int]) -> None:
        """Drop all adapters but these."""
        self.spread = None
        self.lora_a = nn.Parameter(self.lora_a.detach()[trials])
        self.lora_b = nn.Parameter(self.lora_b.detach()[trials])

    def forward(self, x: Tensor) -> Tensor:
        """[K, tokens, in] to [K, tokens, out]; with one adapter the first dimension may have any size."""
        shape, x = x.shape, x.reshape(len(self.lora_a), -1, self.in_features)
        return project(x, [self.linear()], self.products)[0].view(*shape[:-1], self.out_features)

    def linear(self, only: Tensor | None = None) -> Linear:
        """The layer as the kernels see it, for all tokens of a row or only for those at some positions."""
        mask = self._mask() if self.dropout and self.training else None
        if mask is not None and only is not None:
            mask = mask[only]
        a, b = self.spread or self.factors
        return Linear(plain_linear(self.base).weights._replace(a=a, b=b, mask=mask), self.scale)

    def _mask(self) -> Tensor:
        """Dropout mask of the adapters' input, [tokens, in]: 0, or 1 / (1 - dropout) where the input is kept."""
        base = plain_linear(self.base).weights
        device, dtype = base.stored.device, (base.stored if base.scales is None else base.scales).dtype
        drawn = [
            torch.rand(tokens, self.in_features, generator=torch.Generator(device).manual_seed(seed), device=device)
            for seed, tokens in self.noise
        ]
        return (torch.cat(drawn) >= self.dropout).to(dtype) / (1 - self.dropout)


class FlatAdapters:
    """All factors of all trials' adapters in one tensor, [trials, numbers].

    On an accelerator, hundreds of small tensors take longer to reach than to convert, to add up and to update. The
    layers' own stacks become views of this one.

    Attributes:
        values: the factors, float32; the leaf that gradients are taken of.
        grads: its gradients, which are added in place.
        shapes: the shapes of one trial's factors, in their order.
    """

    def __init__(self, adapted: Mapping[str, LoraLinear]) -> None:
        self._layers = list(adapted.values())
        self.gather()

    def gather(self) -> None:
        """Move the layers' stacks into a new tensor: at the start, and after trials were dropped."""
        stacks = [stack for layer in self._layers for stack in layer.factors]
        self.shapes = [stack.shape[1:] for stack in stacks]
        values = torch.cat([stack.detach().flatten(1) for stack in stacks], 1)
        self.grads = torch.zeros_like(values)
        for stack, own, grads in zip(stacks, self._split(values), self._split(self.grads), strict=True):
            stack.data, stack.grad = own, grads
        self.values = values.requires_grad_()
        self.values.grad = self.grads

    def spread(self, dtype: torch.dtype) -> None:
        """Give the layers their factors for the next row, in its dtype."""
        parts = iter(self._split(self.values.to(dtype)))
        for layer in self._layers:
            layer.spread = (next(parts), next(parts))

    def _split(self, values: Tensor) -> list[Tensor]:
        """All stacks, [trials, ...] each, as views."""
        parts = values.split([shape.numel() for shape in self.shapes], 1)
        return [part.view(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]


def add_adapters(model: nn.Module, settings: LoraSettings, seeds: list[int]) -> dict[str, LoraLinear]:
    """Freeze a model and add adapters to its linear layers: to all but the output embedding, as PEFT's "all-linear"
    does, or to those that the settings name.

    A is random (see `draw_starts`) and B is 0, so that each adapter starts exactly at the base model.

    Args:
        model: a transformers model; changed in place.
        settings: the adapters' settings.
        seeds: one per trial; a trial's A depends only on its seed.

    Returns:
        The adapted layers by name.

    Raises:
        BadInput: a target is not a linear layer of this model.
    """
    model.requires_grad_(False)
    kinds = check_targets(model, settings.targets or ())
    adapted = {}
    for name, layer in list(linear_layers(model)):
        if name.rpartition(".")[2] not in (settings.targets or kinds):
            continue
        adapted[name] = LoraLinear(layer, settings, len(seeds))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapted[name])
    for trial, seed in enumerate(seeds):
        factors = [each.lora_a for each in adapted.values()]
        for factor, start in zip(factors, draw_starts([each[0] for each in factors], seed), strict=True):
            factor.data[trial] = start
    return adapted


def check_targets(model: nn.Module, targets: Iterable[str]) -> set[str]:
    """Make sure that adapters can be added to some layers; returns the names of those that a model has.

    Raises:
        BadInput: a target is not a linear layer of this model.
    """
    kinds = {name.rpartition(".")[2] for name, _ in linear_layers(model)}
    if not kinds:
        raise BadInput(
            f"--method lora: {type(model).__name__} has no plain linear layers that could get adapters; "
            "use --method full"
        )
    if unknown := set(targets) - kinds:
        raise BadInput(
            f"--lora-target {min(unknown)}: not a linear layer of this model; use some of {', '.join(sorted(kinds))}"
        )
    return kinds


def draw_starts(factors: Iterable[Tensor], seed: int) -> Iterator[Tensor]:
    """Initial values of the factors A, [rank, in] each, drawn from U(-1/sqrt(in), 1/sqrt(in)) as in PEFT.

    They depend only on the seed and on the shapes in order, so every engine starts from the same adapters.
    """
    generator = torch.Generator().manual_seed(seed)
    for factor in factors:
        bound = 1 / math.sqrt(factor.shape[1])
        yield torch.empty(factor.shape).uniform_(-bound, bound, generator=generator)


def peft_tensors(adapted: Mapping[str, LoraLinear], trial: int) -> dict[str, Tensor]:
    """One trial's adapter under PEFT's parameter names."""
    return {name: tensor.clone() for name, tensor in _named(adapted, trial)}


def peft_config(adapted: Mapping[str, LoraLinear], settings: LoraSettings) -> LoraConfig:
    """The PEFT configuration for loading an adapter of these layers."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=sorted({name.rpartition(".")[2] for name in adapted}),
        fan_in_fan_out=any(layer.stored_as_matrix for layer in adapted.values()),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def load_peft_tensors(adapted: Mapping[str, LoraLinear], trial: int, tensors: Mapping[str, Tensor]) -> None:
    """Set one trial's adapter from the tensors of `peft_tensors` or of a PEFT adapter file.

    Raises:
        ValueError: a layer is missing, has another shape, or is unknown.
    """
    ours = dict(_named(adapted, trial))
    if ours.keys() != tensors.keys():
        raise ValueError(f"adapter layers and model layers differ: {sorted(ours.keys() ^ tensors.keys())[:4]}")
    for name, tensor in ours.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{name}: shape {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}")
        tensor.copy_(tensors[name])


def load_adapter(adapted: Mapping[str, LoraLinear], folder: Path) -> None:
    """Set every trial's adapter from a saved adapter.

    Raises:
        ValueError: as `load_peft_tensors`.
        OSError, SafetensorError: the file cannot be read.
    """
    tensors = load_file(folder / "adapter_model.safetensors")
    for trial in range(len(next(iter(adapted.values())).lora_a)):
        load_peft_tensors(adapted, trial, tensors)


def _named(adapted: Mapping[str, LoraLinear], trial: int) -> Iterator[tuple[str, Tensor]]:
    for name, layer in adapted.items():
        yield f"base_model.model.{name}.lora_A.weight", layer.lora_a.detach()[trial]
        yield f"base_model.model.{name}.lora_B.weight", layer.lora_b.detach()[trial]
