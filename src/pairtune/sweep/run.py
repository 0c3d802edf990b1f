"""Runs the trials of a grid, one after another, each from pristine weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from pairtune.config import RunConfig, TrialConfig
from pairtune.data.prepare import PreparedData
from pairtune.engine.records import TrialResult
from pairtune.engine.trial import Busy, Log, TrialInputs, load_start
from pairtune.errors import RunFailed
from pairtune.models.load import LoadedBase, weights_fingerprint
from pairtune.runs import RunFolder, TrialFolder, write_json
from pairtune.track.sinks import Sink


def _engine(config: RunConfig) -> Callable[[TrialConfig, TrialInputs, TrialFolder, Log, Busy], TrialResult]:
    """The engine's way to run a trial; only the one that is used is imported, since TRL takes seconds."""
    if config.engine == "trl":
        from pairtune.engine import trl

        return trl.run_trial
    from pairtune.engine import native

    return native.run_trial


def run_sweep(config: RunConfig, data: PreparedData, base: LoadedBase, run: RunFolder, sink: Sink) -> list[TrialResult]:
    """Run every trial of the grid; `sweep.json` is rewritten after each, so that it always tells how far the run is.

    Raises:
        RunFailed: a trial did not start at the base model, or no trial ended with a usable model.
    """
    trials = config.trials()
    base_fingerprint = weights_fingerprint(load_start(trials[0], base))
    inputs = TrialInputs(
        base, base_fingerprint, data.train, data.validation, config.select, reference_folder=run.reference
    )
    run_trial = _engine(config)
    steps = math.ceil(len(data.train) / config.batch_size) * config.epochs
    results: list[TrialResult] = []
    for trial in trials:
        sink.start(trial.name, steps)
        result = run_trial(
            trial, inputs, run.trial(trial.name), partial(sink.log, trial.name), partial(sink.busy, trial.name)
        )
        sink.finish(trial.name, result.status, result.best_epoch)
        results.append(result)
        write_json(run.sweep, {"trials": [done.summary() for done in results]})
    if not any(result.status == "finished" for result in results):
        reasons = "; ".join(f"{result.trial.name}: {result.reason}" for result in results)
        raise RunFailed(f"no trial ended with a usable model ({reasons})")
    return results
