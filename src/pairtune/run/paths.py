"""The paths of all files in a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """Paths inside one run folder; docs/architecture.md describes each file."""

    root: Path

    config = property(lambda self: self.root / "config.yaml")
    environment = property(lambda self: self.root / "environment.json")
    lineage = property(lambda self: self.root / "lineage.json")
    start = property(lambda self: self.root / "start")
    data = property(lambda self: self.root / "data.json")
    pairs = property(lambda self: self.root / "pairs.parquet")
    reference = property(lambda self: self.root / "reference")
    trials = property(lambda self: self.root / "trials")
    checkpoint = property(lambda self: self.root / "checkpoint.safetensors")
    nodes = property(lambda self: self.root / "nodes")
    sweep = property(lambda self: self.root / "sweep.json")
    choosing = property(lambda self: self.root / "choosing.json")
    selection = property(lambda self: self.root / "selection.json")
    test = property(lambda self: self.root / "test.json")
    test_examples = property(lambda self: self.root / "test.parquet")
    generations = property(lambda self: self.root / "generations.json")
    regressions = property(lambda self: self.root / "regressions.json")
    progress = property(lambda self: self.root / "progress.json")
    audit = property(lambda self: self.root / "audit.json")
    report = property(lambda self: self.root / "report.html")
    report_text = property(lambda self: self.root / "report.md")
    figures = property(lambda self: self.root / "figures")
    card = property(lambda self: self.root / "README.md")
    tensorboard = property(lambda self: self.root / "tensorboard")
    best = property(lambda self: self.root / "best")
    complete = property(lambda self: self.root / "COMPLETE")

    def trial(self, name: str) -> TrialPaths:
        """The folder of the trial called `name`."""
        return TrialPaths(self.trials / name)


@dataclass(frozen=True)
class TrialPaths:
    """Paths inside the folder of one trial."""

    root: Path

    record = property(lambda self: self.root / "trial.json")
    metrics = property(lambda self: self.root / "metrics.jsonl")
    best = property(lambda self: self.root / "best")
    failed = property(lambda self: self.root / "failed")

    def examples(self, epoch: int) -> Path:
        """The per-example records of one epoch's evaluation: Parquet, one row per pair."""
        return self.root / "evals" / f"epoch-{epoch}.parquet"
