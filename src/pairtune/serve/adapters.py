"""Many LoRA adapters over one base in one pass, a different one for every token (after Chen et al. 2023, "Punica", and
Sheng et al. 2023, "S-LoRA").

The factors of all adapters stand side by side along the rank. What a token's row of `x A'` holds for other adapters
than its own is multiplied by 0, so one product with all of A and one with all of B serve the whole batch. Ranks are
small beside a layer's sizes, so the work for other adapters costs less than taking the batch apart.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

from pairtune.errors import BadInput, one_line
from pairtune.models.resolve import ADAPTER_SETTINGS
from pairtune.serve.request import NotBatchable


@dataclass(frozen=True)
class Adapter:
    """One adapter in memory.

    Attributes:
        factors: A, [rank, in], and B, [out, rank], scaled, by the layer's name in the model.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]


def read_adapter(folder: Path, dtype: torch.dtype, device: torch.device) -> Adapter:
    """An adapter in PEFT's format.

    Raises:
        BadInput: it is more than plain LoRA, or cannot be read.
    """
    try:
        settings = json.loads((folder / ADAPTER_SETTINGS).read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(f"{folder}: the adapter cannot be loaded ({one_line(error)})") from error
    plain = all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    if not plain or settings.get("use_dora") or settings.get("peft_type", "LORA") != "LORA":
        raise NotBatchable(f"{folder}: is more than plain LoRA (DoRA, biases, whole layers); merge it, and serve that")
    factors = {}
    partners = {name.replace(".lora_A.", ".lora_B.") for name in tensors if ".lora_A." in name}
    if partners != {name for name in tensors if ".lora_B." in name} or "lora_alpha" not in settings:
        raise BadInput(f"{folder}: the adapter is incomplete")
    for name in tensors:
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if name.endswith(".lora_A.weight"):
            a, b = tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]
            scale = _setting(settings, "lora_alpha", "alpha_pattern", layer) / (
                math.sqrt(len(a)) if settings.get("use_rslora") else len(a)
            )
            factors[layer] = (a.to(device, dtype), (b.float() * scale).to(device, dtype))
    return Adapter(factors)


def _setting(settings: Mapping[str, Any], name: str, pattern: str, layer: str) -> float:
    # The pattern's keys are regular expressions, as PEFT reads them.
    patterns = settings.get(pattern) or {}
    own = {key: value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)}
    value: float = next(iter(own.values()), settings[name])
    return value


class ServedLinear(nn.Module):
    """A frozen linear layer under all adapters.

    Args:
        base: the frozen layer, weight [out, in].
        stack: which knows the adapter of every token of the batch.
    """

    def __init__(self, base: nn.Linear, stack: AdapterStack) -> None:
        super().__init__()
        self.weight, self.bias, self.stack = base.weight, base.bias, stack
        self.a = base.weight.new_zeros(0, base.in_features)
        self.b = base.weight.new_zeros(base.out_features, 0)
        self.owners: list[int] = []  # of the columns: the adapter's index

    def forward(self, x: Tensor) -> Tensor:
        """[1, tokens, in] to [1, tokens, out]."""
        y = linear(x, self.weight, self.bias)
        if self.owners and self.stack.tokens is not None:
            inner = linear(x[0], self.a) * self.stack.mask(self)
            y[0].addmm_(inner, self.b.mT)
        return y


class AdapterStack:
    """The adapters of one model, side by side.

    Args:
        model: of transformers; its linear layers are replaced in place, the output embedding aside.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tokens: Tensor | None = None  # index of each token's adapter, -1: the base; None: all the base
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._adapters: dict[str, Adapter] = {}
        self._layers: dict[str, ServedLinear] = {}
        head = model.get_output_embeddings()  # type: ignore[operator]
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and layer is not head:
                self._layers[name] = ServedLinear(layer, self)
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, self._layers[name])

    def __contains__(self, key: str) -> bool:
        return key in self._adapters

    def set(self, adapters: Mapping[str, Adapter]) -> None:
        """Replace all adapters.

        Raises:
            BadInput: one of them does not belong to this model; nothing is changed.
        """
        for adapter in adapters.values():
            if unknown := adapter.factors.keys() - self._layers.keys():
                raise BadInput(f"the adapter has a layer that the base has not: {min(unknown)}")
            for name, (a, b) in adapter.factors.items():
                if (b.shape[0], a.shape[1]) != self._layers[name].weight.shape or a.shape[0] != b.shape[1]:
                    raise BadInput(f"the adapter was made for another base: {name} has another shape")
        self._adapters = dict(adapters)
        for name, layer in self._layers.items():
            owned = [
                (index, each.factors[name]) for index, each in enumerate(adapters.values()) if name in each.factors
            ]
            layer.owners = [index for index, (a, _) in owned for _ in range(len(a))]
            if owned:
                layer.a = torch.cat([a for _, (a, _) in owned])
                layer.b = torch.cat([b for _, (_, b) in owned], dim=1)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """By the keys under which they were set."""
        return dict(self._adapters)

    def assign(self, keys: list[str | None], device: torch.device) -> None:
        """Say which adapter every token of the coming batch has; None: the base alone."""
        indices = {key: index for index, key in enumerate(self._adapters)}
        self._masks = {}
        self.tokens = None
        if any(key is not None for key in keys):
            self.tokens = torch.tensor([-1 if key is None else indices[key] for key in keys], device=device)

    def mask(self, layer: ServedLinear) -> Tensor:
        """1 where a token's adapter has the column, else 0: [tokens, ranks of all adapters]."""
        assert self.tokens is not None  # noqa: S101 - asked for only where somebody has an adapter
        owners = tuple(layer.owners)
        if owners not in self._masks:  # nearly always the same for every layer
            columns = torch.tensor(owners, device=self.tokens.device)
            self._masks[owners] = (self.tokens[:, None] == columns).to(layer.a.dtype)
        return self._masks[owners]
