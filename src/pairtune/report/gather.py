"""Everything that a report tells, read from a run folder once: reports, model cards and figures share it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from pairtune.report.words import p_value
from pairtune.runs import RunFolder

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


@dataclass
class Trial:
    """One trial: its `trial.json`, and the training steps of its `metrics.jsonl`."""

    record: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)

    name = property(lambda self: self.record["name"])
    epochs = property(lambda self: self.record["epochs"])
    best_epoch = property(lambda self: self.record["best_epoch"])

    @property
    def label(self) -> str:
        """Its settings as a person reads them: `lr 3e-05, beta 0.1`."""
        varied = [f"{name.replace('_', ' ')} {self.record['config'][name]}" for name in self.record["config"]["varied"]]
        return ", ".join([f"lr {self.record['learning_rate']:g}", f"beta {self.record['beta']:g}", *varied])


@dataclass
class Gathered:
    """A finished run, or one whose report is being written."""

    run: RunFolder

    @cached_property
    def config(self) -> dict[str, Any]:
        """The settings of the run."""
        settings: dict[str, Any] = yaml.safe_load(self.run.config.read_text(encoding="utf-8"))
        return settings

    data = cached_property(lambda self: self.run.read_json(self.run.data))
    selection = cached_property(lambda self: self.run.read_json(self.run.selection))
    environment = cached_property(lambda self: self.run.read_json(self.run.environment))
    audit = cached_property(lambda self: self._or_none(self.run.audit))
    sweep = cached_property(lambda self: self.run.read_json(self.run.sweep))
    test = cached_property(lambda self: self._or_none(self.run.test))
    generations = cached_property(lambda self: self._or_none(self.run.generations))

    def _or_none(self, path: Path) -> Any:
        return self.run.read_json(path) if path.is_file() else None

    @cached_property
    def trials(self) -> list[Trial]:
        """In the order of the grid."""
        trials = []
        for entry in self.sweep["trials"]:
            folder = self.run.trial(entry["name"])
            lines = folder.metrics.read_text(encoding="utf-8").splitlines() if folder.metrics.is_file() else []
            rows = [json.loads(line) for line in lines]
            trials.append(Trial(self.run.read_json(folder.record), [row for row in rows if "eval_loss" not in row]))
        return trials

    @property
    def winner(self) -> Trial:
        """The chosen trial."""
        return next(trial for trial in self.trials if trial.name == self.selection["winner"])

    @property
    def name(self) -> str:
        """The run folder's own name."""
        return self.run.root.resolve().name

    @property
    def base_name(self) -> str:
        """The base model as people know it."""
        base = self.environment["base"]
        return str(base["hub_id"] or Path(base["name"]).name)

    @cached_property
    def lengths(self) -> dict[str, dict[str, float]]:
        """Tokens of the training pairs' parts, median and 95th percentile; how often the longer answer is chosen."""
        table = pq.read_table(self.run.pairs, filters=[("split", "==", "train")])
        parts = {name: table[f"tokens/{name}"].to_numpy() for name in ("prompt", "chosen", "rejected")}
        summary = {
            name: {"median": float(np.median(values)), "p95": float(np.percentile(values, 95))}
            for name, values in parts.items()
        }
        longer = (parts["chosen"] > parts["rejected"]) + (parts["chosen"] == parts["rejected"]) / 2
        return summary | {"longer_wins": {"share": float(longer.mean())}}

    @cached_property
    def cost(self) -> dict[str, float]:
        """Seconds from the start to now or to the end, seconds of training, memory and an estimate of energy."""
        records = [trial.record for trial in self.trials]
        training = sum(record["own_seconds"] for record in records)
        started = datetime.fromisoformat(self.environment["started"])
        ended = self.run.complete.read_text().strip() if self.run.complete.is_file() else None
        seconds = ((datetime.fromisoformat(ended) if ended else datetime.now(started.tzinfo)) - started).total_seconds()
        return {
            "training_seconds": training,
            "seconds": max(seconds, training),
            "peak_memory_mb": max(record["peak_memory_mb"] for record in records),
            "watt_hours": training / 3600 * WATTS,
        }

    @property
    def headline(self) -> list[str]:
        """The run in three sentences: what was tried, what won and how sure that is, what the test said."""
        pairs = self.data["splits"]
        selection, trials = self.selection, len(self.trials)
        said = [
            f"{trials} trial{'s' if trials > 1 else ''} of tuning {self.base_name} on {pairs['train']['pairs']:,} "
            f"preference pairs ({self.config['method']}, loss {self.config['loss']}).",
            f"Winner by {selection['metric']}: {self.winner.label}, epoch {selection['best_epoch']} "
            f"({selection['value']:.4f}); {selection['verdict']}.",
        ]
        if self.test:
            low, high = self.test["intervals"]["eval_rewards/accuracies"]
            against = self.test["against_base"]
            moved = f"that it moved the right way from the base is {'shown' if against['better'] else 'not shown'}"
            said.append(
                f"On {self.test['pairs']} test pairs that had no part in the choice it prefers the better answer in "
                f"{self.test['metrics']['eval_rewards/accuracies']:.0%} of cases (95 % interval {low:.0%} to "
                f"{high:.0%}); {moved} ({p_value(against['p'])})."
            )
        return said

    @property
    def answers(self) -> list[dict[str, Any]]:
        """What base and winner answered, prompt by prompt."""
        if not self.generations:
            return []
        models = self.generations["models"]
        rows = zip(
            self.generations["prompts"],
            models["base"]["answers"],
            models[self.selection["winner"]]["answers"],
            strict=True,
        )
        return [
            {"prompt": prompt[-1]["content"], "turns": len(prompt), "base": base, "tuned": tuned}
            for prompt, base, tuned in rows
        ]

    @property
    def rounding(self) -> str:
        """What the machine does to a pair's margin, in one sentence; empty where it was not measured."""
        found = self.sweep.get("rounding")
        if not found:
            return ""
        wide = found["from_float32"]
        said = f"{wide:.2g} nats from float32" if wide is not None else "an amount from float32 that was not measured"
        rows = (
            f"{found['between_rows']:.2g} nats from row to row" if found["between_rows"] else "nothing from row to row"
        )
        return (
            f"Rounding in {found['dtype']} on this machine moves a pair's margin, before beta, by {said} and by {rows} "
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
