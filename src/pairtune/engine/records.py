"""What an engine hands on: metric names, per-example records, the result of a trial.

Names are TRL's (https://huggingface.co/docs/trl/dpo_trainer#logged-metrics), so tables and dashboards carry over.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pairtune.config import Select, TrialConfig
from pairtune.data.table import PairTable
from pairtune.runs import TrialFolder, write_atomic, write_json
from pairtune.statistics import Groups, Numbers, bootstrap_intervals, design_effect, share_interval

# Per pair: loss (nats), rewards = beta * (policy - reference) log-prob, log-probs summed over the answer's tokens
# (nats), logits averaged over the answer's tokens and the vocabulary. The last one is not TRL's: the change of the
# chosen answer's log-prob per token minus the rejected one's, which has no beta and no length in it.
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
    "logps/margins_per_token",
)
# The column of the groups.
GROUP = "group"
# What some evaluations have besides: the divergence from the base (nats per token), of the first pairs alone.
KL = "kl"

# One evaluated pair: a number for each of EXAMPLE_METRICS, and perhaps `kl`.
ExampleRecord = dict[str, Any]

# The metric that a selection rule looks at, and whether more of it is better.
RULES: dict[Select, tuple[str, bool]] = {
    "eval_loss": ("eval_loss", False),
    "accuracy": ("eval_rewards/accuracies", True),
    "margin": ("eval_rewards/margins", True),
    "win_rate": ("eval_loss", False),  # of a trial's epochs; the trials are then judged by their answers
}


class TrialFailed(Exception):
    """A trial cannot go on (its loss is not a number any more); the others can. The message is the diagnosis."""


@dataclass
class TrialResult:
    """One trial, as `trial.json` stores it.

    Attributes:
        epochs: one row per evaluation: `epoch`, `step`, `loss` (mean over the epoch's training pairs) and the
            `eval_` means over the validation pairs.
        judged: for each evaluation when the search judged it, among all evaluations of the run: a search that goes on
            judges as it would have. Empty where it was not judged.
        best_epoch: the epoch whose weights lie in the trial's `best/`.
        base_fingerprint: of the weights the trial started from.
        best_fingerprint: of the weight files in the trial's `best/`.
        train_seconds: time in training steps, without loading, evaluation and saving.
        own_seconds: of these, this trial's share: a second of four trials is a quarter of a second of each.
        train_pairs: seen in all steps together.
        side_by_side: how many trials were trained together, sharing `train_seconds`, when this one began.
        steps_without_gradient: steps whose gradient was exactly 0, so that they taught nothing.
        peak_memory_mb: on an accelerator of this trial; on a CPU the process's highest resident size so far.
    """

    trial: TrialConfig
    status: Literal["finished", "failed", "pruned"] = "finished"
    reason: str = ""
    epochs: list[dict[str, float]] = field(default_factory=list)
    judged: list[int] = field(default_factory=list)
    best_epoch: int | None = None
    base_fingerprint: str = ""
    best_fingerprint: str = ""
    steps_without_gradient: int = 0
    train_seconds: float = 0.0
    own_seconds: float = 0.0
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
        kept = {name: record[name] for name in (*_KEPT, *_SUMMARISED) if name in record}  # `judged` came later
        return cls(TrialConfig(**record["config"]), **kept)

    def write(self, folder: TrialFolder) -> None:
        """Write `trial.json`."""
        write_json(folder.record, self.record())


_SUMMARISED = ("status", "reason", "best_epoch", "peak_memory_mb", "train_seconds")
_KEPT = (
    "epochs",
    "judged",
    "base_fingerprint",
    "best_fingerprint",
    "steps_without_gradient",
    "own_seconds",
    "train_pairs",
    "side_by_side",
)


def mean_metrics(records: Sequence[ExampleRecord]) -> dict[str, float]:
    """Means over examples, named as TRL names evaluation metrics: `eval_loss`, `eval_rewards/chosen`, …"""
    means = {f"eval_{name}": math.fsum(row[name] for row in records) / len(records) for name in EXAMPLE_METRICS}
    if known := [row[KL] for row in records if row.get(KL) is not None]:
        means[f"eval_{KL}"] = math.fsum(known) / len(known)
    return means


def score(metrics: dict[str, float], rule: Select) -> float:
    """How good an evaluation is by a selection rule; more is better."""
    name, more_is_better = RULES[rule]
    return metrics[name] if more_is_better else -metrics[name]


def write_records(path: Path, pairs: PairTable, records: Sequence[ExampleRecord]) -> None:
    """Write one evaluation's per-example records as Parquet, one row per pair, in the order of the pairs.

    Columns: `origin` (source and row), `group` (pairs whose prompts belong together share it), `tokens/prompt`,
    `tokens/chosen`, `tokens/rejected`, EXAMPLE_METRICS, and `kl` where it is known.
    """
    columns = {"origin": pairs.columns("origin")["origin"], GROUP: pa.array(pairs.groups), **pairs.lengths()}
    columns |= {name: pa.array([row[name] for row in records], pa.float64()) for name in EXAMPLE_METRICS}
    if any(KL in row for row in records):
        columns[KL] = pa.array([row[KL] for row in records], pa.float64())
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    write_atomic(path, buffer.getvalue())


def read_records(path: Path) -> NDArray[np.float64]:
    """The numbers of one evaluation that `write_records` wrote, [pairs, EXAMPLE_METRICS]."""
    table = pq.read_table(path, columns=list(EXAMPLE_METRICS))
    return np.stack([table[name].to_numpy() for name in EXAMPLE_METRICS], axis=1).astype(np.float64)


def read_groups(path: Path) -> Groups | None:
    """The groups of the pairs of one evaluation, [pairs]; None: it was written before they were kept."""
    if GROUP not in pq.read_schema(path).names:
        return None
    groups: Groups = pq.read_table(path, columns=[GROUP])[GROUP].to_numpy()
    return groups


def metric_intervals(records: Numbers, groups: Groups | None = None) -> dict[str, list[float]]:
    """95 % intervals of the means over pairs, by the name of the metric."""
    intervals = bootstrap_intervals(records, groups)
    accuracy = EXAMPLE_METRICS.index("rewards/accuracies")
    right = records[:, accuracy]
    effect = design_effect(right, groups)
    intervals[accuracy] = share_interval(right.sum() / effect, len(right) / effect)  # 5 of 5 is not beyond doubt
    return {
        f"eval_{name}": [float(low), float(high)] for name, (low, high) in zip(EXAMPLE_METRICS, intervals, strict=True)
    }


def describe_examples(path: Path) -> dict[str, Any]:
    """What an evaluation's records say besides the means of its metrics, with 95 % intervals.

    Returns:
        `longer_wins`: how often "the longer answer is the better one" is right (equal lengths count half);
        `accuracy_longer_chosen` and `accuracy_shorter_chosen`: the model's accuracy on the pairs whose chosen answer is
        the longer or the shorter one; each with `value`, `interval` and `pairs`. `kl` where it is known.
    """
    table, groups = pq.read_table(path), read_groups(path)
    chosen, rejected = (table[f"tokens/{answer}"].to_numpy() for answer in ("chosen", "rejected"))
    right = table["rewards/accuracies"].to_numpy()
    described = {
        "longer_wins": _share((chosen > rejected) + (chosen == rejected) / 2, groups),
        "accuracy_longer_chosen": _share(right, groups, chosen > rejected),
        "accuracy_shorter_chosen": _share(right, groups, chosen < rejected),
    }
    if KL in table.column_names:
        known = table[KL].drop_null().to_numpy()
        some = None if groups is None else groups[table[KL].is_valid().to_numpy()]
        (interval,) = bootstrap_intervals(known[:, None], some)
        described[KL] = {"value": float(known.mean()), "interval": interval.tolist(), "pairs": len(known)}
    return described


def _share(right: Numbers, groups: Groups | None, where: NDArray[np.bool_] | None = None) -> dict[str, Any]:
    if where is not None:
        right, groups = right[where], None if groups is None else groups[where]
    if not len(right):
        return {"value": None, "interval": list(share_interval(0, 0)), "pairs": 0}
    effect, count = design_effect(right, groups), float(right.sum())
    interval = share_interval(count / effect, len(right) / effect)
    return {"value": count / len(right), "interval": list(interval), "pairs": len(right)}
