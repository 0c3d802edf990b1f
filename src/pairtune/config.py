"""The configuration of a run: typed, validated, each setting with its help, and each default with its reason.

A `RunConfig` is what the user asks for; a `TrialConfig` is one point of its grid. `pairtune.resolve_config` makes one
out of defaults, a YAML file and flags.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from itertools import product
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    NonNegativeInt,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

Method = Literal["lora", "full"]
Engine = Literal["pairtune", "trl"]
PairLoss = Literal[
    "sigmoid",
    "ipo",
    "hinge",
    "robust",
    "exo_pair",
    "apo_zero",
    "apo_down",
    "nca_pair",
    "sppo_hard",
    "discopop",
    "sigmoid_norm",
    "simpo",
    "orpo",
]
# Losses of single answers, each desirable or undesirable.
UnpairedLoss = Literal["kto", "bco", "apo_zero_unpaired"]
UNPAIRED: tuple[UnpairedLoss, ...] = get_args(UnpairedLoss)
Loss = Literal[PairLoss, UnpairedLoss]
Search = Literal["grid", "random", "tpe"]
Select = Annotated[
    Literal["eval_loss", "accuracy", "margin", "fewer_faults"],
    BeforeValidator(lambda value: "fewer_faults" if value == "win_rate" else value),  # its name in earlier versions
]
Track = Literal["wandb", "tensorboard", "mlflow"]
DType = Literal["auto", "float32", "bfloat16"]
Checkpointing = Literal["auto", "on", "off"]
Optimizer = Literal["adamw", "adamw-8bit"]
Reference = Literal["start", "base"]
OnTop = Literal["continue", "new"]
OnBadRow = Literal["stop", "skip"]


_TWICE = "the same value is given twice; each value makes one trial"


def _different(values: list[float]) -> list[float]:
    if len(set(values)) != len(values):
        raise ValueError(_TWICE)
    return values


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str | int | float) else value


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=0.5)]
Grid = Annotated[
    list[Positive], Field(min_length=1), BeforeValidator(_one_or_more), AfterValidator(_different)
]  # one value may stand alone

SANITY_PROMPTS = 5
SANITY_ANSWERS = 20  # of single answers, so that every split has both kinds
MAX_LENGTH = 1024
_LOCAL = "a .jsonl, .json, .csv or .parquet file, a folder"
SOURCES = f"{_LOCAL}, a Hub id (org/name:subset@split#revision), bundled:concise, votes"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


# What a column can hold: a part of a pair, one of two answers with what judges them, or a list of rated answers.
ColumnPart = Literal[
    "prompt",
    "chosen",
    "rejected",
    "system",
    "label",
    "label_a",
    "label_b",
    "answer_a",
    "answer_b",
    "score_a",
    "score_b",
    "answers",
    "scores",
    "completion",
]
Columns = dict[ColumnPart, str]
Pairing = Literal["best-worst", "all"]
Wanted = Literal["pairs", "single answers", "either"]


@dataclass(frozen=True)
class Reading:
    """How the rows of a source are read.

    Attributes:
        columns: the columns that a person named, by what they hold.
        pairing: which pairs a list of rated answers gives.
        min_gap: the least difference between the scores of a pair's answers.
        confirmed: whether the person confirmed the columns.
        prompts: stop after this many pairs with unrelated prompts, and leave out those with related ones; None for all.
        wanted: what the rows should give; of single answers, a pair gives two.
    """

    columns: Columns = field(default_factory=dict)
    pairing: Pairing = "best-worst"
    min_gap: float = 0.0
    confirmed: bool = False
    prompts: int | None = None
    wanted: Wanted = "pairs"


class SourceConfig(_Strict):
    """One source of pairs: what the user types after `--data`, and how it is read and mixed."""

    source: str = Field(min_length=1)
    weight: Positive | None = None
    columns: Columns = {}

    @model_serializer
    def _short(self) -> str | dict[str, Any]:
        more = {"weight": self.weight, "columns": self.columns}
        more = {name: value for name, value in more.items() if value}
        return {"source": self.source, **more} if more else self.source


def _as_sources(value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    return [{"source": each} if isinstance(each, str) else each for each in values]


def _all_weighted_or_none(sources: list[SourceConfig]) -> list[SourceConfig]:
    if len({source.weight is None for source in sources}) > 1:
        raise ValueError("some sources have a weight and some have none; give a weight to all or to none")
    return sources


# One or more sources, each a string or a mapping with source, weight and columns.
Sources = Annotated[
    list[SourceConfig], Field(min_length=1), BeforeValidator(_as_sources), AfterValidator(_all_weighted_or_none)
]


_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".zst")


def source_name(source: str) -> str:
    """The name of a source without the folders of the local machine; a Hub id stays whole."""
    path = re.sub(r":\d+$", "", source.partition("@")[0])  # without the row number that ends an origin
    local = path.startswith(("/", ".", "~")) or path.count("/") > 1 or Path(path).suffix in _FILES
    return PurePath(source).name if local or Path(path).exists() else source


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as 6GB, 900 MiB or 1.5g; as in all of this program, units are powers of 1024.

    Raises:
        ValueError: it is no such size.
    """
    if not (found := _SIZE.fullmatch(text.strip())):
        raise ValueError("should be a size such as 6GB or 900MB")
    return int(float(found[1]) * 1024 ** " kmgt".index(found[2].lower() or " "))


