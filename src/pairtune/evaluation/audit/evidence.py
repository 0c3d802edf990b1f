"""The evidence that rules check, whatever it was read from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from pairtune.run.records import DataRecord, Generations, Selection
from pairtune.statistics import Numbers

# A step or an evaluation: `epoch` and `step` where known, then metrics under TRL's names, without `eval_`.
Row = Mapping[str, float]

# The `kind` of evidence read from Pairtune's own runs.
RUN_FOLDER = "run folder"

CHOSEN, REJECTED = "chosen", "rejected"
ANSWERS = (CHOSEN, REJECTED)

# Implied log-probs of one base on the same pairs agree to this many nats.
SAME_BASE_NATS = 1.0
# Relative difference above which two betas are not the same.
BETA_SHARE = 0.1


@dataclass
class TrialLog:
    """The log of one trial.

    Attributes:
        name: as in the source.
        learning_rate: as labelled; None if not recorded.
        beta: as labelled; None if not recorded.
        loss: the loss type, as labelled; empty if not recorded.
        loss_settings: other settings that change the loss's scale, by name, where recorded.
        steps: training steps, in order.
        evaluations: in order, with `train_loss` where the same row had the training loss.
        eval_rows: number of pairs per evaluation; None if not recorded.
        eval_batches: number of batches per evaluation; None if not recorded.
        batch_size: of evaluations, as a person stated it; None if nobody did.
        max_grad_norm: the norm that gradients were clipped to; None if not recorded.
        batch_means: whether evaluations average the means of batches, as TRL does, except for the loss.
        rounding: how far the printed values of a column may be off, for columns with few decimals.
        status: `finished`, or how else the trial ended, with `reason`.
        best_epoch: the epoch that is reported as the best.
        saved: how the saved weights differ from the reported ones; empty where they agree or are unknown.
        elsewhere: where the trial started and what it is measured against, if these are not the same model.
        left: which better weights were not kept, where no others were reported; or empty.
        examples: the best epoch's per-pair metrics by column, [pairs] each; empty where there are none.
    """

    name: str
    learning_rate: float | None = None
    beta: float | None = None
    loss: str = ""
    loss_settings: dict[str, float] = field(default_factory=dict)
    steps: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    eval_rows: int | None = None
    eval_batches: int | None = None
    batch_size: int | None = None
    max_grad_norm: float | None = None
    batch_means: bool = False
    rounding: dict[str, float] = field(default_factory=dict)
    status: str = "finished"
    reason: str = ""
    best_epoch: float | None = None
    saved: str = ""
    elsewhere: str = ""
    left: str = ""
    examples: dict[str, Numbers] = field(default_factory=dict)

    @property
    def best(self) -> Row | None:
        """The evaluation that counts: the reported one, else the one with the lowest loss, else the last."""
        for row in self.evaluations:
            if self.best_epoch is not None and row.get("epoch") == self.best_epoch:
                return row
        judged = [row for row in self.evaluations if math.isfinite(row.get("loss", math.nan))]
        if judged:
            return min(judged, key=lambda row: row["loss"])
        return self.evaluations[-1] if self.evaluations else None

    def series(self, metric: str) -> Numbers:
        """One metric over all evaluations; NaN where it is not recorded."""
        return np.array([row.get(metric, math.nan) for row in self.evaluations], dtype=np.float64)

    @property
    def is_dpo(self) -> bool | None:
        """Whether the loss is -log sigmoid of the margin, as DPO's without label smoothing is; None if unknown.

        Where the loss type is not recorded, the numbers can show it: other losses differ from -log sigmoid at margins
        near 0, or fall below it, which the mean of DPO's loss cannot (Jensen). Rows of training and evaluations are
        looked at apart, because a fault in one kind should not hide what the other shows.
        """
        if self.loss:
            return self.loss == DPO and not self.loss_settings.get("label_smoothing")
        if any(map(_satisfied, self.steps)):
            return False
        kinds = [sigmoid_excess(self.steps), sigmoid_excess([] if self.uneven else self.evaluations)]
        seen = [_follows_sigmoid(kind) for kind in kinds]
        if True in seen:
            return True
        # A loss of exactly 0 may be a NaN that was written as 0, and says nothing about the type.
        nonzero = [kind[kind[:, 0] + np.logaddexp(0, -kind[:, 1]) != 0] for kind in kinds]
        if any(len(kind) and (kind[:, 0] < -_FAR_BELOW).mean() > _FEW_BELOW for kind in nonzero):
            return None if "mostly" in seen else False
        return True if "mostly" in seen else None

    def off(self, *names: str) -> float:
        """How far a sum of these columns' values may be off, because they were printed with few decimals."""
        return sum(self.rounding.get(name, 0.0) for name in names)

    @property
    def uneven(self) -> bool:
        """Whether the pairs of a smaller last batch may count more than the others in an evaluation's margins.

        The log shows the numbers of rows and batches, which several batch sizes can give; powers of two are usual.
        """
        if not self.batch_means or self.eval_batches == 1:
            return False
        rows, batches = self.eval_rows or 0, self.eval_batches or 0
        usual = (2**power for power in range(12))
        return not any(rows and rows % size == 0 and rows // size == batches for size in usual)

    @property
    def reference_free(self) -> bool:
        """Whether rewards are beta times the log-probs themselves, as TRL's CPO, SimPO and ORPO log them."""
        logged = (*self.evaluations, *self.steps[:_TELLING_STEPS])
        rows = [row for row in logged if all(name in row for name in _REWARDS_AND_LOGPS)]
        shares = [
            row[f"rewards/{answer}"] / row[f"logps/{answer}"]
            for row in rows
            for answer in ANSWERS
            if math.isfinite(row[f"rewards/{answer}"]) and row[f"logps/{answer}"]
        ]
        if len(shares) < len(ANSWERS):
            return self.loss in _REFERENCE_FREE and not shares
        middle = float(np.median(shares))
        return middle > 0 and all(abs(share - middle) <= _SAME_SHARE * middle for share in shares)

    def implied_beta(self) -> tuple[float, float] | None:
        """Beta as implied by rewards and log-probs: a reward is beta times the change of a log-prob.

        Returns:
            The slope of rewards on log-probs over all evaluations, and four of its standard errors, from rounding (six
            decimals, and log-probs in float32) or from the scatter around the line, whichever is larger. None where
            log-probs change too little to tell.
        """
        moved, rewarded = [], []
        for answer in ANSWERS:
            logps, rewards = self.series(f"logps/{answer}"), self.series(f"rewards/{answer}")
            known = np.isfinite(logps) & np.isfinite(rewards)
            if known.sum() > 1:
                moved.append(logps[known] - logps[known].mean())
                rewarded.append(rewards[known] - rewards[known].mean())
        if not moved:
            return None
        x, y = np.concatenate(moved), np.concatenate(rewarded)
        square = float(x @ x)
        if square == 0:
            return None
        slope = float(x @ y) / square
        freedom = len(x) - len(moved) - 1
        scatter = float(np.sqrt(np.square(y - slope * x).sum() / freedom)) if freedom > 0 else 0.0
        printed = self.off("rewards/chosen") + abs(slope) * self.off("logps/chosen")
        error = max(scatter, printed + _REWARD_ROUNDING + abs(slope) * _LOGP_ROUNDING) / math.sqrt(square)
        return (slope, 4 * error) if slope > 0 and 4 * error < slope / 2 else None

    def base_logps(self, beta: float | None) -> dict[str, float]:
        """The base's mean log-probs as implied by this trial's evaluations: log-prob minus reward over beta."""
        implied: dict[str, float] = {}
        if not beta or self.reference_free:
            return implied
        for answer in ANSWERS:
            values = self.series(f"logps/{answer}") - self.series(f"rewards/{answer}") / beta
            if np.isfinite(values).any():
                implied[answer] = float(np.nanmedian(values))
        return implied


DPO, KTO = "sigmoid", "kto"  # TRL's names of these losses
# How near a loss has to be to -log sigmoid at the smallest margin, per unit of that margin and in all; how far below is
# rounding; and how far rows are below that a few of which do not belong to the others.
_NEAR_SHARE, _NEAR, LOSS_ROUNDING, _FAR_BELOW, _FEW_BELOW, _MANY_ROWS = 0.06, 0.003, 2e-4, 0.05, 0.2, 20


def sigmoid_excess(rows: Sequence[Row]) -> Numbers:
    """By how much each row's loss exceeds -log sigmoid of its margin; rows without either are left out, [rows, 2].

    The second column is the margin.
    """
    pairs = [(row.get("loss", math.nan), row.get("rewards/margins", math.nan)) for row in rows]
    known = np.array([pair for pair in pairs if all(map(math.isfinite, pair))], dtype=np.float64).reshape(-1, 2)
    return np.stack([known[:, 0] - np.logaddexp(0, -known[:, 1]), known[:, 1]], axis=1)


def _follows_sigmoid(found: Numbers) -> bool | str:
    """Whether rows lie where those of DPO's loss do: all of them, or "mostly", with a few that are far below."""
    if len(found) < 2:
        return False
    below = found[:, 0] < -LOSS_ROUNDING
    few = len(found) >= _MANY_ROWS and below.mean() <= _FEW_BELOW and found[below, 0].max(initial=-1.0) <= -_FAR_BELOW
    if below.any() and not few:
        return False
    excess, margin = found[~below][np.abs(found[~below, 1]).argmin()]
    near = excess <= _NEAR_SHARE * min(1.0, abs(margin)) + _NEAR
    return bool(near) and ("mostly" if below.any() else True)


def _satisfied(row: Row) -> bool:
    """Whether a row has neither loss nor gradient because all its pairs are told apart: a hinge loss does that."""
    told_apart = row.get("rewards/accuracies") == 1 and row.get("rewards/margins", 0.0) >= 1
    return told_apart and row.get("loss") == 0 and row.get("grad_norm") == 0


_REWARDS_AND_LOGPS = tuple(f"{what}/{answer}" for what in ("rewards", "logps") for answer in ANSWERS)
# Steps to look at; reference-free losses by TRL's and Pairtune's names; and how much their ratio may scatter.
_TELLING_STEPS = 50
_REFERENCE_FREE, _SAME_SHARE = frozenset({"simpo", "orpo", "cpo"}), 0.01

# Rewards are printed with six decimals; a log-prob of a hundred nats is exact to this in float32.
_REWARD_ROUNDING, _LOGP_ROUNDING = 5e-7, 1e-5


@dataclass
class Evidence:
    """Everything on record about one run, or about one log made elsewhere.

    Attributes:
        source: what was read.
        kind: what that is, for example "CSV".
        trials: in the order they were run in.
        selection: the selection, where recorded.
        data: the row counts of the data, where recorded.
        generations: answers to held-out prompts, where recorded.
        prompts: hashes of the prompts of each split.
    """

    source: Path
    kind: str
    trials: Sequence[TrialLog]
    selection: Selection | None = None
    data: DataRecord | None = None
    generations: Generations | None = None
    prompts: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make trial names unique: everything else refers to trials by name."""
        names = Counter(trial.name for trial in self.trials)
        for number, trial in enumerate(self.trials, 1):
            if names[trial.name] > 1:
                trial.name = f"{trial.name} ({number})"

    @cached_property
    def betas(self) -> dict[str, float]:
        """Each trial's beta: as implied by its numbers where they tell, else as labelled."""
        labelled = {trial.name: trial.beta for trial in self.trials if trial.beta}
        behaving = {name: self._named(*found, labelled.values()) for name, found in self.behaviour.items()}
        return labelled | behaving

    @staticmethod
    def _named(value: float, error: float, labels: Iterable[float]) -> float:
        """The nearest label if it is within the margin of error, else the implied beta itself."""
        nearest = min(labels, key=lambda label: abs(label - value), default=value)
        return nearest if abs(nearest - value) <= max(error, BETA_SHARE * nearest) else value

    @cached_property
    def behaviour(self) -> dict[str, tuple[float, float]]:
        """Each trial's implied beta and its margin of error: from its own changes, else from the base others imply."""
        moved = {trial.name: found for trial in self.trials if (found := trial.implied_beta())}
        bases = [trial.base_logps(moved[trial.name][0]) for trial in self.trials if trial.name in moved]
        for trial in self.trials:
            if trial.name not in moved and (found := _against(trial, bases)):
                moved[trial.name] = found
        return moved


def _against(trial: TrialLog, bases: Sequence[Mapping[str, float]]) -> tuple[float, float] | None:
    """Beta of a trial that does not move: its rewards over its distance from the base that other trials imply."""
    row = trial.best
    if row is None or not bases:
        return None
    found = []
    for answer in ANSWERS:
        known = [base[answer] for base in bases if answer in base]
        if not known or np.ptp(known) > SAME_BASE_NATS:
            return None  # several base models or sets of pairs: none need be this trial's
        far = row.get(f"logps/{answer}", math.nan) - float(np.median(known))
        if abs(far) > max(SAME_BASE_NATS, 10 * float(np.ptp(known))):
            found.append(row.get(f"rewards/{answer}", math.nan) / far)
    if len(found) < len(ANSWERS) or not all(each > 0 for each in found):
        return None
    value, error = float(np.mean(found)), float(np.ptp(found))
    return (value, error + 0.02 * value) if error < BETA_SHARE * value else None  # both answers must agree
