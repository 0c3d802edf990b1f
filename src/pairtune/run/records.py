"""The records of a run folder: what every stage leaves for the next one, typed and checked.

A `Record` is the content of one JSON file; its parts are `Part`s. Files carry the number of their format; files of
earlier formats are brought up to date when they are read (`pairtune.run.schema`).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, computed_field

from pairtune.config import Select, TrialConfig
from pairtune.conversation import Message
from pairtune.run.metrics import Evaluation, EvaluationMetrics

# A 95 % interval: low, high.
Interval = tuple[float, float]

TrialStatus = Literal["finished", "failed", "pruned"]
Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


class Part(BaseModel):
    """A part of a record."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Record(Part):
    """The content of one JSON file of a run folder."""

    file: ClassVar[str]


# An evaluation, where there was one; `{}` in the file stands for none.
_PerhapsEvaluation = Annotated[
    Evaluation | None,
    BeforeValidator(lambda value: value or None),
    PlainSerializer(lambda value: value.metrics() if value else {}),
]
_Seconds = Annotated[float, PlainSerializer(lambda value: round(value, 3))]


# environment.json ----------------------------------------------------------------------------------------------------


class Machine(Part):
    """What a machine is.

    Attributes:
        system: operating system and architecture.
        processor: by name.
        instructions: sets of them that decide which kernels are taken; empty where the system does not say.
        cores: that a process may use, a container's share counted.
        memory_gb: in all, or what a container may have of it.
        memory_free_gb: of that, when it was looked at; None: not on record.
        limits: settings of the environment that change what it computes, or how fast.
        device: the accelerator's name, or "cpu".
    """

    system: str = ""
    processor: str
    instructions: list[str] = []
    cores: float
    memory_gb: float
    memory_free_gb: float | None = None
    limits: dict[str, str] = {}
    device: str = "cpu"


class BaseModelRecord(Part):
    """The model that a run started from, under the name that the person typed and, where it has one, the Hub's."""

    name: str
    hub_id: str | None = None
    license: str | None = None


class KernelChoice(Part):
    """How products of one type are computed on a machine, and what was found out about them; see `engine.kernels`.

    Attributes:
        tile: rows of a tile; None: products are not cut.
        least: rows that a product has at least.
        by_trial: whether batched products are computed trial by trial.
        exact: whether a row's bits do not depend on the other rows.
        differing: numbers of rows whose products have other bits than those of many rows.
        bits: a fingerprint of what the chosen products give.
        seconds: that finding out took.
    """

    tile: int | None = None
    least: int = 1
    by_trial: bool = False
    exact: bool = False
    differing: list[int] = []
    bits: str
    seconds: float = 0.0


class MachineChoices(Part):
    """What was chosen for a run on its machine: what goes on with the run uses it again.

    Attributes:
        dtype: of the base's weights, or of products under full training; None: not on record.
        threads: of PyTorch on a CPU.
        side_by_side: trials that were trained at once.
        kernels: by dtype.
    """

    dtype: str | None = None
    threads: int | None = None
    side_by_side: int | None = None
    kernels: dict[str, KernelChoice] = {}


class Environment(Record):
    """What a run was made with."""

    file = "environment.json"

    started: str
    versions: dict[str, str]
    machine: Machine
    base: BaseModelRecord
    choices: MachineChoices = MachineChoices()


# data.json -----------------------------------------------------------------------------------------------------------


class SourceAccount(Part):
    """The account of one source and split: rows in = kept + dropped by reason, always.

    `shortened` counts kept pairs whose prompt lost its oldest turns.
    """

    source: str
    split: str
    rows_in: int
    kept: int
    dropped: dict[str, int]
    shortened: int = 0


class SplitRecord(Part):
    """How many pairs a split has, and a fingerprint of their content."""

    pairs: int
    fingerprint: str


class DecodedPair(Part):
    """A pair as the model sees it, special tokens included; the loss is on the answers alone."""

    origin: str
    prompt: str
    chosen: str
    rejected: str


class DataRecord(Record):
    """The account of every row read, and what the splits hold."""

    file = "data.json"

    sources: list[SourceAccount]
    formats: dict[str, str | None] = {}
    splits: dict[str, SplitRecord]
    max_length: int | None = None
    split_seed: int = 0
    template_warnings: list[str] = []
    example: DecodedPair | None = None


# trials/NAME/trial.json and sweep.json -------------------------------------------------------------------------------