def _as_size(value: Any) -> Any:
    """A number in a YAML file is taken as bytes."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _enough(text: str) -> str:
    if (size := parse_size(text)) < 1 << 28:
        raise ValueError(f"is {size:,} bytes, and no model can be trained in less than 256MB")
    return text


# Bytes as people write them.
Memory = Annotated[str, BeforeValidator(_as_size), AfterValidator(_enough)]

# Groups of settings, in display order.
COMMON, DATA, LOSS, TRAINING, SELECTION, MACHINE, RESULTS = GROUPS = (
    "Common",
    "Data",
    "Loss",
    "Adapter and optimizer",
    "Search and selection",
    "Machine",
    "Results",
)


def setting(
    default: Any, help: str, why: str = "", *, group: str, flag: str = "", metavar: str = "", **more: Any
) -> Any:
    """A field that the user sets; `pairtune.options` generates flags, forms and documentation from it.

    Args:
        default: the value if none is given; `...` if one is required.
        help: what it does, in one sentence.
        why: the reason for the default, or what happens if no value is given.
        group: one of `GROUPS`.
        flag: its spelling on the command line, if it differs from the name.
        metavar: the placeholder for its value in help texts.
        more: further arguments of pydantic's `Field`.
    """
    described: JsonDict = {"why": why, "group": group, "flag": flag, "metavar": metavar}
    if "default_factory" in more:
        return Field(description=help, json_schema_extra=described, **more)
    return Field(default, description=help, json_schema_extra=described, **more)


class _Training(_Strict):
    """The settings of a trial besides its learning rate and beta."""

    epochs: PositiveInt = setting(3, "Passes over the training pairs.", "small sets of pairs need a few", group=COMMON)
    batch_size: PositiveInt = setting(
        2, "Pairs, or single answers, per optimizer step.", "fits a 6 GB card", group=COMMON
    )
    method: Method = setting(
        "lora",
        "Train LoRA adapters, or all weights.",
        "trains 4 % of the weights, so the optimizer state stays small",
        group=TRAINING,
    )
    loss: Loss = setting(
        "sigmoid",
        "Loss function; sigmoid is DPO.",
        "DPO as published (Rafailov et al. 2023, eq. 7)",
        group=LOSS,
        metavar="LOSS",
    )
    desirable_weight: Positive = setting(
        1.0,
        "Weight of desirable answers (kto, bco, apo_zero_unpaired).",
        "both kinds weigh the same; the KTO paper gives the rarer kind the larger weight",
        group=LOSS,
    )
    undesirable_weight: Positive = setting(
        1.0, "Weight of undesirable answers.", "both kinds weigh the same", group=LOSS
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = setting(
        0.0,
        "Share of labels assumed to be flipped.",
        "labels are taken to be correct",
        group=LOSS,
        metavar="SHARE",
        validate_default=True,
    )
    sft_weight: Annotated[float, Field(ge=0)] = setting(
        0.0,
        "Weight of an SFT term, the chosen answer's negative log-prob per token, added to any loss.",
        "no SFT term, as in DPO",
        group=LOSS,
    )
    simpo_gamma: Annotated[float, Field(ge=0)] = setting(
        0.5, "Target reward margin of the simpo loss, as a fraction of beta.", "as in the SimPO paper", group=LOSS
    )
    discopop_tau: Positive = setting(0.05, "Temperature of the discopop loss.", "as in the DiscoPOP paper", group=LOSS)
    lora_targets: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)] | None = setting(
        None,
        "Name of a linear layer that gets an adapter; repeat for several.",
        "every linear layer except the output embedding",
        group=TRAINING,
        flag="--lora-target",
        metavar="LAYER",
    )
    lora_rank: PositiveInt = setting(
        16, "Rank of the adapters.", "common for LoRA on every linear layer", group=TRAINING
    )
    lora_alpha: Positive = setting(
        32, "Adapters are scaled by alpha over rank.", "twice the rank, as usual: a scale of 2", group=TRAINING
    )
    rslora: bool = setting(
        False,
        "Scale adapters by alpha over the square root of the rank (rsLoRA).",
        "scale by alpha over the rank, as in the LoRA paper",
        group=TRAINING,
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0,
        "Dropout on the adapters' inputs.",
        "none, so that step 0 is exactly the base model",
        group=TRAINING,
        metavar="SHARE",
    )
    optimizer: Optimizer = setting(
        "adamw",
        "Optimizer; adamw-8bit keeps AdamW's moments in 8 bits, for --method full where memory is short.",
        "AdamW as published, with float32 moments",
        group=TRAINING,
    )
    max_grad_norm: Positive = setting(1.0, "Gradients are clipped to this norm.", "TRL's default", group=TRAINING)
    patience: PositiveInt | None = setting(
        None,
        "Stop a trial after this many epochs without improvement.",
        "off: every trial runs all its epochs, and the best one is kept",
        group=TRAINING,
        metavar="EPOCHS",
    )
    max_length: Annotated[int, Field(ge=16)] = setting(
        MAX_LENGTH,
        "Maximum tokens of a pair; longer prompts lose their oldest turns, answers are never cut.",
        "TRL's default",
        group=DATA,
        metavar="TOKENS",
    )
    checkpointing: Checkpointing = setting(
        "auto",
        "Recompute activations in the backward pass to save memory.",
        "off, unless the run would not fit; with TRL's engine on for an accelerator",
        group=MACHINE,
    )
    row_tokens: Annotated[int, Field(ge=16)] | None = setting(
        None,
        "Tokens of each trial that are computed at once in training; a longer pair has a row of its own.",
        "512, beyond which a CPU gains nothing, and 8,192 on an accelerator; fewer if the run would not fit",
        group=MACHINE,
        metavar="TOKENS",
    )
    dtype: DType = setting(
        "auto",
        "Data type of the base weights.",
        "bfloat16 if this machine multiplies it faster than float32, or the run would not fit otherwise",
        group=MACHINE,
    )
    eval_dtype: Literal["float32"] | None = setting(
        None,
        "Evaluate in float32 what is trained in bfloat16.",
        "the type of the base weights; float32 keeps bfloat16 rounding out of evaluations",
        group=MACHINE,
    )
    seed: NonNegativeInt = setting(
        0,
        "Seed of everything random: adapter initialisation, order of pairs, splits, samples.",
        "any fixed seed makes a run repeatable",
        group=MACHINE,
        metavar="SEED",
    )

    @field_validator("label_smoothing")
    @classmethod
    def _smoothing_of_exo(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("loss") == "exo_pair" and value == 0:
            raise ValueError("must be above 0 for the loss exo_pair, for example 0.001")
        return value

    @field_validator("optimizer")
    @classmethod
    def _of_all_weights(cls, value: Optimizer, info: ValidationInfo) -> Optimizer:
        if value == "adamw-8bit" and info.data.get("method") == "lora":
            raise ValueError("is for --method full; the moments of adapters take little memory")
        return value

    @field_validator("sft_weight")
    @classmethod
    def _pairs_only(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("loss") in UNPAIRED:
            raise ValueError(f"is a term of pair losses, which {info.data['loss']} is not; omit it")
        return value


class TrialConfig(_Training):
    """One trial: one learning rate, one beta, and one value of every other setting that the grid varies.

    `varied` names these other settings, in the order in which they appear in the trial's name.
    """

    learning_rate: Positive
    beta: Positive
    varied: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The trial's folder name, for example `lr-3e-05-beta-0.1-loss-ipo`."""
        values = {"lr": self.learning_rate, "beta": self.beta}
        values |= {name.replace("_", "-"): getattr(self, name) for name in self.varied}
        # All digits, so that different values get different folders.
        return "-".join(f"{name}-{value if isinstance(value, str) else repr(value)}" for name, value in values.items())


