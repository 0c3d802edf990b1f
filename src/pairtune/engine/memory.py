"""How many trials fit side by side in memory, and the sizes of a model that this depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from pairtune.config import RunConfig, TrialConfig
from pairtune.engine.layers import known_layers
from pairtune.engine.policy import PACKED_FAMILIES
from pairtune.engine.products import linear_layers, matrix_of
from pairtune.engine.trial import TrialInputs
from pairtune.footprint import (
    ACCELERATOR_TRIALS,
    MOST_TRIALS,
    USABLE,
    Fit,
    ModelShape,
    PairLengths,
    fit,
    training_memory,
    usable,
)
from pairtune.models.load import LoadedBase, blank_model, free_bytes
from pairtune.models.nf4 import Nf4Linear, named_weights, roundable


def lockstep_width(trial: TrialConfig, inputs: TrialInputs) -> int:
    """How many LoRA trials like this one fit in memory at once; at least 1."""
    device = inputs.base.device
    model, longest = blank_model(inputs.base.source), inputs.train.longest()
    most = range(1, ACCELERATOR_TRIALS + 1)
    return widest([lockstep_bytes(model, trial, inputs.base.dtype, device, longest, width) for width in most], device)


def widest(needs: Sequence[float], device: torch.device) -> int:
    """How many trials fit side by side; at least 1.

    Args:
        needs: bytes that one, two, … trials take.
        device: the device that they run on.
    """
    limit = USABLE * free_bytes(device)
    most = MOST_TRIALS if device.type == "cpu" else ACCELERATOR_TRIALS
    return max(1, sum(need <= limit for need in needs[:most]))


def lockstep_bytes(
    model: PreTrainedModel, trial: TrialConfig, dtype: torch.dtype, device: torch.device, longest: int, width: int
) -> float:
    """The memory of trials side by side, this program's own aside.

    Args:
        model: a model like the base; its weights may be on the meta device.
        trial: any of the trials, for its adapter settings.
        dtype: dtype of the base weights.
        device: the device of the base weights.
        longest: tokens of the longest pair.
        width: number of trials.
    """
    shape = shape_of(model, device)
    parts = training_memory(
        shape,
        trial,
        dtype.itemsize,
        PairLengths.full(longest),
        width=width,
        row_tokens=trial.row_tokens or shape.rows[0],
        checkpointing=trial.checkpointing == "on",
    )
    return sum(parts.values())


def fit_run(config: RunConfig, base: LoadedBase, lengths: PairLengths, processes: int = 1) -> Fit:
    """How a run fits into the memory that it may take; see `footprint.fit`.

    Args:
        config: its settings.
        base: its base model, in the dtype that this machine is fastest with.
        lengths: what its training pairs are like.
        processes: the number of processes that share its work.
    """
    dtype = str(base.dtype).removeprefix("torch.")
    limit = usable(config, free_bytes(base.device))
    return fit(config, lengths, shape_of(blank_model(base.source), base.device, processes), dtype, limit)


def shape_of(model: PreTrainedModel, device: torch.device, processes: int = 1) -> ModelShape:
    """The sizes of a model, whose weights may be on the meta device, for computing it on a device in some processes."""
    config: Any = model.config
    layers = [layer for _, layer in linear_layers(model)]
    linear = [matrix_of(layer).shape for layer in layers]
    four_bit = sum(2 * layer.packed.numel() for layer in layers if isinstance(layer, Nf4Linear))
    heads = int(getattr(config, "num_attention_heads", None) or 1)  # a state-space model has none
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    return ModelShape(
        parameters=sum(weights.numel() for _, weights in named_weights(model)),
        four_bit=four_bit,
        linear=four_bit + sum(layer.weight.numel() for _, layer in roundable(model)),
        in_layers=sum(each.numel() for each in {weights for block in blocks for weights in block.parameters()}),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=max(before for before, _ in linear),
        heads=heads,
        queries=heads * size,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * size,
        adapter_weights=sum(before + after for before, after in linear),
        vocabulary=config.vocab_size,
        packed=config.model_type in PACKED_FAMILIES,
        fused=bool(known_layers(model)),
        accelerator=device.type != "cpu",
        processes=processes,
    )
