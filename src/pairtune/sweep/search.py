"""Which trials are run, in which order, and which of them are stopped early."""

from __future__ import annotations

from collections.abc import Iterable

from pairtune.config import RunConfig, TrialConfig
from pairtune.run.records import TrialRecord


class Search:
    """The grid: every combination, each to its end. `sweep.optuna_search` has searches that learn, and pruning.

    Attributes:
        trials: proposed so far.
        count: how many there will be.
    """

    def __init__(self, config: RunConfig) -> None:
        self.trials: list[TrialConfig] = []
        self.count = len(config.trials())
        self._next = config.trials()

    def trial(self, name: str) -> TrialConfig:
        """One of the trials proposed so far."""
        return next(trial for trial in self.trials if trial.name == name)

    def ask(self) -> list[TrialConfig]:
        """The next trials; none: the search is over."""
        batch, self._next = self._next, []
        self.trials += batch
        return batch

    def tell(self, results: Iterable[TrialRecord]) -> None:
        """What became of the trials of a batch."""

    def hopeless(self, result: TrialRecord) -> bool:
        """Whether a trial that has just been evaluated should stop."""
        return False

    def replay(self, results: Iterable[TrialRecord]) -> None:
        """Judge again what was judged before the run was interrupted, in the same order, and with no consequence."""


def open_search(config: RunConfig) -> Search:
    """The search that a run asks for.

    Raises:
        BadInput: it needs Optuna, which is not installed.
    """
    if config.search == "grid" and not config.prune:
        return Search(config)
    from pairtune.extras import require

    require("search", "--prune" if config.prune else f"--search {config.search}")
    from pairtune.sweep.optuna_search import OptunaSearch

    return OptunaSearch(config)
