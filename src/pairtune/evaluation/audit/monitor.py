"""The audit while trials run: a sink that reports a finding as soon as a rule makes it."""

from __future__ import annotations

from collections.abc import Callable

from pairtune.config import TrialConfig
from pairtune.evaluation.audit.check import find_live
from pairtune.evaluation.audit.evidence import RUN_FOLDER, Evidence, TrialLog
from pairtune.evaluation.audit.own_runs import add_lines
from pairtune.run.folder import Run
from pairtune.run.metrics import Evaluation, TrainingStep
from pairtune.run.records import Finding
from pairtune.track.sinks import Sink


class LiveAudit(Sink):
    """Checks the live rules after every evaluation; each reports at most once per trial.

    Args:
        run: its metrics are read back when a trial is resumed, so the sink that writes them must come before this one.
        trial: returns a trial's settings by its name.
        say: called with each finding.
    """

    def __init__(self, run: Run, trial: Callable[[str], TrialConfig], say: Callable[[Finding], None]) -> None:
        self._run, self._trial, self._say = run, trial, say
        self._logs: dict[str, TrialLog] = {}
        self._said: set[tuple[str, str]] = set()

    def start(self, trial: str, total_steps: int, steps: int, lines: int) -> None:
        config = self._trial(trial)
        log = TrialLog(trial, config.learning_rate, config.beta, config.loss, max_grad_norm=config.max_grad_norm)
        written = self._run.log(trial)
        add_lines(log, [*written.steps, *written.evaluations])
        self._logs[trial] = log

    def log(self, trial: str, line: TrainingStep | Evaluation) -> None:
        log = self._logs[trial]
        add_lines(log, [line])
        if not isinstance(line, Evaluation):
            return
        for finding in find_live(Evidence(self._run.root, RUN_FOLDER, [log])):
            if (trial, finding.rule) not in self._said:
                self._said.add((trial, finding.rule))
                self._say(finding)
