"""What the rules look at, wherever it was read from."""

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

# A step or an evaluation: `epoch`, `step` where they are known, then metrics under TRL's names, without `eval_`.
Row = Mapping[str, float]

# The kind of evidence that this project's own runs are.
RUN_FOLDER = "run folder"

CHOSEN, REJECTED = "chosen", "rejected"
ANSWERS = (CHOSEN, REJECTED)

# Implied log-probs of one base on the same pairs agree to this many nats.
SAME_BASE_NATS = 1.0
# By how much beta may be off before it is another one.
BETA_SHARE = 0.1


@dataclass
class TrialLog:
    """What one trial has logged.

    Attributes:
        name: as the source calls it.
        learning_rate: as labelled; None: not on record.
        beta: as labelled; None: not on record.
        loss: its kind, as labelled; TRL's default where nothing says otherwise.
        loss_settings: what else is part of the loss's scale, by name, where it is on record.
        steps: training steps, in their order.
        evaluations: in their order, with `train_loss` where the same row had the training loss.
        eval_rows: pairs that an evaluation covers; None: not on record.
        batch_size: pairs of an evaluation's batch; None: not on record.
        max_grad_norm: to which gradients were clipped.
        status: `finished`, or what became of it, with `reason`.
        best_epoch: the epoch that is reported as the best.
        saved: words for the saved weights being others than those reported; empty where they agree or are not known.
        left: words for better weights than those that were kept, where no others were reported; or empty.
        examples: the best epoch's per-pair numbers by column, [pairs] each; empty where there are none.
    """

    name: str
    learning_rate: float | None = None
    beta: float | None = None
    loss: str = "sigmoid"
    loss_settings: dict[str, float] = field(default_factory=dict)
    steps: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    eval_rows: int | None = None
    batch_size: int | None = None
    max_grad_norm: float = 1.0
    status: str = "finished"
    reason: str = ""
    best_epoch: float | None = None
    saved: str = ""
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
        """One metric of every evaluation; NaN where it is not on record."""
        return np.array([row.get(metric, math.nan) for row in self.evaluations], dtype=np.float64)

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
        """Beta as rewards and log-probs have it: a reward is beta times the change of a log-prob.

        Returns:
            The slope of rewards on log-probs over all evaluations, and four of its standard errors: of rounding (six
            decimals, and log-probs in float32) or of the scatter around the line, whichever is larger. None where the
            log-probs do not move enough to tell.
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
        error = max(scatter, _REWARD_ROUNDING + abs(slope) * _LOGP_ROUNDING) / math.sqrt(square)
        return (slope, 4 * error) if slope > 0 and 4 * error < slope / 2 else None

    def base_logps(self, beta: float | None) -> dict[str, float]:
        """The base's mean log-probs as this trial implies them: log-prob minus reward over beta, of its evaluations."""
        implied: dict[str, float] = {}
        if not beta or self.reference_free:
            return implied
        for answer in ANSWERS:
            values = self.series(f"logps/{answer}") - self.series(f"rewards/{answer}") / beta
            if np.isfinite(values).any():
                implied[answer] = float(np.nanmedian(values))
        return implied


_REWARDS_AND_LOGPS = tuple(f"{what}/{answer}" for what in ("rewards", "logps") for answer in ANSWERS)
# Losses without a reference, as TRL's trainers and this project call them, and by how much one ratio may scatter.
_TELLING_STEPS = 50
_REFERENCE_FREE, _SAME_SHARE = frozenset({"simpo", "orpo", "cpo"}), 0.01

# Rewards are printed with six decimals; a log-prob of a hundred nats is exact to this in float32.
_REWARD_ROUNDING, _LOGP_ROUNDING = 5e-7, 1e-5


@dataclass
class Evidence:
    """Everything that is on record of one piece of work.

    Attributes:
        source: what was read.
        kind: in words, for example "CSV".
        trials: in the order in which they were run.
        selection: the choice, where one is on record.
        data: the account of the rows, where there is one.
        generations: answers to held-out prompts, where there are some.
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
        """Give trials that share a name names of their own: everything else goes by them."""
        names = Counter(trial.name for trial in self.trials)
        for number, trial in enumerate(self.trials, 1):
            if names[trial.name] > 1:
                trial.name = f"{trial.name} ({number})"

    @cached_property
    def betas(self) -> dict[str, float]:
        """Each trial's beta as it behaves, where that can be told, else as it is labelled."""
        labelled = {trial.name: trial.beta for trial in self.trials if trial.beta}
        behaving = {name: self._named(*found, labelled.values()) for name, found in self.behaviour.items()}
        return labelled | behaving

    @staticmethod
    def _named(value: float, error: float, labels: Iterable[float]) -> float:
        """The label that a trial behaves as, where there is one within the margin of error."""
        nearest = min(labels, key=lambda label: abs(label - value), default=value)
        return nearest if abs(nearest - value) <= max(error, BETA_SHARE * nearest) else value

    @cached_property
    def behaviour(self) -> dict[str, tuple[float, float]]:
        """Beta as each trial behaves, with a margin of error: from its own movement, else from the others' base."""
        moved = {trial.name: found for trial in self.trials if (found := trial.implied_beta())}
        bases = [trial.base_logps(moved[trial.name][0]) for trial in self.trials if trial.name in moved]
        for trial in self.trials:
            if trial.name not in moved and (found := _against(trial, bases)):
                moved[trial.name] = found
        return moved


def _against(trial: TrialLog, bases: Sequence[Mapping[str, float]]) -> tuple[float, float] | None:
    """Beta of a trial that does not move: its rewards over its distance from the base that the others imply."""
    row = trial.best
    if row is None or not bases:
        return None
    found = []
    for answer in ANSWERS:
        known = [base[answer] for base in bases if answer in base]
        if not known or np.ptp(known) > SAME_BASE_NATS:
            return None  # of several models, or on several sets of pairs: none of them need be this trial's
        far = row.get(f"logps/{answer}", math.nan) - float(np.median(known))
        if abs(far) > max(SAME_BASE_NATS, 10 * float(np.ptp(known))):
            found.append(row.get(f"rewards/{answer}", math.nan) / far)
    if len(found) < len(ANSWERS) or not all(each > 0 for each in found):
        return None
    value, error = float(np.mean(found)), float(np.ptp(found))
    return (value, error + 0.02 * value) if error < BETA_SHARE * value else None  # both answers must agree
