"""Estimates how many trials fit side by side in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from pairtune.config import TrialConfig
from pairtune.cost import ModelShape, lockstep_memory
from pairtune.engine.products import linear_layers, matrix_of
from pairtune.engine.trial import TrialInputs, wants_checkpointing
from pairtune.models.load import blank_model, free_bytes

# Beyond this, more trials at once take memory and gain little: few saturate a CPU, more an accelerator.
_MOST = {"cpu": 4}
_MOST_ELSEWHERE = 8
# The rest is for temporary needs: writing a checkpoint, the logits of an evaluation, other programs.
_USABLE = 0.7


def lockstep_width(trial: TrialConfig, inputs: TrialInputs) -> int:
    """How many LoRA trials like this one fit in memory at once; at least 1."""
    device = inputs.base.device
    model, longest = blank_model(inputs.base.source), inputs.train.longest()
    most = range(1, _MOST_ELSEWHERE + 1)
    return widest([lockstep_bytes(model, trial, inputs.base.dtype, device, longest, width) for width in most], device)


def widest(needs: Sequence[float], device: torch.device) -> int:
    """How many trials fit side by side; at least 1.

    Args:
        needs: bytes that one, two, … trials take.
        device: the device that they run on.
    """
    usable = _USABLE * free_bytes(device)
    return max(1, sum(need <= usable for need in needs[: _MOST.get(device.type, _MOST_ELSEWHERE)]))


def lockstep_bytes(
    model: PreTrainedModel, trial: TrialConfig, dtype: torch.dtype, device: torch.device, longest: int, width: int
) -> float:
    """An estimate of the memory of trials side by side: weights, adapters, and activations kept for the backward pass.

    Args:
        model: a model like the base; its weights may be on the meta device.
        trial: any of the trials, for its adapter settings.
        dtype: dtype of the base weights.
        device: the device of the base weights.
        longest: tokens of the longest pair.
        width: number of trials.
    """
    checkpointing = wants_checkpointing(trial, device)
    parts = lockstep_memory(shape_of(model), trial, dtype.itemsize, longest, width, checkpointing=checkpointing)
    return sum(parts.values())


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The sizes of a model, whose weights may be on the meta device."""
    linear = [matrix_of(layer).shape for _, layer in linear_layers(model)]
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        widest=max(after for _, after in linear),
        adapter_weights=sum(before + after for before, after in linear),
        vocabulary=model.config.vocab_size,
    )
