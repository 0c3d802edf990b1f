"""Everything that a report tells, taken from a run once: reports, model cards and figures share it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np

from pairtune.config import RunConfig
from pairtune.errors import BadInput
from pairtune.report.phrases import p_value
from pairtune.run.examples import PARTS, PairIndex
from pairtune.run.folder import Run, Trial
from pairtune.run.records import (
    Answer,
    AuditRecord,
    DataRecord,
    Environment,
    Generations,
    Selection,
    SweepRecord,
    TestRecord,
    TrialRecord,
)
from pairtune.statistics import longer_wins

# What a computer at work is taken to draw where it cannot be asked: a laptop, or a desktop with a small card.
WATTS = 65

# The columns of a trial's table: title and metric, as in the assignment's.
COLUMNS = (
    ("Training Loss", "loss"),
    ("Validation Loss", "eval_loss"),
    ("Rewards/chosen", "eval_rewards/chosen"),
    ("Rewards/rejected", "eval_rewards/rejected"),
    ("Rewards/accuracies", "eval_rewards/accuracies"),
    ("Rewards/margins", "eval_rewards/margins"),
    ("Logps/chosen", "eval_logps/chosen"),
    ("Logps/rejected", "eval_logps/rejected"),
    ("Logits/chosen", "eval_logits/chosen"),
    ("Logits/rejected", "eval_logits/rejected"),
)


@dataclass(frozen=True)
class Lengths:
    """Tokens of one part of the training pairs."""

    median: float
    p95: float


@dataclass(frozen=True)
class Cost:
    """What a run took: seconds from its start to its end or to now, seconds of training, memory, estimated energy."""

    seconds: float
    training_seconds: float
    peak_memory_mb: int
    watt_hours: float


@dataclass(frozen=True)
class BeforeAfter:
    """A held-out prompt's last turn, the number of its turns, and what base and winner answered."""

    prompt: str
    turns: int
    base: Answer
    tuned: Answer