class TrialRecord(Record):
    """One trial: its settings, its evaluations and what it cost. Engines fill it while they train.

    Attributes:
        status: how it ended, with the `reason` where it did not finish.
        epochs: one evaluation an epoch.
        judged: for each evaluation when the search judged it, among all evaluations of the run: a search that goes on
            judges as it would have. Empty where it was not judged.
        best_epoch: the epoch whose weights lie in the trial's `best/`.
        base_fingerprint: of the weights the trial started from.
        best_fingerprint: of the weight files in the trial's `best/`.
        train_seconds: time in training steps, without loading, evaluation and saving.
        own_seconds: of these, this trial's share: a second of four trials is a quarter of a second of each.
        train_pairs: seen in all steps together.
        side_by_side: how many trials were trained together, sharing `train_seconds`, when this one began.
        steps_without_gradient: steps whose gradient was exactly 0, so that they taught nothing.
        peak_memory_mb: on an accelerator of this trial's tensors; on a CPU the process's highest resident size.
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
        """The trial's name, which is that of its folder."""
        return self.trial.name

    @computed_field  # type: ignore[prop-decorator]
    @property
    def learning_rate(self) -> float:
        """Of the trial."""
        return self.trial.learning_rate

    @computed_field  # type: ignore[prop-decorator]
    @property
    def beta(self) -> float:
        """Of the trial."""
        return self.trial.beta

    @computed_field  # type: ignore[prop-decorator]
    @property
    def train_pairs_per_second(self) -> float:
        """Speed of training, of all trials beside this one together as well."""
        return round(self.train_pairs / self.train_seconds, 4) if self.train_seconds else 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def metrics(self) -> _PerhapsEvaluation:
        """The evaluation of the best epoch; None for a trial that never was evaluated."""
        return next((each for each in self.epochs if each.epoch == self.best_epoch), None)

    @property
    def best(self) -> Evaluation:
        """The evaluation of the best epoch.

        Raises:
            LookupError: the trial never was evaluated.
        """
        if self.metrics is None:
            raise LookupError(f"trial {self.name} has no evaluation")
        return self.metrics

    def summary(self) -> TrialSummary:
        """The trial's entry in `sweep.json`."""
        return TrialSummary.model_validate(self.model_dump(by_alias=True))


class TrialSummary(Part):
    """A trial in `sweep.json`: its best epoch and what it cost."""

    name: str
    learning_rate: float
    beta: float
    status: TrialStatus
    reason: str = ""
    best_epoch: int | None = None
    train_seconds: _Seconds = 0.0
    train_pairs_per_second: float = 0.0
    peak_memory_mb: int = 0
    metrics: _PerhapsEvaluation = None


class Rounding(Part):
    """What rounding does to the difference of a pair's two log-probs, in nats, root mean square over some pairs.

    Attributes:
        pairs: that were measured.
        dtype: of the base model.
        between_rows: by how much it differs between a row of its own and a row with others, and other trials.
        from_float32: by how much it differs from float32; None: not measured.
    """

    pairs: int
    dtype: str
    between_rows: float
    from_float32: float | None = None


class SweepRecord(Record):
    """Every trial of the run so far, and how much of a pair's margin is rounding."""

    file = "sweep.json"

    trials: list[TrialSummary]
    rounding: Rounding | None = None


# selection.json and test.json ----------------------------------------------------------------------------------------


class Share(Part):
    """A share or a mean over some pairs, with its interval; `value` is None where there are no such pairs."""

    value: float | None
    interval: Interval
    pairs: int


class ExampleSummary(Part):
    """What an evaluation's pairs say besides the means of its metrics.

    Attributes:
        longer_wins: how often "the longer answer is the better one" is right; equal lengths count half.
        accuracy_longer_chosen: the model's accuracy on the pairs whose chosen answer is the longer one.
        accuracy_shorter_chosen: the same where it is the shorter one.
        kl: divergence from the base, nats per token, where it was measured.
    """

    longer_wins: Share
    accuracy_longer_chosen: Share
    accuracy_shorter_chosen: Share
    kl: Share | None = None


class AgainstBase(Part):
    """Whether tuning moved the model the right way: the base's reward margin is 0 on every pair, by definition."""

    margin: float
    p: float
    better: bool


class Measured(Part):
    """Means over pairs with their intervals, by TRL's names."""

    metrics: EvaluationMetrics
    intervals: dict[str, Interval]

    def with_interval(self, metric: str) -> str:
        """A mean and its interval for people: `0.712 [0.650, 0.768]`."""
        low, high = self.intervals[metric]
        return f"{self.metrics.metric(metric):.3f} [{low:.3f}, {high:.3f}]"


class RankedTrial(Measured):
    """A trial's best epoch in the ranking."""

    name: str
    best_epoch: int
    metrics: Evaluation
    against_base: AgainstBase


class Comparison(Part):
    """The winner against one other trial, pair by pair.

    Attributes:
        name: of the other trial.
        metric: that is compared.
        difference: the winner's mean minus the other's.
        interval: of the difference.
        p_corrected: p-value, corrected for the number of comparisons of any two trials (Holm).
        differs: whether it is below the level.
        pairs_needed: validation pairs that would settle it; None: no number would.
    """

    name: str
    metric: str
    difference: float
    interval: Interval
    p_corrected: float
    differs: bool
    pairs_needed: int | None = None


