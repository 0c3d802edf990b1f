"""Runs the trials of a sweep from pristine weights: in lockstep where they can share work, else one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from pairtune.config import RunConfig, TrialConfig
from pairtune.data.prepare import PreparedData
from pairtune.engine.kernels import Kernels
from pairtune.engine.trial import TrialInputs, always_false, load_start
from pairtune.errors import RunFailed
from pairtune.models.load import LoadedBase, weights_fingerprint
from pairtune.run.folder import Run
from pairtune.run.records import SweepRecord, TrialRecord
from pairtune.sweep.search import Search
from pairtune.track.sinks import Sink

# Settings in which trials in lockstep may differ. All others must be equal: these trials share one pass over the same
# pairs in the same order, and their adapters have one shape.
_MAY_DIFFER = {
    "learning_rate",
    "beta",
    "loss",
    "label_smoothing",
    "sft_weight",
    "simpo_gamma",
    "discopop_tau",
    "epochs",
    "max_grad_norm",
    "patience",
}


class Engine(Protocol):
    """What `engine.native` and `engine.trl` have in common."""

    def run_trials(self, trials: list[TrialConfig], inputs: TrialInputs, run: Run, sink: Sink) -> list[TrialRecord]:
        """Train trials side by side."""

    def checkpointed(self, run: Run) -> list[TrialRecord]:
        """The records of the trials that can resume from the run's checkpoint, as of that checkpoint."""

    def width(self, trial: TrialConfig, inputs: TrialInputs, asked: int | None) -> int:
        """How many trials like this one run side by side."""


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
    inputs = TrialInputs(
        base,
        weights_fingerprint(load_start(config.trials()[0], base)),
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
        groups = _groups(batch, done, engine, inputs, run, config.side_by_side)
        if (
            not groups and inputs.processes.first
        ):  # the run may have been killed right after its last trial's own record
            _record(search, done, inputs, run)
            run.paths.checkpoint.unlink(missing_ok=True)
        for group in groups:
            for result in engine.run_trials(group, inputs, run, sink):
                done[result.trial.name] = result
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
    rounding = inputs.base_outputs.rounding or (run.sweep.rounding if run.sweep else None)
    run.write(SweepRecord(trials=summaries, rounding=rounding))


def lockstep_key(trial: TrialConfig) -> Any:
    """A key that is equal for trials that can run in lockstep."""
    if trial.method == "full":
        return trial.name
    return tuple((name, value) for name, value in trial if name not in _MAY_DIFFER)


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


def _groups(
    trials: list[TrialConfig],
    done: dict[str, TrialRecord],
    engine: Engine,
    inputs: TrialInputs,
    run: Run,
    asked: int | None,
) -> list[list[TrialConfig]]:
    """The trials left to run, in lockstep groups; those in the checkpoint come first."""
    held = [result.trial.name for result in engine.checkpointed(run)]
    groups = []
    if any(trial.name in held and trial.name not in done for trial in trials):
        groups.append([trial for trial in trials if trial.name in held])
    by_kind: dict[Any, list[TrialConfig]] = {}
    for trial in trials:
        if trial.name not in done and not any(trial in group for group in groups):
            by_kind.setdefault(lockstep_key(trial), []).append(trial)
    for alike in by_kind.values():
        width = engine.width(alike[0], inputs, asked or run.choices.side_by_side)
        if inputs.processes.first:
            run.remember(side_by_side=width)
        rounds = -(-len(alike) // width)
        width = -(-len(alike) // rounds)  # five trials where four fit: three and two, not four and one
        groups += [alike[start : start + width] for start in range(0, len(alike), width)]
    return groups
