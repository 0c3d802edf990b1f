"""`pairtune compare`: whether one tuned model is better than another one on the same pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from pairtune.config import OnBadRow
from pairtune.data.source_reader import SourceReader
from pairtune.engine.losses import LossSettings, Objective
from pairtune.engine.saved_weights import SavedWeights
from pairtune.engine.summaries import examples_of
from pairtune.errors import BadInput
from pairtune.evaluation.model import Candidate, open_candidate, read_pairs, records_of
from pairtune.files import saved_fingerprint
from pairtune.models.load import open_base
from pairtune.models.resolve import ModelSource, resolve_model, resolve_target
from pairtune.run.metrics import EXAMPLE_METRICS
from pairtune.run.records import ComparedModels, Difference
from pairtune.statistics import ALPHA, Groups, Numbers, bootstrap_intervals, paired_p_values, pairs_needed


def open_both(one: str, other: str, beta: float, dtype: str) -> tuple[Candidate, Candidate]:
    """Open two models that go back to the same base, both measured against it.

    Raises:
        BadInput: a model cannot be opened, or they go back to different bases.
    """
    roots = [_root(each) for each in (one, other)]
    if saved_fingerprint(roots[0].folder) != saved_fingerprint(roots[1].folder):
        raise BadInput(
            f"{other}: goes back to {roots[1].name}, and {one} to {roots[0].name}; log-probs of different base models "
            "cannot be compared. Compare their answers: in the arena, or with pairtune eval --judge"
        )
    first, second = (_against(each, roots[0], beta, dtype) for each in (one, other))
    if first.base.tokenizer.chat_template != second.base.tokenizer.chat_template:
        raise BadInput(f"{other}: has another chat template than {one}, so they would not read the same pairs")
    return first, second


def _root(name: str) -> ModelSource:
    """The plain model that a model goes back to."""
    found = resolve_target(name)
    if found.source:
        return found.source
    lineage = found.run.lineage if found.run else None
    return resolve_model(lineage.base if lineage else found.run.settings.model if found.run else found.base)


def _against(name: str, root: ModelSource, beta: float, dtype: str) -> Candidate:
    objective = Objective("sigmoid", LossSettings(beta))
    found = resolve_target(name)
    if found.source:
        return Candidate(name, SavedWeights(found.source.folder, None, objective), open_base(name, dtype))
    candidate = open_candidate(name, None, beta, dtype)
    return replace(
        candidate,
        saved=replace(candidate.saved, objective=objective),
        base=replace(candidate.base, reference=root),
    )


def compare_models(
    one: Candidate,
    other: Candidate,
    reader: SourceReader,
    on_bad_row: OnBadRow,
    folder: Path,
    on_progress: Callable[..., None] = lambda name, done, total: None,
) -> ComparedModels:
    """Evaluate both models on the same pairs, and test the difference.

    Args:
        one: the first model.
        other: the second model.
        reader: the pairs.
        on_bad_row: stop at a faulty row, or skip and count it.
        folder: for temporary files.
        on_progress: called with a model's name, how many of its pairs are done, and `total`.

    Raises:
        BadInput: a row cannot be used, or no pair is left.
    """
    pairs, account = read_pairs(one, reader, on_bad_row, folder)
    values: list[Numbers] = []
    groups = pairs.groups
    for number, each in enumerate((one, other)):
        tell = partial(on_progress, each.name, total=len(pairs))
        records = records_of(each, pairs, folder / f"reference-{number}.safetensors", tell)
        values.append(examples_of(pairs, records).metrics)
    loss, accuracy = (_difference(values, groups, name) for name in ("loss", "rewards/accuracies"))
    told = loss.p < ALPHA
    gap = (values[1] - values[0])[:, EXAMPLE_METRICS.index("loss")]
    return ComparedModels(
        one=one.name,
        other=other.name,
        outcome="cannot be told" if not told else "better" if loss.difference < 0 else "worse",
        base=(one.base.reference or one.base.source).name,
        beta=float(one.saved.objective.settings.beta),
        data=account,
        pairs=len(pairs),
        conversations=len(np.unique(groups)),
        loss=loss,
        accuracy=accuracy,
        needed=None if told else pairs_needed(gap, 1, groups, settled=False),
    )


def _difference(values: list[Numbers], groups: Groups, metric: str) -> Difference:
    place = EXAMPLE_METRICS.index(metric)
    one, other = (each[:, [place]] for each in values)
    ((low, high),) = bootstrap_intervals(other - one, groups)
    return Difference(
        one=float(one.mean()),
        other=float(other.mean()),
        difference=float((other - one).mean()),
        interval=(float(low), float(high)),
        p=float(paired_p_values(other - one, groups)[0]),
    )
