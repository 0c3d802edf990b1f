"""`pairtune eval`: evaluate any model on any pairs, including models that were not tuned here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from pairtune.config import MAX_LENGTH, OnBadRow
from pairtune.data.convert import tokenize_source
from pairtune.data.source_reader import SourceReader
from pairtune.data.table import PairTable
from pairtune.engine.kernels import Kernels
from pairtune.engine.lora import settings_of_adapter
from pairtune.engine.losses import LossSettings, Objective
from pairtune.engine.saved_weights import SavedWeights, evaluate_weights
from pairtune.engine.summaries import examples_of, mean_metrics, summarise_examples
from pairtune.errors import BadInput, one_line
from pairtune.evaluation.answers import summarise
from pairtune.evaluation.generations import AnsweringModels, Prompt, held_out_prompts
from pairtune.evaluation.judges import EndpointJudge
from pairtune.evaluation.winrate import Judge, win_rate
from pairtune.models.load import LoadedBase, blank_model, open_base
from pairtune.models.resolve import Target, resolve_target
from pairtune.models.start import open_base_of
from pairtune.run.examples import ExampleRecord
from pairtune.run.folder import Run
from pairtune.run.metrics import EvaluationMetrics
from pairtune.run.records import Answer, EvaluationReport, JudgedAnswers, KernelChoice, Selection, SourceAccount
from pairtune.statistics import metric_intervals

TUNED = "tuned"


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate, and the base model it is compared with.

    Attributes:
        name: as the user typed it.
        saved: its weights.
        base: the base model.
        kernels: how the run that made it computed matrix products; None if unknown.
        max_length: of a pair, in tokens.
    """

    name: str
    saved: SavedWeights
    base: LoadedBase
    kernels: Mapping[str, KernelChoice] | None = None
    max_length: int = MAX_LENGTH


def open_candidate(target: str, base: str | None, beta: float, dtype: str) -> Candidate:
    """Open what `pairtune eval TARGET` names: a finished run or its trial, an adapter, or a model with `--base`.

    Args:
        target: as the user typed it.
        base: what to compare a model with; for an adapter, its base model where it is not where the adapter says.
        beta: for losses and rewards of a model that was not tuned here.
        dtype: `auto`, `float32` or `bfloat16`.

    Raises:
        BadInput: the target is none of these, or cannot be loaded.
    """
    found = resolve_target(target)
    if found.run:
        return _of_run(found, found.run, dtype)
    objective = Objective("sigmoid", LossSettings(beta))
    if found.weights:
        saved = SavedWeights(found.weights, settings_of_adapter(found.weights), objective)
        return Candidate(target, saved, open_base(base or found.base, dtype))
    if base is None:
        raise BadInput(
            f"--base: is required with {target}, which is neither a run nor an adapter; give the model to compare with"
        )
    assert found.source is not None  # noqa: S101 - a target without weights of its own is a model
    return Candidate(target, SavedWeights(found.source.folder, None, objective), open_base(base, dtype))


def _of_run(target: Target, run: Run, dtype: str) -> Candidate:
    """Open a trial of a run in the dtype it was trained in; a requested float32 applies to the evaluation only."""
    record = run.read_trial(target.trial or run.need(Selection).winner)
    if record is None or target.weights is None:
        raise BadInput(f"{target.name}: trial.json is missing; the run is damaged")
    if dtype == "bfloat16" and run.choices.dtype == "float32":
        raise BadInput(f"--dtype bfloat16: {run.root} was trained in float32; omit the flag")
    saved = SavedWeights.of(record.trial, target.weights)
    if dtype == "float32":
        saved = replace(saved, dtype=torch.float32)
    return Candidate(target.name, saved, open_base_of(run), run.choices.kernels, record.trial.max_length)


