"""Experiment trackers: Weights & Biases, TensorBoard, MLflow. Each trial is one tracked run, all in one group.

Trackers never stop a run: the first exception of a tracker is reported, and the run continues without it. Metric names
are those of transformers' own integrations (`train/loss`, `eval/rewards/margins`), so that dashboards carry over. Keys
and logins are left to the trackers; nothing here reads or writes them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from pairtune.config import Track, TrialConfig
from pairtune.errors import one_line
from pairtune.extras import require
from pairtune.files import fingerprint
from pairtune.run.folder import Run
from pairtune.run.metrics import Evaluation, TrainingStep
from pairtune.run.records import Selection
from pairtune.track.sinks import Sink

_PROJECT = "pairtune"
_WANDB_WAITS = 30  # timeout in seconds, in case there is no network


class Tracker(Protocol):
    """One tracker, for all trials of a run."""

    def open(self, trial: TrialConfig, steps: int) -> None:
        """A trial starts, or resumes after this many steps."""

    def log(self, trial: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one step or evaluation."""

    def close(self, trial: str, summary: Mapping[str, Any]) -> None:
        """A trial has ended."""

    def conclude(self, run: Run, summary: Mapping[str, Any], report: str) -> None:
        """The run has ended, and its report is written."""


def check_trackers(names: Sequence[Track]) -> None:
    """Raise BadInput if a tracker's package is missing, before anything is trained."""
    for name in names:
        require(name, f"--track {name}")


Say = Callable[[str], None]


def open_tracker(name: Track, run: Run, say: Say) -> Tracker:
    """The tracker called `name`."""
    if name == "wandb":
        return WandbTracker(run, say)
    return TensorboardTracker(run) if name == "tensorboard" else MlflowTracker(run)


class TrackerSink(Sink):
    """A tracker as a sink.

    Args:
        name: name of the tracker.
        run: the run to track.
        trial: returns a trial's settings by name.
        say: called once, if the tracker fails.
    """

    def __init__(self, name: Track, run: Run, trial: Callable[[str], TrialConfig], say: Say) -> None:
        self._name, self._trial, self._say = name, trial, say
        self._tracker: Tracker | None = None
        self._losses: dict[tuple[str, int], float] = {}
        self._open: set[str] = set()
        with self._tolerating():
            self._tracker = open_tracker(name, run, say)

    def start(self, trial: str, total_steps: int, steps: int, lines: int) -> None:
        self._open.add(trial)
        with self._tolerating() as tracker:
            tracker.open(self._trial(trial), steps)

    def log(self, trial: str, line: TrainingStep | Evaluation) -> None:
        if isinstance(line, Evaluation):
            self._losses[trial, line.epoch] = line.eval_loss
        with self._tolerating() as tracker:
            tracker.log(trial, line.step, tracked_names(line))

    def finish(self, trial: str, status: str, best_epoch: int | None) -> None:
        self._open.discard(trial)
        summary: dict[str, Any] = {"status": status}
        if best_epoch is not None:
            summary["best_epoch"] = best_epoch
        if (trial, best_epoch) in self._losses:  # otherwise an earlier call evaluated it
            summary["best_eval_loss"] = self._losses[trial, best_epoch or 0]
        with self._tolerating() as tracker:
            tracker.close(trial, summary)

    def interrupt(self) -> None:
        """Close the open trials of an interrupted run, so that all logged metrics are written."""
        for trial in sorted(self._open):
            self.finish(trial, "interrupted", None)

    def conclude(self, run: Run, selection: Selection, report: str) -> None:
        """Send the choice and the report, as HTML."""
        shown = selection.model_dump(include={"winner", "best_epoch", "metric", "value", "verdict"})
        with self._tolerating() as tracker:
            tracker.conclude(run, shown, report)

    @contextmanager
    def _tolerating(self) -> Iterator[Any]:
        """Yield the tracker; an exception ends the tracking, and nothing else."""
        try:
            yield self._tracker or _Silent()
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, training continues
            self._tracker = None
            self._say(f"{self._name}: {one_line(error, 160)}; the run continues without it, all is in metrics.jsonl")


class _Silent:
    """Stands in for a tracker that has failed."""

    def _nothing(self, *_: object) -> None:
        pass

    open = log = close = conclude = _nothing


def tracked_names(line: TrainingStep | Evaluation) -> dict[str, float]:
    """A record's metrics under the names of transformers' integrations: `train/…` and `eval/…`."""
    named = {}
    for name, value in line.metrics().items():
        part = "eval/" + name.removeprefix("eval_") if name.startswith("eval_") else f"train/{name}"
        if name == "loss" and isinstance(line, Evaluation):
            part = "train/epoch_loss"
        if name != "step":
            named[part] = float(value)
    return named | {"train/global_step": float(line.step)}