class Selection(Record):
    """The choice.

    Attributes:
        rule: by which the best epoch of each trial and the best trial were picked.
        metric: that the rule looks at.
        winner: name of the chosen trial, with its `best_epoch` and the metric's `value` there.
        why: the choice in words.
        verdict: whether the data supports it, in words.
        settled: whether the winner differs from every other trial.
        ranking: the finished trials, the winner first.
        examples: by trial.
        best_fingerprint: of the weight files in the run's `best/`.
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


class TestRecord(Record, Measured):
    """The one look at the test pairs, after the choice: `selection_sha256` is the hash of what was on record then."""

    __test__: ClassVar[bool] = False  # not a test of pytest's
    file = "test.json"

    trial: str
    epoch: int
    selection_sha256: str
    pairs: int
    against_base: AgainstBase
    examples: ExampleSummary


# generations.json ----------------------------------------------------------------------------------------------------


class Answer(Part):
    """One generated answer.

    Attributes:
        text: decoded, special tokens removed, outer white space stripped.
        tokens: how many tokens were generated, the end token not counted.
        ended: whether the model ended it itself (False: cut off at the token limit).
    """

    text: str
    tokens: int
    ended: bool


class AnswerSummary(Part):
    """What can be counted about answers; shares and means over answers.

    Attributes:
        median_tokens: of their lengths.
        ended_share: that ended by themselves within the token limit.
        empty_share: without a word.
        repeated_share: mean share of an answer's phrases that it has said before.
        distinct_1: different over all words of all answers together (distinct-n, Li et al. 2016).
        distinct_2: the same of pairs of words.
        refused_share: that begin as refusals do.
        other_language_share: in another language than the prompt.
    """

    median_tokens: float
    ended_share: float
    empty_share: float
    repeated_share: float
    distinct_1: float = 0.0
    distinct_2: float = 0.0
    refused_share: float = 0.0
    other_language_share: float = 0.0


class WinRate(Part):
    """The share of wins over the base, ties counted half.

    Attributes:
        rate: with its `interval`.
        length_controlled: the rate that is left when both answers have the same length, with its interval.
        scores: prompt by prompt, 1, a half or 0; empty where they are not kept.
    """

    rate: float
    interval: Interval
    wins: int
    ties: int
    losses: int
    length_controlled: float
    length_controlled_interval: Interval
    scores: list[float] = []


class ModelAnswers(Part):
    """What one model answered, prompt by prompt; the base has no win rate."""

    summary: AnswerSummary
    answers: list[Answer]
    win_rate: WinRate | None = None


class Decoding(Part):
    """How answers were drawn."""

    max_new_tokens: int
    temperature: float
    top_k: int = 0
    seed: int = 0


class AnswersRecord(Record):
    """Held-out prompts, answered by the base (`base`) and by tuned models, by trial."""

    sampling: Decoding
    prompts: list[list[Message]]
    models: dict[str, ModelAnswers]


class Generations(AnswersRecord):
    """Answers before and after tuning, to prompts that had no part in it."""

    file = "generations.json"


class Choosing(AnswersRecord):
    """Answers to validation prompts, by which the rule `win_rate` chooses."""

    file = "choosing.json"


class JudgedAnswers(Part):
    """Held-out prompts answered by a model and its base, and who wins how often by a judge."""

    prompts: int
    base: AnswerSummary
    tuned: AnswerSummary
    judge: str
    win_rate: WinRate


class EvaluationReport(Measured):
    """What `pairtune eval` found of a model: what it prefers, and what it answers."""

    model: str
    base: str
    data: SourceAccount
    pairs: int
    examples: ExampleSummary
    answers: JudgedAnswers | None = None


# audit.json ----------------------------------------------------------------------------------------------------------


class Finding(Part):
    """Something that a rule of the audit has found, with what the rule has to say about it.

    Attributes:
        rule: its short name.
        level: `error`: what is reported is wrong; `warning`: it does not mean what it seems to; `note`: worth knowing.
        title: in a few words.
        trials: the names of those concerned; empty: the work as a whole.
        evidence: the numbers, in one sentence.
        explanation: why it matters.
        advice: what to do.
    """

    rule: str
    level: Level
    title: str
    trials: tuple[str, ...]
    evidence: str
    explanation: str
    advice: str


class AuditRecord(Record):
    """What the audit's rules found in a run, or in somebody else's log.

    Attributes:
        source: what was read, of the given `kind`.
        trials: their names.
        passed: ids of rules that looked and found nothing.
        not_checked: what a rule lacked, by its id.
        partly_checked: of rules that passed, what they lacked, by trial.
        verdict: the worst level found, or "clean".
    """

    file = "audit.json"

    source: str
    kind: str
    trials: list[str]
    findings: list[Finding]
    passed: list[str] = []
    not_checked: dict[str, str] = {}
    partly_checked: dict[str, dict[str, str]] = {}
    verdict: Level | Literal["clean"]


RECORDS: tuple[type[Record], ...] = (
    Environment,
    DataRecord,
    SweepRecord,
    Choosing,
    Selection,
    TestRecord,
    Generations,
    AuditRecord,
)


def dump(record: Part) -> dict[str, Any]:
    """A record as it is written: TRL's names for metrics, lists for tuples."""
    return record.model_dump(mode="json", by_alias=True)