def read_pairs(
    candidate: Candidate, reader: SourceReader, on_bad_row: OnBadRow, folder: Path
) -> tuple[PairTable, SourceAccount]:
    """Tokenize all pairs of a source for the candidate, and count the source's rows.

    Raises:
        BadInput: a row cannot be used, or no pair is left.
    """
    path = folder / "pairs.arrow"
    count = tokenize_source(reader, candidate.base.tokenizer, candidate.max_length, on_bad_row, path)
    if not count.kept:
        reasons = ", ".join(f"{rows} {reason}" for reason, rows in count.dropped.items()) or "it is empty"
        raise BadInput(f"{count.source}: no pair is left ({reasons})")
    pairs = PairTable.open(path, max_length=candidate.max_length)
    if pairs.unpaired and len(set(pairs.desirable.tolist())) == 1:
        kind, other = ("desirable", "undesirable") if pairs.desirable[0] else ("undesirable", "desirable")
        raise BadInput(f"{count.source}: all answers are {kind}; give {other} ones too, to compare them with")
    return pairs, count.account()


def evaluate_pairs(
    candidate: Candidate,
    pairs: PairTable,
    rows: SourceAccount,
    on_progress: Callable[[int], None] = lambda done: None,
) -> EvaluationReport:
    """Evaluate the candidate against its base, pair by pair.

    Args:
        candidate: the model.
        pairs: the pairs to evaluate it on.
        rows: how many rows they came from.
        on_progress: called with the number of pairs done.
    """
    with tempfile.TemporaryDirectory(prefix="pairtune-") as scratch:
        records = records_of(candidate, pairs, Path(scratch) / "reference.safetensors", on_progress)
    examples = examples_of(pairs, records)
    return EvaluationReport(
        model=candidate.name,
        base=candidate.base.source.name,
        data=rows,
        pairs=len(pairs),
        metrics=EvaluationMetrics.model_validate(mean_metrics(examples)),
        intervals=metric_intervals(examples.metrics, examples.groups, examples.cases),
        examples=summarise_examples(examples),
    )


def records_of(
    candidate: Candidate, pairs: PairTable, reference: Path, on_progress: Callable[[int], None] = lambda done: None
) -> list[ExampleRecord]:
    """Per-example records of pairs under a candidate, in order; `reference` is a file for reference log-probs.

    Raises:
        BadInput: the weights do not fit the base.
    """
    try:
        kernels = Kernels(blank_model(candidate.base.source), candidate.base.device, candidate.kernels)
        return evaluate_weights(candidate.saved, candidate.base, pairs, reference, kernels, on_progress)
    except (ValueError, FileNotFoundError, SafetensorError) as error:
        raise BadInput(f"{candidate.saved.folder}: the weights do not fit the base ({one_line(error)})") from error


@dataclass
class Answered:
    """Held-out prompts with the answers of candidate and base."""

    prompts: Sequence[Prompt]
    ours: list[Answer]
    base: list[Answer]

    def judged(self, judge: Judge, on_progress: Callable[[int], None] = lambda done: None) -> JudgedAnswers:
        """Answer statistics, and the win rate according to the judge."""
        asked = [str(turns[-1]["content"]) for turns in self.prompts]
        scores = judge.judge(self.prompts, self.ours, self.base, on_progress)
        return JudgedAnswers(
            prompts=len(self.prompts),
            base=summarise(asked, self.base),
            tuned=summarise(asked, self.ours),
            judge=judge.name,
            win_rate=win_rate(scores, self.ours, self.base),
        )

    def cost(self, judge: Judge) -> dict[str, int] | None:
        """Calls and tokens that an endpoint will be sent; None for judges on this machine."""
        return judge.estimate(self.prompts, self.ours, self.base) if isinstance(judge, EndpointJudge) else None


def answer_prompts(
    candidate: Candidate, pairs: PairTable, count: int, seed: int, on_progress: Callable[[int], None]
) -> Answered:
    """Let candidate and base answer the first `count` distinct prompts of the pairs.

    Raises:
        BadInput: no prompt can be answered in text.
    """
    prompts = held_out_prompts(pairs, count)
    if not prompts:
        raise BadInput(
            f"--samples {count}: every prompt comes with tools, so that none can be answered in text; use --samples 0"
        )
    answers = AnsweringModels(candidate.base, {TUNED: candidate.saved.folder}).answer(prompts, seed, on_progress)
    return Answered(prompts, answers[TUNED], answers["base"])