class WandbTracker:
    """Weights & Biases.

    With `WANDB_MODE=offline`, or if the service cannot be reached at the start, everything is logged for `wandb sync`;
    once a run is open, W&B's own process retries.
    """

    def __init__(self, run: Run, say: Say) -> None:
        import wandb

        self._wandb, self._root, self._say = wandb, run.root.resolve(), say
        self._started = run.environment.started if run.environment else ""
        self._mode: Any = None  # W&B takes it from the environment
        self._runs: dict[str, Any] = {}

    def open(self, trial: TrialConfig, steps: int) -> None:
        self._runs[trial.name] = self._init(trial.name, "trial", trial.model_dump(mode="json"))

    def log(self, trial: str, step: int, metrics: Mapping[str, float]) -> None:
        self._runs[trial].log(dict(metrics))

    def close(self, trial: str, summary: Mapping[str, Any]) -> None:
        tracked = self._runs.pop(trial)
        tracked.summary.update(dict(summary))
        tracked.finish()

    def conclude(self, run: Run, summary: Mapping[str, Any], report: str) -> None:
        tracked = self._init("result", "result", {})
        tracked.summary.update(dict(summary))
        tracked.log({"report": self._wandb.Html(report)})
        tracked.finish()

    def _init(self, name: str, kind: str, config: dict[str, Any]) -> Any:
        # The same trial of the same run has the same id, so that a resumed run continues it.
        settings: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", _PROJECT),
            "group": self._root.name,
            "name": name,
            "id": fingerprint([str(self._root), self._started, name]),
            "job_type": kind,
            "config": config,
            "resume": "allow",
            "reinit": "create_new",  # several trials are open at once
            "settings": self._wandb.Settings(init_timeout=_WANDB_WAITS, silent=True),
        }
        try:
            return self._wandb.init(mode=self._mode, **settings)
        except Exception as error:
            if self._mode == "offline":
                raise
            self._mode = "offline"
            self._say(f"wandb: {one_line(error, 160)}; tracking offline, upload with `wandb sync`")
            settings["id"] = fingerprint([settings["id"], "offline"])  # W&B's process still holds the first id
            return self._wandb.init(mode=self._mode, **settings)


class TensorboardTracker:
    """Event files in the run folder's `tensorboard/`, one folder per trial."""

    def __init__(self, run: Run) -> None:
        self._folder = run.paths.tensorboard
        self._writers: dict[str, Any] = {}

    def open(self, trial: TrialConfig, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writers[trial.name] = SummaryWriter(str(self._folder / trial.name), purge_step=steps + 1)
        self._writers[trial.name].add_text("config", trial.model_dump_json(indent=2))

    def log(self, trial: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writers[trial].add_scalar(name, value, step)

    def close(self, trial: str, summary: Mapping[str, Any]) -> None:
        writer = self._writers.pop(trial)
        writer.add_text("summary", str(dict(summary)))
        writer.close()

    def conclude(self, run: Run, summary: Mapping[str, Any], report: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self._folder / "result"))
        writer.add_text("result", str(dict(summary)))
        writer.add_text("report", run.paths.report_text.read_text(encoding="utf-8"))
        writer.close()


class MlflowTracker:
    """MLflow, at `MLFLOW_TRACKING_URI` or its default location; a run's trials are children of one parent run."""

    def __init__(self, run: Run) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(name)
        self._experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._parent = self._client.create_run(self._experiment, run_name=run.root.resolve().name).info.run_id
        self._runs: dict[str, str] = {}

    def open(self, trial: TrialConfig, steps: int) -> None:
        tags = {"mlflow.parentRunId": self._parent}
        self._runs[trial.name] = self._client.create_run(self._experiment, run_name=trial.name, tags=tags).info.run_id
        for name, value in trial.model_dump(mode="json").items():
            self._client.log_param(self._runs[trial.name], name, value)

    def log(self, trial: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._client.log_metric(self._runs[trial], name, value, step=step)

    def close(self, trial: str, summary: Mapping[str, Any]) -> None:
        tracked = self._runs.pop(trial)
        for name, value in summary.items():
            self._client.set_tag(tracked, name, value)
        status = {"finished": "FINISHED", "pruned": "KILLED", "interrupted": "KILLED"}
        self._client.set_terminated(tracked, status.get(summary["status"], "FAILED"))

    def conclude(self, run: Run, summary: Mapping[str, Any], report: str) -> None:
        for name, value in summary.items():
            self._client.set_tag(self._parent, name, value)
        self._client.log_text(self._parent, report, run.paths.report.name)
        self._client.set_terminated(self._parent)
