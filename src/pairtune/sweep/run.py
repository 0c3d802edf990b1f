"""Runs the trials of a sweep from pristine weights: in lockstep where they can share work, else one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pairtune.config import RunConfig, TrialConfig
from pairtune.data.prepare import PreparedData
from pairtune.engine.kernels import Kernels
from pairtune.engine.processes import Processes
from pairtune.engine.trial import TrialInputs, always_false, load_start
from pairtune.errors import RunFailed
from pairtune.models.load import LoadedBase, weights_fingerprint
from pairtune.run.folder import Run
from pairtune.run.records import SweepRecord, TrialRecord
from pairtune.sweep.cluster import rounding_of, train_on_cluster
from pairtune.sweep.groups import Engine, train_in_groups
from pairtune.sweep.search import Search
from pairtune.track.sinks import Sink


def run_sweep(
    config: RunConfig,
    search: Search,
    data: PreparedData,
    base: LoadedBase,
    run: Run,
    sink: Sink,
    kernels: Kernels | None = None,
    stopping: Callable[[], bool] = always_false,
) -> list[TrialRecord]:
    """Run every trial of the search that has no result on record; `sweep.json` holds the results so far.

    Args:
        config: the run's configuration.
        search: proposes the trials.
        data: the prepared pairs.
        base: the base model.
        run: the run that the results are written to.
        sink: receives every step and evaluation.
        kernels: how products are computed on this machine; probed if not given.
        stopping: called between steps; whether to interrupt the run.

    Raises:
        RunFailed: a trial did not start at the base model, or no trial ended with a usable model.
        Interrupted: the run was asked to stop.
    """
    divided = Processes(base.device).count > 1
    inputs = TrialInputs(
        base,
        weights_fingerprint(load_start(config.trials()[0], base, divided=divided)),
        data.train,
        data.validation,
        config.select,
        probed=kernels,
        checkpoint_steps=config.checkpoint_steps,
        stopping=stopping,
        hopeless=search.hopeless,
    )
    engine = _engine(config)
    done: dict[str, TrialRecord] = {}
    while batch := search.ask():
        done |= _results_on_record(batch, run)
        before = {result.trial.name: result for result in engine.checkpointed(run)} | done
        search.replay(before[trial.name] for trial in batch if trial.name in before)
        trained: Iterable[list[TrialRecord]] = ()
        if all(trial.name in done for trial in batch):
            if inputs.processes.first:  # the run may have been killed right after its last trial's own record
                _record(search, done, inputs, run)
                run.paths.checkpoint.unlink(missing_ok=True)
        elif config.cluster:
            trained = train_on_cluster(batch, config, run, sink, len(data.train), stopping)
        else:
            trained = train_in_groups(batch, done, engine, inputs, run, sink, config.side_by_side)
        for results in trained:
            done |= {result.trial.name: result for result in results}
            if inputs.processes.first:
                _record(search, done, inputs, run)
        search.tell(done[trial.name] for trial in batch)
    results = [done[trial.name] for trial in search.trials]
    if not any(result.status == "finished" for result in results):
        reasons = "; ".join(f"{result.trial.name}: {result.reason}" for result in results)
        raise RunFailed(f"no trial ended with a usable model ({reasons})")
    return results


def _record(search: Search, done: dict[str, TrialRecord], inputs: TrialInputs, run: Run) -> None:
    summaries = [done[trial.name].summary() for trial in search.trials if trial.name in done]
    known = run.sweep.rounding if run.sweep else None
    rounding = inputs.base_outputs.rounding or known or rounding_of(run)
    run.write(SweepRecord(trials=summaries, rounding=rounding))


def _engine(config: RunConfig) -> Engine:
    """Import only the engine in use: importing TRL takes seconds."""
    if config.engine == "trl":
        from pairtune.engine import trl

        return trl
    from pairtune.engine import native

    return native


def _results_on_record(trials: list[TrialConfig], run: Run) -> dict[str, TrialRecord]:
    """The results of trials that earlier calls finished."""
    done = {}
    for trial in trials:
        record = run.read_trial(trial.name)
        if record is None:
            continue
        done[trial.name] = record.model_copy(deep=True)  # the search adds to it
        if record.trial != trial:
            file = run.paths.trial(trial.name).record
            raise RunFailed(f"{file}: the trial's settings differ from those in {run.paths.config}; undo the change")
    return done
