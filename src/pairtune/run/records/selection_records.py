"""selection.json and test.json: the selected trial, and its one evaluation on the test pairs."""

from __future__ import annotations

from typing import ClassVar, Literal

from pairtune.config import Select
from pairtune.run.metrics import Evaluation, EvaluationMetrics
from pairtune.run.records.base import Interval, Part, Record


class Share(Part):
    """A share or a mean over some pairs, with its interval; `value` is None if there are no such pairs."""

    value: float | None
    interval: Interval
    pairs: int


AccuracyOf = Literal["pairs", "prompts", "auc"]


class ExampleSummary(Part):
    """Statistics over an evaluation's pairs, besides the means of its metrics.

    Attributes:
        longer_wins: how often "the longer answer is the better one" is right; equal lengths count half. Of single
            answers, every desirable one is compared with every undesirable one.
        accuracy_longer_chosen: the model's accuracy on pairs whose chosen answer is longer.
        accuracy_shorter_chosen: the model's accuracy on pairs whose chosen answer is shorter.
        accuracy_of: what the accuracy counts: pairs; or two single answers of different kinds, to one prompt or to any
            (auc: the area under the ROC curve).
        kl: KL divergence from the base model in nats per token, if it was measured.
    """

    longer_wins: Share
    accuracy_longer_chosen: Share
    accuracy_shorter_chosen: Share
    accuracy_of: AccuracyOf = "pairs"
    kl: Share | None = None

    @property
    def noun(self) -> str:
        """What was evaluated."""
        return "pair" if self.accuracy_of == "pairs" else "answer"

    @property
    def compared(self) -> str:
        """Of what an accuracy is the share, as it is said after "of": pairs, or two answers of different kinds."""
        among = "" if self.accuracy_of == "auc" else " to the same prompt"
        return (
            "pairs" if self.accuracy_of == "pairs" else f"comparisons of a desirable with an undesirable answer{among}"
        )


class AgainstBase(Part):
    """Whether tuning moved the model in the right direction; the base's reward margin is 0 on every pair."""

    margin: float
    p: float
    better: bool


class Measured(Part):
    """Means over pairs with their intervals, under TRL's names."""

    metrics: EvaluationMetrics
    intervals: dict[str, Interval]

    def with_interval(self, metric: str) -> str:
        """A mean and its interval as text: `0.712 [0.650, 0.768]`."""
        low, high = self.intervals[metric]
        return f"{self.metrics.metric(metric):.3f} [{low:.3f}, {high:.3f}]"


class RankedTrial(Measured):
    """A trial's best epoch in the ranking."""

    name: str
    best_epoch: int
    metrics: Evaluation
    against_base: AgainstBase


class Comparison(Part):
    """The winner compared with one other trial, pair by pair.

    Attributes:
        name: the other trial.
        metric: the metric that is compared.
        difference: the winner's mean minus the other's.
        interval: the interval of the difference.
        p_corrected: p-value, Holm-corrected for the number of comparisons between any two trials.
        differs: whether `p_corrected` is below the significance level.
        pairs_needed: number of validation pairs that would settle it; None if no number would.
    """

    name: str
    metric: str
    difference: float
    interval: Interval
    p_corrected: float
    differs: bool
    pairs_needed: int | None = None


class Selection(Record):
    """The selection of the best trial and epoch.

    Attributes:
        rule: the rule that selected the best epoch of each trial and the best trial.
        metric: the metric that the rule uses.
        winner: name of the selected trial, with its `best_epoch` and the metric's `value` there.
        why: the reason for the selection, in words.
        verdict: whether the data supports it, in words.
        settled: whether the winner differs from every other trial.
        ranking: the finished trials, the winner first.
        examples: example statistics for each trial.
        best_fingerprint: fingerprint of the weight files in the run's `best/`.
    """

    file = "selection.json"

    rule: Select
    metric: str
    winner: str
    best_epoch: int
    value: float
    validation_pairs: int
    why: str
    verdict: str
    settled: bool = True
    warnings: list[str] = []
    ranking: list[RankedTrial]
    comparisons: list[Comparison] = []
    examples: dict[str, ExampleSummary] = {}
    best_fingerprint: str = ""

    @property
    def measured(self) -> ExampleSummary | None:
        """The winner's example statistics; None in runs from before they were recorded."""
        return self.examples.get(self.winner)

    @property
    def noun(self) -> str:
        """What was evaluated: pairs or answers."""
        return self.measured.noun if self.measured else "pair"


class TestRecord(Record, Measured):
    """The one evaluation on the test pairs, after the selection; `selection_sha256` is the hash of its record then."""

    __test__: ClassVar[bool] = False  # not a pytest test class
    file = "test.json"

    trial: str
    epoch: int
    selection_sha256: str
    pairs: int
    against_base: AgainstBase
    examples: ExampleSummary