@dataclass
class ReportData:
    """A finished run, or one whose report is being written.

    Attributes raise BadInput where a file that a report needs is missing or damaged.
    """

    run: Run

    @cached_property
    def config(self) -> RunConfig:
        """The settings of the run."""
        return self.run.settings

    @cached_property
    def data(self) -> DataRecord:
        """The account of the rows."""
        return self.run.need(DataRecord)

    @cached_property
    def selection(self) -> Selection:
        """The choice."""
        return self.run.need(Selection)

    @cached_property
    def environment(self) -> Environment:
        """What the run was made with."""
        return self.run.need(Environment)

    @cached_property
    def sweep(self) -> SweepRecord:
        """All trials in short."""
        return self.run.need(SweepRecord)

    @cached_property
    def audit(self) -> AuditRecord | None:
        """What the audit found."""
        return self.run.audit

    @cached_property
    def test(self) -> TestRecord | None:
        """The one look at the test pairs."""
        return self.run.test

    @cached_property
    def generations(self) -> Generations | None:
        """Answers before and after."""
        return self.run.generations

    @cached_property
    def trials(self) -> list[Trial]:
        """Those that have ended, in the order of the grid."""
        return [self.run.trial(entry.name) for entry in self.sweep.trials]

    @cached_property
    def records(self) -> dict[str, TrialRecord]:
        """How the trials ended, by name."""
        found = {}
        for trial in self.trials:
            if trial.record is None:
                raise BadInput(f"{trial.paths.record}: is missing or damaged")
            found[trial.name] = trial.record
        return found

    @property
    def winner(self) -> Trial:
        """The chosen trial."""
        return next(trial for trial in self.trials if trial.name == self.selection.winner)

    @property
    def winner_record(self) -> TrialRecord:
        """How it ended."""
        return self.records[self.selection.winner]

    @property
    def name(self) -> str:
        """The run folder's own name."""
        return self.run.name

    @property
    def base_name(self) -> str:
        """The base model as people know it."""
        base = self.environment.base
        return base.hub_id or Path(base.name).name

    @cached_property
    def index(self) -> PairIndex:
        """Which pairs are in which split."""
        return PairIndex.read(self.run.paths.pairs)

    @cached_property
    def lengths(self) -> dict[str, Lengths]:
        """Tokens of the training pairs' parts."""
        parts = {name: self.index.tokens(name, "train") for name in PARTS}
        return {
            name: Lengths(float(np.median(values)), float(np.percentile(values, 95))) for name, values in parts.items()
        }

    @cached_property
    def longer_wins(self) -> float:
        """How often the longer answer of a training pair is the chosen one."""
        found = longer_wins(self.index.tokens("chosen", "train"), self.index.tokens("rejected", "train"))
        return found.value or 0.0

    @cached_property
    def cost(self) -> Cost:
        """What the run took."""
        records = self.records.values()
        training = sum(record.own_seconds for record in records)
        started = datetime.fromisoformat(self.environment.started)
        seconds = ((self.run.ended_at or datetime.now(started.tzinfo)) - started).total_seconds()
        return Cost(
            seconds=max(seconds, training),
            training_seconds=training,
            peak_memory_mb=max(record.peak_memory_mb for record in records),
            watt_hours=training / 3600 * WATTS,
        )

    @property
    def headline(self) -> list[str]:
        """The run in three sentences: what was tried, what won and how sure that is, what the test said."""
        selection, trials = self.selection, len(self.trials)
        said = [
            f"{trials} trial{'' if trials == 1 else 's'} of tuning {self.base_name} on "
            f"{self.data.splits['train'].pairs:,} preference pairs ({self.config.method}, loss {self.config.loss}).",
            f"Winner by {selection.metric}: {self.winner.label}, epoch {selection.best_epoch} "
            f"({selection.value:.4f}); {selection.verdict}.",
        ]
        if self.test:
            low, high = self.test.intervals["eval_rewards/accuracies"]
            against = self.test.against_base
            moved = f"that it moved the right way from the base is {'shown' if against.better else 'not shown'}"
            said.append(
                f"On {self.test.pairs} test pairs that had no part in the choice it prefers the better answer in "
                f"{self.test.metrics.accuracy:.0%} of cases (95 % interval {low:.0%} to {high:.0%}); {moved} "
                f"({p_value(against.p)})."
            )
        return said

    @property
    def answers(self) -> list[BeforeAfter]:
        """What base and winner answered, prompt by prompt."""
        return before_and_after(self.generations, self.selection.winner)

    @property
    def rounding(self) -> str:
        """What the machine does to a pair's margin, in one sentence; empty where it was not measured."""
        found = self.sweep.rounding
        if not found:
            return ""
        wide = found.from_float32
        said = f"{wide:.2g} nats from float32" if wide is not None else "an amount from float32 that was not measured"
        rows = f"{found.between_rows:.2g} nats from row to row" if found.between_rows else "nothing from row to row"
        return (
            f"Rounding in {found.dtype} on this machine moves a pair's margin, before beta, by {said} and by {rows} "
            f"(root mean square over the first pairs)."
        )

    @property
    def _path(self) -> Path:
        """Of the run, without the folders of the machine above it: reports travel."""
        root = self.run.root
        return Path(root.name) if root.is_absolute() else root

    @property
    def commands(self) -> dict[str, str]:
        """How to do it again, and what to do next."""
        return {
            "again": f"pairtune tune {self._path}/config.yaml --out NEW",
            "talk": f"pairtune chat {self._path}",
        }


def before_and_after(generations: Generations | None, winner: str) -> list[BeforeAfter]:
    """What base and winner answered to held-out prompts; empty where one of them did not."""
    if generations is None or not {"base", winner} <= generations.models.keys():
        return []
    base, tuned = generations.models["base"].answers, generations.models[winner].answers
    return [
        BeforeAfter(str(prompt[-1]["content"]), len(prompt), before, after)
        for prompt, before, after in zip(generations.prompts, base, tuned, strict=True)
    ]