# Trial settings that are the same in the whole run, because they decide how pairs are tokenized, what the base model is
# and which of its layers have adapters.
_RUN_WIDE = {"method", "lora_targets", "max_length", "dtype", "eval_dtype", "checkpointing", "row_tokens"}


class RunConfig(_Training):
    """Everything a run depends on."""

    model: str = setting(
        "smollm2-135m",
        "Model to start from: a Hub id (org/name#revision), a folder, a .gguf file, smollm2-135m, each with @nf4 for "
        "linear layers in 4 bits; or a tuned model: a run, RUN/TRIAL, an adapter.",
        "bundled, needs no network, trains on a laptop's CPU",
        group=COMMON,
        metavar="MODEL",
    )
    on_top: OnTop | None = setting(
        None,
        "If --model is an adapter: train it further, or merge it and train a new one on top.",
        "an adapter is trained further, so that the result still fits its base model",
        group=TRAINING,
    )
    reference: Reference = setting(
        "start",
        "If --model is a tuned model: measure the policy against it, or against the base model under it.",
        "the model that the run starts from, as in DPO",
        group=LOSS,
    )
    data: Sources = setting(..., f"Pairs to train on: {SOURCES}; repeat to mix several.", group=COMMON, metavar="SRC")
    eval_data: Sources | None = setting(
        None,
        "Validation pairs, which select the epoch and the trial.",
        "held out from the training pairs",
        group=COMMON,
        metavar="SRC",
    )
    test_data: Sources | None = setting(
        None,
        "Test pairs, evaluated once, after the selection.",
        "held out from the training pairs; none if --eval-data is given",
        group=DATA,
        metavar="SRC",
    )
    columns: Columns = setting(
        {},
        "Column that holds a part of the pairs: prompt, chosen, rejected, system; or two answers, answer_a and "
        "answer_b, and what judges them, label (several annotators' columns with commas) or score_a and score_b; "
        "or answers, a list, and their scores; or for unpaired losses completion, a single answer, and its label. "
        "label_a and label_b say which of a label's values mean one of two answers. "
        "Repeat for each; --label NAME is short for --column label=NAME, and so on.",
        "detected from the keys of the rows",
        group=DATA,
        flag="--column",
        metavar="PART=NAME",
    )
    pairs: Pairing = setting(
        "best-worst",
        "Pairs that a list of rated answers gives: the best against the worst, or every two.",
        "one pair a prompt, with the clearest difference",
        group=DATA,
    )
    min_gap: Annotated[float, Field(ge=0)] = setting(
        0.0,
        "Leave out pairs whose scores differ by less.",
        "only equal scores are left out",
        group=DATA,
        metavar="SCORE",
    )
    accept_columns: bool = setting(
        False,
        "Take the named columns as they are, although the data has a column that may be a label.",
        "columns that a label may contradict are refused",
        group=DATA,
        flag="--yes",
    )
    validation_share: Share = setting(
        0.1,
        "Share of the prompts held out for validation if --eval-data is not given.",
        "a tenth of the prompts selects epoch and trial",
        group=DATA,
        metavar="SHARE",
    )
    test_share: Share = setting(
        0.1,
        "Share of the prompts held out for the test if neither --eval-data nor --test-data is given.",
        "a tenth of the prompts has no part in the selection",
        group=DATA,
        metavar="SHARE",
    )
    learning_rate: Grid = setting(
        [3e-5, 1e-5], "Peak learning rate.", "with two betas, a grid of four trials", group=COMMON, flag="--lr"
    )
    beta: Grid = setting(
        [0.1, 0.2],
        "DPO's beta: how strongly the policy is kept close to the reference model.",
        "TRL's default, and twice that",
        group=COMMON,
    )
    engine: Engine = setting(
        "pairtune",
        "Training engine; trl runs TRL's DPOTrainer, which is slower, for comparison.",
        "this project's own; trl is the reference that it is tested against",
        group=MACHINE,
    )
    limit: PositiveInt | None = setting(
        None, "Read at most this many rows of each source.", "all rows", group=COMMON, metavar="ROWS"
    )
    eval_limit: PositiveInt | None = setting(
        None,
        "Read at most this many rows of each validation and test source.",
        "the same as --limit",
        group=DATA,
        metavar="ROWS",
    )
    sanity_check: bool = setting(
        False,
        f"Use only the first {SANITY_PROMPTS} pairs with unrelated prompts ({SANITY_ANSWERS} for unpaired losses), to "
        "check that everything works.",
        "all rows are used",
        group=COMMON,
    )
    on_bad_row: OnBadRow = setting(
        "stop",
        "Stop at the first faulty row, or skip and count such rows.",
        "faults in the data are seen before it is trained on",
        group=DATA,
    )
    search: Search = setting(
        "grid",
        "Try every combination, or draw trials from the range between the given values.",
        "every combination of the given values",
        group=SELECTION,
    )
    trial_count: PositiveInt | None = setting(
        None,
        "Number of trials for random and tpe.",
        "every combination for grid; required for random and tpe",
        group=SELECTION,
        flag="--trials",
        validate_default=True,
    )
    prune: bool = setting(
        False,
        "Stop unpromising trials after an epoch (successive halving).",
        "all trials run to their end, so that all can be compared",
        group=SELECTION,
    )
    side_by_side: PositiveInt | None = setting(
        None,
        "Trials trained at once over one copy of the base model.",
        "as many as memory allows, at most 4 on a CPU",
        group=MACHINE,
        metavar="TRIALS",
    )
    memory: Memory | None = setting(
        None,
        "Memory that the run may take, for example 6GB: trials side by side, rows and checkpointing are chosen to fit.",
        "seven tenths of what is free when the run starts",
        group=MACHINE,
        metavar="SIZE",
    )
    cluster: str | None = setting(
        None,
        "Train on a Ray cluster: `ray` for the one that runs here, or its address, ray://HOST:PORT.",
        "this machine",
        group=MACHINE,
        flag="--on",
        metavar="ADDRESS",
    )
    checkpoint_steps: PositiveInt = setting(
        50,
        "Optimizer steps from one checkpoint to the next.",
        "a crash costs minutes of work at most, writing costs seconds",
        group=MACHINE,
        metavar="STEPS",
    )
    select: Select = setting(
        "eval_loss",
        "Rule that selects epoch and trial.",
        "the training objective, on held-out pairs",
        group=SELECTION,
    )
    track: Annotated[tuple[Track, ...], BeforeValidator(_one_or_more)] = setting(
        (),
        "Log to this tracker as well; repeat for several.",
        "none; everything is in metrics.jsonl anyway",
        group=RESULTS,
    )
    push: str | None = setting(
        None,
        "Publish the result in this repository on the Hugging Face Hub at the end.",
        "none; nothing leaves this machine",
        group=RESULTS,
        metavar="USER/NAME",
    )
    share_prompts: bool = setting(
        False,
        "Let prompts, answers and pairs be part of what is published on the Hub or sent to W&B and MLflow.",
        "they are other people's texts, and held-out prompts that are public are soon in training data",
        group=RESULTS,
    )
    samples: NonNegativeInt | None = setting(
        None,
        "Held-out prompts answered before and after tuning; 0 for none.",
        "4 to 32, to take about a tenth of the run's time",
        group=RESULTS,
        metavar="PROMPTS",
    )
    out: Path = setting(
        ...,
        "Folder for the run; must not exist yet.",
        "runs/ and a timestamp",
        group=COMMON,
        metavar="DIR",
        default_factory=lambda: Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}",
    )
    _vary: dict[str, list[Any]] = PrivateAttr({})  # further dimensions of the grid: settings given as a list, by name

    @field_validator("engine")
    @classmethod
    def _what_trl_has(cls, value: Engine, info: ValidationInfo) -> Engine:
        loss, smoothing = info.data.get("loss"), info.data.get("label_smoothing")
        beyond = loss in ("simpo", "orpo") or info.data.get("sft_weight") or (smoothing and loss == "sigmoid")
        if value == "trl" and loss in UNPAIRED:
            raise ValueError(f"is for pairs, and {loss} learns from single answers; use --engine pairtune")
        if value == "trl" and beyond:
            raise ValueError(
                "has no simpo or orpo, no SFT weight, and no label smoothing of sigmoid; use --engine pairtune"
            )
        if value == "trl" and info.data.get("optimizer") == "adamw-8bit":
            raise ValueError("has AdamW with float32 moments here; use --engine pairtune, or omit --optimizer")
        if value == "trl" and info.data.get("row_tokens"):
            raise ValueError("has no rows of packed pairs; omit --row-tokens")
        if value == "trl" and info.data.get("eval_dtype"):
            raise ValueError("evaluates in the dtype it trains in; omit --eval-dtype")
        return value

    @field_validator("cluster")
    @classmethod
    def _what_a_cluster_does(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value and info.data.get("engine") == "trl":
            raise ValueError("trains with this project's engine; omit --engine trl")
        if value and info.data.get("prune"):
            raise ValueError("trains trials apart, so that none can be compared while it runs; omit --prune")
        return value

    @property
    def memory_bytes(self) -> int | None:
        """The bytes that the run may take; None if `memory` is not set."""
        return parse_size(self.memory) if self.memory else None

    @property
    def sources(self) -> list[SourceConfig]:
        """The sources of all splits."""
        return [*self.data, *(self.eval_data or []), *(self.test_data or [])]

    @property
    def reading(self) -> Reading:
        """How the rows of all sources are read; a source may have columns of its own."""
        prompts = (SANITY_ANSWERS if self.unpaired else SANITY_PROMPTS) if self.sanity_check else None
        wanted: Wanted = "single answers" if self.unpaired else "pairs"
        return Reading(self.columns, self.pairs, self.min_gap, self.accept_columns, prompts, wanted)

    @property
    def unpaired(self) -> bool:
        """Whether the trials learn from single answers instead of pairs."""
        return self.loss in UNPAIRED

    def row_limit(self, split: str) -> int | None:
        """The most rows to read from each source of a split (train, validation or test); None for all."""
        return self.limit if split == "train" or self.eval_limit is None else self.eval_limit

    @model_validator(mode="wrap")
    @classmethod
    def _lists_are_grids(cls, data: Any, build: ModelWrapValidatorHandler[RunConfig]) -> RunConfig:
        """Accept a list for any setting of a trial; each value is validated as if it had been given alone."""
        lists = {
            name: values
            for name, values in (data.items() if isinstance(data, dict) else ())
            if name in _Training.model_fields and may_vary(name) and isinstance(values, list) and values
        }
        checked = {}
        firsts = {**data, **{name: values[0] for name, values in lists.items()}} if lists else data
        for name, values in lists.items():
            checked[name] = [getattr(build({**firsts, name: value}), name) for value in values]
            if len(set(checked[name])) != len(values):
                fault = {"type": "value_error", "loc": (name,), "input": values, "ctx": {"error": ValueError(_TWICE)}}
                raise ValidationError.from_exception_data("RunConfig", [fault])  # type: ignore[list-item]
        if (losses := checked.get("loss")) and len({loss in UNPAIRED for loss in losses}) > 1:
            told = "some learn from pairs and some from single answers; compare them in separate runs"
            fault = {"type": "value_error", "loc": ("loss",), "input": losses, "ctx": {"error": ValueError(told)}}
            raise ValidationError.from_exception_data("RunConfig", [fault])  # type: ignore[list-item]
        config = build(firsts)
        config._vary = {name: values for name, values in checked.items() if len(values) > 1}
        return config

    @field_validator("samples")
    @classmethod
    def _answers_that_choose(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value == 0 and info.data.get("select") == "fewer_faults":
            raise ValueError("must not be 0 with --select fewer_faults, which needs answers to select by")
        return value

    @field_validator("trial_count")
    @classmethod
    def _search_needs_a_number(cls, value: int | None, info: ValidationInfo) -> int | None:
        if (info.data.get("search") != "grid") != (value is not None):
            raise ValueError("is required with --search random or tpe, and only allowed with these")
        return value

    @property
    def dimensions(self) -> dict[str, list[Any]]:
        """The settings that the grid varies, each with its values."""
        return {"beta": self.beta, "learning_rate": self.learning_rate, **self._vary}

    def trial(self, **values: Any) -> TrialConfig:
        """The trial at one point of the grid, or of the space that it spans."""
        shared = {name: getattr(self, name) for name in _Training.model_fields}
        return TrialConfig(**{**shared, **values, "varied": tuple(self._vary)})

    def trials(self) -> list[TrialConfig]:
        """The grid: every combination, with beta as the outermost loop."""
        names = list(self.dimensions)
        return [self.trial(**dict(zip(names, point, strict=True))) for point in product(*self.dimensions.values())]

    def instead(self, **values: Any) -> RunConfig:
        """The same with other values, each in place of all that the grid has of that setting; not validated."""
        found = self.model_copy(update=values)
        found._vary = {name: given for name, given in self._vary.items() if name not in values}
        return found


def flag_of(name: str) -> str:
    """The command-line flag of a field."""
    field = RunConfig.model_fields.get(name)
    return (described(field)["flag"] if field else "") or "--" + name.replace("_", "-")


def described(field: FieldInfo) -> dict[str, str]:
    """The arguments that `setting` stored with a field."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict)  # noqa: S101 - `setting` makes every field of RunConfig
    return {name: str(value) for name, value in extra.items()}


def may_vary(name: str) -> bool:
    """Whether a list of values for a setting makes a grid of trials."""
    return name in ("learning_rate", "beta") or (name in _Training.model_fields and name not in _RUN_WIDE)
