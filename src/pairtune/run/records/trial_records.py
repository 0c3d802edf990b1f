"""trial.json and sweep.json: how the trials ended."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, computed_field

from pairtune.config import TrialConfig
from pairtune.run.metrics import Evaluation
from pairtune.run.records.base import Part, Record

TrialStatus = Literal["finished", "failed", "pruned"]

# An evaluation or None, which is `{}` in the file.
_OptionalEvaluation = Annotated[
    Evaluation | None,
    BeforeValidator(lambda value: value or None),
    PlainSerializer(lambda value: value.metrics() if value else {}),
]
_Seconds = Annotated[float, PlainSerializer(lambda value: round(value, 3))]


class TrialRecord(Record):
    """One trial: its settings, its evaluations and its cost. Engines fill it in while they train.

    Attributes:
        status: how the trial ended; `reason` explains it if the trial did not finish.
        epochs: one evaluation per epoch.
        judged: for each evaluation, its position in the order in which the search judged the run's evaluations, so that
            a resumed search decides as it would have. Empty if the search judged none.
        best_epoch: the epoch whose weights are in the trial's `best/`.
        base_fingerprint: fingerprint of the weights that the trial started from.
        best_fingerprint: fingerprint of the weight files in the trial's `best/`.
        train_seconds: time in training steps, without loading, evaluation and saving.
        own_seconds: this trial's share of that time; a second with four trials is a quarter of a second for each.
        train_pairs: number of pairs seen in all steps together.
        side_by_side: number of trials trained together, sharing `train_seconds`, when this one began.
        steps_without_gradient: steps whose gradient was exactly 0, so that they changed nothing.
        peak_memory_mb: on an accelerator, of this trial's tensors; on a CPU, the process's peak resident memory.
    """

    model_config = ConfigDict(frozen=False, extra="ignore", populate_by_name=True)
    file = "trial.json"

    trial: TrialConfig = Field(alias="config")
    status: TrialStatus = "finished"
    reason: str = ""
    epochs: list[Evaluation] = []
    judged: list[int] = []
    best_epoch: int | None = None
    base_fingerprint: str = ""
    best_fingerprint: str = ""
    steps_without_gradient: int = 0
    train_seconds: _Seconds = 0.0
    own_seconds: float = 0.0
    train_pairs: int = 0
    side_by_side: int = 1
    peak_memory_mb: int = 0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def name(self) -> str:
        """The trial's name, which is also its folder's."""
        return self.trial.name

    @computed_field  # type: ignore[prop-decorator]
    @property
    def learning_rate(self) -> float:
        """The trial's peak learning rate."""
        return self.trial.learning_rate

    @computed_field  # type: ignore[prop-decorator]
    @property
    def beta(self) -> float:
        """The trial's beta."""
        return self.trial.beta

    @computed_field  # type: ignore[prop-decorator]
    @property
    def train_pairs_per_second(self) -> float:
        """Training speed, with the time shared by all trials trained together."""
        return round(self.train_pairs / self.train_seconds, 4) if self.train_seconds else 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def metrics(self) -> _OptionalEvaluation:
        """The evaluation of the best epoch; None for a trial that was never evaluated."""
        return next((each for each in self.epochs if each.epoch == self.best_epoch), None)

    @property
    def best(self) -> Evaluation:
        """The evaluation of the best epoch.

        Raises:
            LookupError: the trial was never evaluated.
        """
        if self.metrics is None:
            raise LookupError(f"trial {self.name} has no evaluation")
        return self.metrics

    def summary(self) -> TrialSummary:
        """The trial's entry in `sweep.json`."""
        return TrialSummary.model_validate(self.model_dump(by_alias=True))


class TrialSummary(Part):
    """A trial in `sweep.json`: its best epoch and its cost."""

    name: str
    learning_rate: float
    beta: float
    status: TrialStatus
    reason: str = ""
    best_epoch: int | None = None
    train_seconds: _Seconds = 0.0
    train_pairs_per_second: float = 0.0
    peak_memory_mb: int = 0
    metrics: _OptionalEvaluation = None


class Rounding(Part):
    """The rounding error of the difference of a pair's two log-probs, in nats, as root mean square over some pairs.

    Attributes:
        pairs: number of pairs measured.
        dtype: dtype of the base model.
        between_rows: difference between a pair in a row of its own, and in a row with other pairs and trials; where
            products are not exact, at least the distance of neighbouring float32 numbers.
        from_float32: difference from float32; None if not measured.
    """

    pairs: int
    dtype: str
    between_rows: float
    from_float32: float | None = None


class SweepRecord(Record):
    """Every trial of the run so far, and how much of a pair's margin is rounding error."""

    file = "sweep.json"

    trials: list[TrialSummary]
    rounding: Rounding | None = None
