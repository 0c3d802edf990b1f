"""Searches with Optuna: draws trials from the space that the given values span, and prunes trials.

Optuna's study is not stored: a resumed run replays it with the same seed and the recorded results, and gets the same
proposals.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState

from pairtune.config import RunConfig, TrialConfig
from pairtune.engine.summaries import score
from pairtune.run.records import TrialRecord
from pairtune.sweep.search import Search

# Batch size of the TPE sampler, which learns from one batch for the next.
_BATCH = 4
# How many duplicate proposals are tolerated in a batch.
_ATTEMPTS = 20


class OptunaSearch(Search):
    """Proposes trials in batches and prunes them while they run; see `Search`.

    Args:
        config: the run's configuration: `search`, `trial_count`, `prune`, and the given values.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # it would log every trial
        self._config = config
        self._space = {name: _distribution(values) for name, values in config.dimensions.items() if len(values) > 1}
        sampler = {"random": RandomSampler, "tpe": TPESampler, "grid": RandomSampler}[config.search]
        pruner = SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
        self._study = optuna.create_study(direction="maximize", sampler=sampler(seed=config.seed), pruner=pruner)
        self._asked: dict[str, optuna.Trial] = {}
        self._reported: dict[str, int] = {}
        self._judged = 0  # number of evaluations judged so far
        self.count = config.trial_count or len(config.trials())
        self._waiting: list[TrialConfig] = []
        if config.search != "tpe":  # these proposals do not depend on results
            self._waiting = self._propose(self.count)

    def ask(self) -> list[TrialConfig]:
        """See `Search`."""
        batch, self._waiting = self._waiting, []
        if not batch and self._config.search == "tpe":
            batch = self._propose(min(_BATCH, self.count - len(self.trials)))
        return batch

    def tell(self, results: Iterable[TrialRecord]) -> None:
        """See `Search`."""
        for result in results:
            self._report(result)
            asked = self._asked[result.trial.name]
            if result.status == "finished":
                self._study.tell(asked, score(result.best, self._config.select))
            else:
                self._study.tell(asked, state=TrialState.PRUNED if result.status == "pruned" else TrialState.FAIL)

    def hopeless(self, result: TrialRecord) -> bool:
        """Whether a trial that has just been evaluated should stop: asynchronous successive halving (ASHA, Li et al.
        2020). A trial continues past epochs 1, 2, 4, … only while it is in the better half of those that got there.
        """
        for number in range(self._reported.get(result.trial.name, 0), len(result.epochs)):
            result.judged[number:] = [self._judged]
            self._judged += 1
        self._report(result)
        return self._config.prune and self._asked[result.trial.name].should_prune()

    def replay(self, results: Iterable[TrialRecord]) -> None:
        """Repeat the judgements made before the run was interrupted, in the same order and without acting on them.

        A trial is compared with those judged before it, so the order matters.
        """
        rows = [
            (when, result, row) for result in results for when, row in zip(result.judged, result.epochs, strict=False)
        ]
        for when, result, row in sorted(rows, key=lambda each: each[0]):
            self._report(result, until=row.epoch)
            self._asked[result.trial.name].should_prune()
            self._judged = max(self._judged, when + 1)

    def _propose(self, count: int) -> list[TrialConfig]:
        known = {trial.name for trial in self.trials}
        batch: list[TrialConfig] = []
        points = [None] * (count + _ATTEMPTS) if self._config.search != "grid" else self._config.trials()
        for point in points:
            if len(batch) == count:
                break
            if point is not None:
                self._study.enqueue_trial({name: getattr(point, name) for name in self._space})
            asked = self._study.ask(self._space)
            trial = point or self._config.trial(**self._point(asked.params))
            if trial.name in known:
                self._study.tell(asked, state=TrialState.FAIL)
                continue
            known.add(trial.name)
            self._asked[trial.name] = asked
            batch.append(trial)
        if len(batch) < count:
            self.count = len(self.trials) + len(batch)  # a small space has no more points
        self.trials += batch
        return batch

    def _point(self, drawn: dict[str, Any]) -> dict[str, Any]:
        single = {name: values[0] for name, values in self._config.dimensions.items()}
        rounded = {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in drawn.items()}
        return single | rounded

    def _report(self, result: TrialRecord, until: int | None = None) -> None:
        name, end = result.trial.name, len(result.epochs) if until is None else until
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for row in result.epochs[self._reported.get(name, 0) : end]:
                self._asked[name].report(score(row, self._config.select), row.epoch)
        self._reported[name] = max(end, self._reported.get(name, 0))


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    """The search space spanned by the values of a setting: logarithmic if all are positive numbers."""
    if any(value is None or isinstance(value, bool | str) for value in values):
        return CategoricalDistribution(list(values))
    low, high = min(values), max(values)
    if all(isinstance(value, int) for value in values):
        return IntDistribution(low, high, log=low > 0)
    return FloatDistribution(low, high, log=low > 0 and math.isfinite(high))
