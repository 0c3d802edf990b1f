"""Multi-LoRA serving: many adapters over one base model in one forward pass, chosen per token (after Chen et al. 2023,
"Punica", and Sheng et al. 2023, "S-LoRA").

The factors of all adapters are concatenated along the rank. In a token's row of `x A'`, the entries of all adapters but
its own are multiplied by 0, so one product with all of A and one with all of B serve the whole batch. Ranks are small
compared with a layer's sizes, so this extra work costs less than splitting the batch by adapter.
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
        factors: A, [rank, in], and scaled B, [out, rank], by the layer's name in the model.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]


def read_adapter(folder: Path, dtype: torch.dtype, device: torch.device) -> Adapter:
    """Read an adapter in PEFT's format.

    Raises:
        NotBatchable: the adapter is more than plain LoRA.
        BadInput: the adapter cannot be read.
    """
    try:
        settings = json.loads((folder / ADAPTER_SETTINGS).read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(f"{folder}: the adapter cannot be loaded ({one_line(error)})") from error
    plain = all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    if not plain or settings.get("use_dora") or settings.get("peft_type", "LORA") != "LORA":
        raise NotBatchable(
            f"{folder}: more than plain LoRA (DoRA, biases, whole layers); merge it and serve the merged model"
        )
    factors = {}
    partners = {name.replace(".lora_A.", ".lora_B.") for name in tensors if ".lora_A." in name}
    if partners != {name for name in tensors if ".lora_B." in name} or "lora_alpha" not in settings:
        raise BadInput(f"{folder}: the adapter is incomplete; copy or download it again")
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
    # PEFT reads the pattern's keys as regular expressions.
    patterns = settings.get(pattern) or {}
    own = {key: value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)}
    value: float = next(iter(own.values()), settings[name])
    return value


class ServedLinear(nn.Module):
    """A frozen linear layer with all adapters on it.

    Args:
        base: the frozen layer, weight [out, in]; it may be packed in 4 bits.
        stack: knows which adapter each token of the batch uses.
    """

    def __init__(self, base: nn.Linear, stack: AdapterStack) -> None:
        super().__init__()
        self.base, self.stack = base, stack
        empty = next(base.parameters()).new_zeros(0)
        self.a, self.b = empty.view(0, base.in_features), empty.view(base.out_features, 0)
        self.owners: list[int] = []  # the adapter's index for each column

    def forward(self, x: Tensor) -> Tensor:
        """Map [1, tokens, in] to [1, tokens, out]."""
        y: Tensor = self.base(x)
        if self.owners and self.stack.tokens is not None:
            inner = linear(x[0], self.a) * self.stack.mask(self)
            y[0].addmm_(inner, self.b.mT)
        return y


class AdapterStack:
    """The adapters of one model, concatenated along the rank.

    Args:
        model: a transformers model; its linear layers, except the output embedding, are replaced in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tokens: Tensor | None = None  # each token's adapter index, -1: base; None: base for all
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._adapters: dict[str, Adapter] = {}
        self._layers: dict[str, ServedLinear] = {}
        head = model.get_output_embeddings()  # type: ignore[operator]
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and layer is not head:
                self._layers[name] = ServedLinear(layer, self)
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, self._layers[name])

    def set(self, adapters: Mapping[str, Adapter]) -> None:
        """Replace all adapters.

        Raises:
            BadInput: one of them was made for another model; nothing is changed.
        """
        for adapter in adapters.values():
            if unknown := adapter.factors.keys() - self._layers.keys():
                raise BadInput(f"the adapter has a layer that the base model does not have: {min(unknown)}")
            for name, (a, b) in adapter.factors.items():
                base = self._layers[name].base
                if (b.shape[0], a.shape[1], len(a)) != (base.out_features, base.in_features, b.shape[1]):
                    raise BadInput(f"the adapter was made for another base model: {name} has another shape")
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
        """The adapters by the keys that they were set with."""
        return dict(self._adapters)

    def assign(self, keys: list[str | None], device: torch.device) -> None:
        """Set each token's adapter for the next batch; None: the base model."""
        indices = {key: index for index, key in enumerate(self._adapters)}
        self._masks = {}
        self.tokens = None
        if any(key is not None for key in keys):
            self.tokens = torch.tensor([-1 if key is None else indices[key] for key in keys], device=device)

    def mask(self, layer: ServedLinear) -> Tensor:
        """1 where the column belongs to the token's adapter, else 0: [tokens, ranks of all adapters]."""
        assert self.tokens is not None  # noqa: S101 - called only when a token has an adapter
        owners = tuple(layer.owners)
        if owners not in self._masks:  # nearly always the same in every layer
            columns = torch.tensor(owners, device=self.tokens.device)
            self._masks[owners] = (self.tokens[:, None] == columns).to(layer.a.dtype)
        return self._masks[owners]
