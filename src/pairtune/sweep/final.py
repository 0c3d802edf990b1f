"""The test split: evaluated once, after the choice has been made and recorded."""

from __future__ import annotations

from collections.abc import Callable

from pairtune.config import TrialConfig
from pairtune.data.table import PairTable
from pairtune.engine.kernels import Kernels
from pairtune.engine.processes import Processes
from pairtune.engine.saved_weights import SavedWeights, evaluate_weights
from pairtune.engine.summaries import examples_of, mean_metrics, summarise_examples
from pairtune.errors import RunFailed
from pairtune.files import hash_file, saved_fingerprint
from pairtune.models.load import LoadedBase
from pairtune.run.folder import Run
from pairtune.run.metrics import EvaluationMetrics
from pairtune.run.records import Selection, TestRecord
from pairtune.statistics import metric_intervals
from pairtune.sweep.select import against_base


def evaluate_test(
    trial: TrialConfig,
    selection: Selection,
    pairs: PairTable,
    base: LoadedBase,
    run: Run,
    kernels: Kernels | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Evaluate the chosen model on the test pairs, and write `test.json` and its per-example records.

    Raises:
        RunFailed: no choice is on record, the test pairs have already been used, or `best/` is not the chosen model.
    """
    first = Processes(base.device).first
    if first:
        _check(run, selection)
    records = evaluate_weights(
        SavedWeights.of(trial, run.paths.best),
        base,
        pairs,
        run.paths.reference / "test.safetensors",
        kernels,
        on_progress,
    )
    if not first:
        return
    examples = examples_of(pairs, records)
    examples.write(run.paths.test_examples)
    run.write(
        TestRecord(
            trial=trial.name,
            epoch=selection.best_epoch,
            selection_sha256=hash_file(run.paths.selection),
            pairs=len(pairs),
            metrics=EvaluationMetrics.model_validate(mean_metrics(examples)),
            intervals=metric_intervals(examples.metrics, examples.groups, examples.cases),
            against_base=against_base(examples.metrics, examples.groups),
            examples=summarise_examples(examples),
        )
    )


def _check(run: Run, selection: Selection) -> None:
    paths, chosen = run.paths, run.get(Selection)
    if chosen is None or chosen.winner != selection.winner:
        raise RunFailed(f"{paths.selection}: no choice is on record; the test pairs are only evaluated after it")
    if paths.test.is_file():
        raise RunFailed(
            f"{paths.test}: the test pairs have already been used; a second use would make them validation pairs"
        )
    if saved_fingerprint(paths.best) != chosen.best_fingerprint:
        raise RunFailed(f"{paths.best}: the weights are not those that were chosen ({chosen.best_fingerprint})")
