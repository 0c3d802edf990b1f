"""How much time a run has left, and a sink that writes it into the run folder."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

import psutil

from pairtune.run.folder import Run
from pairtune.run.metrics import Evaluation, TrainingStep
from pairtune.run.records import Progress
from pairtune.track.sinks import Sink

# What comes after training (test pairs, answers, report), as a share of the training; `--samples` aims at a tenth.
_AFTERWARDS = 0.12
# A pass forward without one backward takes about a third of a step.
_FORWARD = 1 / 3
_WRITE_SECONDS = 1.0
_EXPECTED = 0.05


class TimeLeft(Sink):
    """Estimates the time left from the speed of steps and evaluations so far, each counted for itself.

    A trial's first step, which waits for the preparation of its group, does not count.

    Args:
        trials: number of steps of each trial known so far, by name.
        epochs: number of evaluations of each of these trials.
        count: number of trials in all; those not known yet are taken to be like the mean of the others.
        evaluation_steps: how many steps see as many pairs as an evaluation.
        usual_epochs: number of evaluations of trials that are not known yet.
        expected: seconds of a step and of an evaluation as they were estimated beforehand, or None.
    """

    def __init__(
        self,
        trials: Mapping[str, int],
        epochs: Mapping[str, int],
        count: int,
        evaluation_steps: float,
        usual_epochs: int = 1,
        expected: tuple[float, float] | None = None,
    ) -> None:
        self._expected = expected
        self._steps_left = {name: float(steps) for name, steps in trials.items()}
        self._totals, self._epochs = dict(trials), dict(epochs)
        self._evaluations_left = {name: float(number) for name, number in epochs.items()}
        self._count, self._evaluation_steps, self._usual_epochs = count, evaluation_steps, usual_epochs
        self._partly = 0.0  # evaluations that are under way, as a number of whole ones
        self._fresh: set[str] = set()  # trials whose first step has not been made
        self._spent = {"step": 0.0, "evaluation": 0.0, "other": 0.0}
        self._units = {"step": 0, "evaluation": 0}
        self._began = self._last = time.monotonic()

    def start(self, trial: str, total_steps: int, steps: int, lines: int) -> None:
        self._spend("other")
        self._totals[trial] = total_steps
        self._epochs.setdefault(trial, self._usual_epochs)
        self._steps_left[trial] = float(total_steps - steps)
        self._evaluations_left[trial] = self._epochs[trial] * (1 - steps / max(1, total_steps))
        self._fresh.add(trial)

    def log(self, trial: str, line: TrainingStep | Evaluation) -> None:
        if isinstance(line, Evaluation):
            self._spend("evaluation")
            self._units["evaluation"] += 1
            self._evaluations_left[trial] = float(max(0, self._epochs[trial] - line.epoch))
            self._partly = 0.0
        elif trial in self._fresh:
            self._spend("other")
            self._fresh.discard(trial)
        else:
            self._spend("step")
            self._units["step"] += 1
        if not isinstance(line, Evaluation):
            self._steps_left[trial] = float(self._totals[trial] - line.step)

    def on_progress(self, trials: Sequence[str], what: str, done: int, total: int) -> None:
        evaluating = what == "evaluating"
        self._spend("evaluation" if evaluating else "other")
        self._partly = len(trials) * done / max(1, total) if evaluating else 0.0

    def finish(self, trial: str, status: str, best_epoch: int | None) -> None:
        self._steps_left[trial] = self._evaluations_left[trial] = 0.0

    def seconds(self) -> float | None:
        """The time left; None until a few steps have been made, if nothing was estimated beforehand."""
        steps, evaluations = self._units["step"], self._units["evaluation"]
        if not steps and not self._expected:
            return None
        step, evaluation = self._spent["step"], self._spent["evaluation"]
        if self._expected:
            # The first steps of a run are not typical, so the estimate counts as much as a twentieth of all steps.
            weight = max(1.0, _EXPECTED * sum(self._totals.values()))
            step = (step + weight * self._expected[0]) / (steps + weight)
            evaluation = (evaluation + self._expected[1]) / (evaluations + 1)
        else:
            step /= steps
            evaluation = evaluation / evaluations if evaluations else step * self._evaluation_steps * _FORWARD
        training = step * self._all(self._steps_left) + evaluation * max(
            0.0, self._all(self._evaluations_left) - self._partly
        )
        return training + _AFTERWARDS * (training + self._spent["step"] + self._spent["evaluation"])

    def elapsed(self) -> float:
        """Seconds since this began."""
        return time.monotonic() - self._began

    def _all(self, left: Mapping[str, float]) -> float:
        """What is left of all trials, those that are not known yet included."""
        unknown = max(0, self._count - len(left))
        whole = self._totals if left is self._steps_left else self._epochs
        return sum(left.values()) + unknown * sum(whole.values()) / max(1, len(whole))

    def _spend(self, what: str) -> None:
        now = time.monotonic()
        self._spent[what] += now - self._last
        self._last = now


class ProgressSink(Sink):
    """Writes `progress.json`, at most once a second, so that a page can follow a run that it did not start.

    Args:
        run: the run.
        left: the estimate; it must receive events before this sink does.
    """

    def __init__(self, run: Run, left: TimeLeft) -> None:
        self._run, self._left = run, left
        self._born = psutil.Process().create_time()
        self._written = 0.0
        self._ends: float | None = None  # when the stages after training should be over, by the clock of `monotonic`

    def start(self, trial: str, total_steps: int, steps: int, lines: int) -> None:
        self._write(f"preparing {trial}")

    def log(self, trial: str, line: TrainingStep | Evaluation) -> None:
        self._write("training")

    def on_progress(self, trials: Sequence[str], what: str, done: int, total: int) -> None:
        self._write(f"{what}: {done:,} of {total:,}")

    def stage(self, what: str) -> None:
        """A stage after the training begins or goes on."""
        if self._ends is None:
            self._ends = time.monotonic() + (self._left.seconds() or 0.0)
        self._write(what, now=True)

    def _write(self, stage: str, *, now: bool = False) -> None:
        if not now and time.monotonic() - self._written < _WRITE_SECONDS:
            return
        self._written = time.monotonic()
        left = self._left.seconds() if self._ends is None else max(0.0, self._ends - time.monotonic())
        done = 0.0 if left is None else self._left.elapsed() / max(1e-9, self._left.elapsed() + left)
        self._run.write(
            Progress(
                stage=stage,
                done=min(1.0, done),
                seconds_left=left,
                updated=time.time(),
                pid=os.getpid(),
                born=self._born,
            )
        )


def forget_process(run: Run) -> None:
    """Record that no process works on a run any more, so that a page need not wait to see that."""
    if progress := run.progress:
        run.write(progress.model_copy(update={"stage": "stopped", "seconds_left": None, "pid": 0, "born": 0.0}))
