"""What an engine hands on: metric names, per-example records, the result of a trial.

Names are TRL's (https://huggingface.co/docs/trl/dpo_trainer#logged-metrics), so tables and dashboards carry over.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pairtune.config import Select, TrialConfig
from pairtune.data.pairs import PreferencePair
from pairtune.runs import TrialFolder, write_atomic, write_json

# Per pair: loss (nats), rewards = beta * (policy - reference) log-prob, log-probs summed over the answer's tokens
# (nats), logits averaged over the answer's tokens and the vocabulary.
EXAMPLE_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
)

# One evaluated pair: its origin, and a number for each of EXAMPLE_METRICS.
ExampleRecord = dict[str, Any]

# The metric that a selection rule looks at, and whether more of it is better.
RULES: dict[Select, tuple[str, bool]] = {
    "eval_loss": ("eval_loss", False),
    "accuracy": ("eval_rewards/accuracies", True),
    "margin": ("eval_rewards/margins", True),
}


class TrialFailed(Exception):
    """A trial cannot go on (its loss is not a number any more); the others can. The message is the diagnosis."""


@dataclass
class TrialResult:
    """One trial, as `trial.json` stores it.

    Attributes:
        epochs: one row per evaluation: `epoch`, `step`, `loss` (mean over the epoch's training pairs) and the
            `eval_` means over the validation pairs.
        best_epoch: the epoch whose weights lie in the trial's `best/`.
        base_fingerprint: of the weights the trial started from.
        best_fingerprint: of the weight files in the trial's `best/`.
        train_seconds: time in training steps, without loading, evaluation and saving.
        train_pairs: seen in all steps together.
        side_by_side: how many trials were trained together, sharing `train_seconds`, when this one began.
        steps_without_gradient: steps whose gradient was exactly 0, so that they taught nothing.
        peak_memory_mb: on an accelerator of this trial; on a CPU the process's highest resident size so far.
    """

    trial: TrialConfig
    status: Literal["finished", "failed", "pruned"] = "finished"
    reason: str = ""
    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    base_fingerprint: str = ""
    best_fingerprint: str = ""
    steps_without_gradient: int = 0
    train_seconds: float = 0.0
    train_pairs: int = 0
    side_by_side: int = 1
    peak_memory_mb: int = 0

    @property
    def best_metrics(self) -> dict[str, float]:
        """The row of the best epoch; empty for a trial that never was evaluated."""
        return next((row for row in self.epochs if row["epoch"] == self.best_epoch), {})

    def summary(self) -> dict[str, Any]:
        """The trial's entry in `sweep.json`."""
        return {
            "name": self.trial.name,
            "learning_rate": self.trial.learning_rate,
            "beta": self.trial.beta,
            "status": self.status,
            "reason": self.reason,
            "best_epoch": self.best_epoch,
            "train_seconds": round(self.train_seconds, 3),
            "train_pairs_per_second": round(self.train_pairs / self.train_seconds, 4) if self.train_seconds else 0.0,
            "peak_memory_mb": self.peak_memory_mb,
            "metrics": self.best_metrics,
        }

    def record(self) -> dict[str, Any]:
        """The content of `trial.json`."""
        return self.summary() | {
            "config": self.trial.model_dump(mode="json"),
            **{name: getattr(self, name) for name in _KEPT},
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> TrialResult:
        """The result that `record` gave."""
        return cls(TrialConfig(**record["config"]), **{name: record[name] for name in (*_KEPT, *_SUMMARISED)})

    def write(self, folder: TrialFolder) -> None:
        """Write `trial.json`."""
        write_json(folder.record, self.record())


_SUMMARISED = ("status", "reason", "best_epoch", "peak_memory_mb", "train_seconds")
_KEPT = (
    "epochs",
    "base_fingerprint",
    "best_fingerprint",
    "steps_without_gradient",
    "train_pairs",
    "side_by_side",
)


def mean_metrics(records: Sequence[ExampleRecord]) -> dict[str, float]:
    """Means over examples, named as TRL names evaluation metrics: `eval_loss`, `eval_rewards/chosen`, …"""
    return {f"eval_{name}": math.fsum(row[name] for row in records) / len(records) for name in EXAMPLE_METRICS}


def score(metrics: dict[str, float], rule: Select) -> float:
    """How good an evaluation is by a selection rule; more is better."""
    name, more_is_better = RULES[rule]
    return metrics[name] if more_is_better else -metrics[name]


def write_records(path: Path, pairs: Iterable[PreferencePair], records: Sequence[ExampleRecord]) -> None:
    """Write one evaluation's per-example records as Parquet, one row per pair, in the order of the pairs."""
    named = [{"origin": pair.origin, **record} for pair, record in zip(pairs, records, strict=True)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(named), buffer)
    write_atomic(path, buffer.getvalue())


def read_records(path: Path) -> NDArray[np.float64]:
    """The numbers of one evaluation that `write_records` wrote, [pairs, EXAMPLE_METRICS]."""
    table = pq.read_table(path, columns=list(EXAMPLE_METRICS))
    return np.stack([table[name].to_numpy() for name in EXAMPLE_METRICS], axis=1).astype(np.float64)
