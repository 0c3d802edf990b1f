"""The test split: looked at once, after the choice is made and written down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pairtune.config import TrialConfig
from pairtune.data.table import PairTable
from pairtune.engine.evaluation import evaluate_weights
from pairtune.engine.kernels import Kernels
from pairtune.engine.processes import Processes
from pairtune.engine.records import (
    describe_examples,
    mean_metrics,
    metric_intervals,
    read_groups,
    read_records,
    write_records,
)
from pairtune.errors import RunFailed
from pairtune.models.load import LoadedBase
from pairtune.runs import RunFolder, hash_file, saved_fingerprint, write_json
from pairtune.sweep.select import against_base


def evaluate_test(
    trial: TrialConfig,
    selection: dict[str, Any],
    pairs: PairTable,
    base: LoadedBase,
    run: RunFolder,
    kernels: Kernels | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Judge the chosen model on the test pairs, and write `test.json` and its per-example records.

    Raises:
        RunFailed: no choice is on record, or the test pairs have been looked at, or `best/` is not what was chosen.
    """
    first = Processes(base.device).first
    if first:
        _check(run, selection)
    records = evaluate_weights(trial, run.best, base, pairs, run.reference / "test.safetensors", kernels, progress)
    if not first:
        return
    write_records(run.test_records, pairs, records)
    numbers, groups = read_records(run.test_records), read_groups(run.test_records)
    write_json(
        run.test,
        {
            "trial": trial.name,
            "epoch": selection["best_epoch"],
            "selection_sha256": hash_file(run.selection),
            "pairs": len(pairs),
            "metrics": mean_metrics(records),
            "intervals": metric_intervals(numbers, groups),
            "against_base": against_base(numbers, groups),
            "examples": describe_examples(run.test_records),
        },
    )


def _check(run: RunFolder, selection: dict[str, Any]) -> None:
    if not run.selection.is_file() or run.read_json(run.selection)["winner"] != selection["winner"]:
        raise RunFailed(f"{run.selection}: the choice comes first; the test pairs are looked at once, after it")
    if run.test.is_file():
        raise RunFailed(f"{run.test}: the test pairs have been looked at; looked at twice they would choose, not test")
    chosen = run.read_json(run.selection)["best_fingerprint"]
    if saved_fingerprint(run.best) != chosen:
        raise RunFailed(f"{run.best}: the weights are not those that were chosen ({chosen})")
