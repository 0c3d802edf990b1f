"""Estimates how many trials fit side by side in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from pairtune.config import TrialConfig
from pairtune.engine.policy import TRAIN_TOKENS
from pairtune.engine.products import linear_layers, matrix_of
from pairtune.engine.trial import TrialInputs, wants_checkpointing
from pairtune.models.load import blank_model, free_bytes

# Beyond this, more trials at once take memory and gain little: few saturate a CPU, more an accelerator.
_MOST = {"cpu": 4}
_MOST_ELSEWHERE = 8
# The rest is for temporary needs: writing a checkpoint, the logits of an evaluation, other programs.
_USABLE = 0.7
# A trained weight, its gradient and AdamW's two moments, all float32.
_BYTES_PER_WEIGHT = 16


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
    config, size = model.config, dtype.itemsize
    linear = [matrix_of(layer).shape for _, layer in linear_layers(model)]
    adapter = sum(trial.lora_rank * (before + after) for before, after in linear)
    # A layer keeps its input, q, k, v, the attention output and both norms (about 8 times the hidden size) and the
    # MLP's three products and their input (4 times the larger size); the backward pass needs half as much again.
    wide = max(after for _, after in linear)
    kept = config.hidden_size if wants_checkpointing(trial, device) else 12 * config.hidden_size + 6 * wide
    tokens = width * max(longest, min(TRAIN_TOKENS, trial.batch_size * longest))
    weights = sum(parameter.numel() for parameter in model.parameters()) * size
    return float(weights + width * adapter * _BYTES_PER_WEIGHT + tokens * config.num_hidden_layers * kept * size)
