"""Which trials run, in which order, and which of them are stopped early."""

from __future__ import annotations

from collections.abc import Iterable

from pairtune.config import RunConfig, TrialConfig
from pairtune.run.records import TrialRecord


class Search:
    """Grid search: every combination, without pruning. `sweep.optuna_search` has the other searches, and pruning.

    Attributes:
        trials: the trials proposed so far.
        count: number of trials in all.
    """

    def __init__(self, config: RunConfig) -> None:
        self.trials: list[TrialConfig] = []
        self.count = len(config.trials())
        self._next = config.trials()

    def trial(self, name: str) -> TrialConfig:
        """One of the trials proposed so far."""
        return next(trial for trial in self.trials if trial.name == name)

    def ask(self) -> list[TrialConfig]:
        """The next trials; empty when the search is over."""
        batch, self._next = self._next, []
        self.trials += batch
        return batch

    def tell(self, results: Iterable[TrialRecord]) -> None:
        """Report the results of a batch of trials."""

    def hopeless(self, result: TrialRecord) -> bool:
        """Whether a trial that has just been evaluated should stop."""
        return False

    def replay(self, results: Iterable[TrialRecord]) -> None:
        """Repeat the judgements made before the run was interrupted, in the same order and without acting on them."""


def open_search(config: RunConfig) -> Search:
    """The search that a run is configured with; all but a plain grid need Optuna (the extra `search`)."""
    if config.search == "grid" and not config.prune:
        return Search(config)
    from pairtune.sweep.optuna_search import OptunaSearch

    return OptunaSearch(config)
