"""Everything that reports, model cards and figures show, read from a run once."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np

from pairtune.config import RunConfig
from pairtune.errors import BadInput, plural
from pairtune.report.phrases import described_start, p_value
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

# Assumed power draw while training, for a laptop or a desktop with a small GPU.
WATTS = 65

# The columns of a trial's table: title and metric.
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
    """Token counts of one part of the training pairs."""

    median: float
    p95: float


@dataclass(frozen=True)
class Cost:
    """Cost of a run: seconds from start to end (or to now), seconds of training, memory, estimated energy."""

    seconds: float
    training_seconds: float
    peak_memory_mb: int
    watt_hours: float


@dataclass(frozen=True)
class BeforeAfter:
    """A held-out prompt's last turn, and the answers of base and winner."""

    prompt: str
    base: Answer
    tuned: Answer


@dataclass
class ReportData:
    """A finished run, or one whose report is being written.

    Attributes raise BadInput where a file that a report needs is missing or damaged.

    Args:
        run: the run.
        ended: when the run ended, if that is not recorded yet.
    """

    run: Run
    ended: datetime | None = None

    @cached_property
    def config(self) -> RunConfig:
        """The settings of the run."""
        return self.run.settings

    @cached_property
    def data(self) -> DataRecord:
        """The row counts of the data."""
        return self.run.need(DataRecord)

    @cached_property
    def selection(self) -> Selection:
        """The selection."""
        return self.run.need(Selection)

    @cached_property
    def environment(self) -> Environment:
        """The environment that the run was made in."""
        return self.run.need(Environment)

    @cached_property
    def sweep(self) -> SweepRecord:
        """A summary of all trials."""
        return self.run.need(SweepRecord)

    @cached_property
    def audit(self) -> AuditRecord | None:
        """The audit's result."""
        return self.run.audit

    @cached_property
    def test(self) -> TestRecord | None:
        """The test evaluation."""
        return self.run.test

    @cached_property
    def generations(self) -> Generations | None:
        """Answers before and after tuning."""
        return self.run.generations

    @cached_property
    def trials(self) -> list[Trial]:
        """The trials that have ended, in grid order."""
        return [self.run.trial(entry.name) for entry in self.sweep.trials]

    @cached_property
    def records(self) -> dict[str, TrialRecord]:
        """The trials' final records, by name."""
        found = {}
        for trial in self.trials:
            if trial.record is None:
                raise BadInput(f"{trial.paths.record}: is missing or damaged")
            found[trial.name] = trial.record
        return found

    @property
    def winner(self) -> Trial:
        """The selected trial."""
        return next(trial for trial in self.trials if trial.name == self.selection.winner)

    @property
    def winner_record(self) -> TrialRecord:
        """The winner's final record."""
        return self.records[self.selection.winner]

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.run.name

    @property
    def base_name(self) -> str:
        """The base model's Hub id, or else its folder or file name."""
        base = self.environment.base
        return base.hub_id or Path(base.name).name

    @cached_property
    def index(self) -> PairIndex:
        """Which pairs are in which split."""
        return PairIndex.read(self.run.paths.pairs)

    @cached_property
    def lengths(self) -> dict[str, Lengths]:
        """Token counts of the parts of the training pairs."""
        train = self.index.of_split("train")
        # Of single answers, one side has no tokens.
        parts = {name: values[values > 0] for name in PARTS if (values := train.tokens(name)).any()}
        return {
            name: Lengths(float(np.median(values)), float(np.percentile(values, 95))) for name, values in parts.items()
        }

    @cached_property
    def longer_wins(self) -> float:
        """How often the longer answer of a training pair is the chosen one."""
        train = self.index.of_split("train")
        found = longer_wins(train.tokens("chosen"), train.tokens("rejected"))
        return found.value or 0.0

    @cached_property
    def cost(self) -> Cost:
        """The cost of the run."""
        records = self.records.values()
        training = sum(record.own_seconds for record in records)
        started = datetime.fromisoformat(self.environment.started)
        ended = self.ended or self.run.ended_at or datetime.now(started.tzinfo)
        seconds = (ended - started).total_seconds()
        return Cost(
            seconds=max(seconds, training),
            training_seconds=training,
            peak_memory_mb=max(record.peak_memory_mb for record in records),
            watt_hours=training / 3600 * WATTS,
        )

    @property
    def headline(self) -> list[str]:
        """The run in a few sentences: what was tried, where it started, what won and how certain that is, the test."""
        selection, train_pairs = self.selection, self.data.splits["train"].pairs
        trained = "preference pair" if selection.noun == "pair" else "single answer"
        said = [
            f"{plural(len(self.trials), 'trial')} tuning {self.base_name} on {plural(train_pairs, trained)} "
            f"({self.config.method}, {self.config.loss} loss).",
            f"Winner by {selection.metric}: {self.winner.label}, epoch {selection.best_epoch} "
            f"({selection.value:.4f}); {selection.verdict}.",
        ]
        if self.run.lineage:
            said.insert(1, f"{described_start(self.run.lineage)}.")
        if self.test:
            low, high = self.test.intervals["eval_rewards/accuracies"]
            against = self.test.against_base
            better = "better than the base" if against.better else "not shown to be better than the base"
            said.append(
                f"On {plural(self.test.pairs, f'test {selection.noun}')}, not used for training or selection, the "
                f"winner's accuracy is {self.test.metrics.accuracy:.0%} (95% interval {low:.0%} to {high:.0%}); it is "
                f"{better} ({p_value(against.p)})."
            )
        return said

    @property
    def answers(self) -> list[BeforeAfter]:
        """The answers of base and winner, prompt by prompt."""
        return before_and_after(self.generations, self.selection.winner)

    @property
    def rounding(self) -> str:
        """How much rounding changes a pair's margin, in one sentence; empty if it was not measured."""
        found = self.sweep.rounding
        if not found:
            return ""
        wide = found.from_float32
        said = f"{wide:.2g} nats from float32" if wide is not None else "an unmeasured amount from float32"
        rows = f"{found.between_rows:.2g} nats" if found.between_rows else "nothing"
        return (
            f"Rounding in {found.dtype} on this machine changes a pair's log-prob margin, before beta, by {said}, and "
            f"by {rows} between batch rows (root mean square over the first pairs)."
        )

    @property
    def _path(self) -> Path:
        """The run's path without this machine's folders above it, since reports are shared."""
        root = self.run.root
        return Path(root.name) if root.is_absolute() else root

    @property
    def commands(self) -> dict[str, str]:
        """Commands to repeat the run and to chat with the result."""
        return {
            "again": f"pairtune tune {self._path}/config.yaml --out NEW",
            "talk": f"pairtune chat {self._path}",
        }


def before_and_after(generations: Generations | None, winner: str) -> list[BeforeAfter]:
    """The answers of base and winner to held-out prompts; empty if one of them has none."""
    if generations is None or not {"base", winner} <= generations.models.keys():
        return []
    base, tuned = generations.models["base"].answers, generations.models[winner].answers
    return [
        BeforeAfter(str(prompt[-1]["content"]), before, after)
        for prompt, before, after in zip(generations.prompts, base, tuned, strict=True)
    ]
