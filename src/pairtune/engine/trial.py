"""What every engine shares: a trial's inputs, its pristine start, and the guards on its first step."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pairtune.config import Select, TrialConfig
from pairtune.data.table import PairTable
from pairtune.errors import RunFailed
from pairtune.models.load import LoadedBase, load_model

LN_2 = math.log(2)

# One line of metrics.jsonl: `step`, `epoch`, then metric names.
Log = Callable[[dict[str, Any]], None]

# What a trial does besides its steps, how many pairs are done, and how many there are.
Busy = Callable[[str, int, int], None]


def not_shown(what: str, done: int, total: int) -> None:
    """A `Busy` that nobody watches."""


@dataclass(frozen=True)
class TrialInputs:
    """What all trials of a run share.

    Attributes:
        base: the base model; each trial loads its weights anew. Under LoRA `base.dtype` is that of the base weights,
            with `--method full` that of the matrix products.
        base_fingerprint: of the base weights; a trial that starts from others is stopped.
        select: the rule by which a trial's best epoch is kept.
        reference: log-probs of the base model by split, filled by the first trial and read by all others: they depend
            on model and pairs alone, which are the same for the whole grid.
        reference_folder: where the run keeps them; None: nowhere.
    """

    base: LoadedBase
    base_fingerprint: str
    train: PairTable
    validation: PairTable
    select: Select
    reference: dict[str, Any] = field(default_factory=dict)
    reference_folder: Path | None = None


def load_start(trial: TrialConfig, base: LoadedBase) -> PreTrainedModel:
    """The weights a trial starts from.

    Full training keeps them in float32: bfloat16 has 8 bits of precision, and small updates to it are rounded away.
    """
    return load_model(base.source, torch.float32 if trial.method == "full" else base.dtype, base.device)


def epoch_order(pairs: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch sees the pairs; the same for all trials of a seed, in every engine."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(pairs, generator=generator).tolist()


def wants_checkpointing(trial: TrialConfig, device: torch.device) -> bool:
    """Whether activations are computed twice: memory is what a small card lacks, time is what a CPU lacks."""
    return device.type != "cpu" if trial.checkpointing == "auto" else trial.checkpointing == "on"


def check_first_step(trial: TrialConfig, logs: dict[str, float], slack: float = 0.0) -> None:
    """Before the first update policy and reference are one model: margins are 0, and the sigmoid loss is ln 2.

    Args:
        trial: what is trained.
        logs: the first step's means over pairs.
        slack: nats by which two log-probs of one model may differ where their last bits depend on the batch.
    """
    margin, loss = logs["rewards/margins"], logs["loss"]
    room = trial.beta * slack
    plain = trial.loss == "sigmoid" and not trial.sft_weight
    if abs(margin) > room or (plain and abs(loss - LN_2) > 1e-6 + room):
        raise RunFailed(
            f"trial {trial.name}: the first step has loss {loss:.6f} and reward margin {margin:.6f} instead of "
            f"{LN_2:.6f} and 0: policy and reference are not the same model at the start"
        )


def peak_memory_mb(device: torch.device) -> int:
    """On an accelerator of this process's tensors; on a CPU the process's highest resident size so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident // 2**20 if sys.platform == "darwin" else resident // 2**10
