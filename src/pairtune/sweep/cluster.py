"""`--on`: the trials of a sweep as tasks of a Ray cluster (Moritz et al. 2018), over a run folder that all nodes see.

Each task trains some of the trials as a run of its own in `RUN/nodes/`, whose trials' folders are the run's. It writes
checkpoints there, so that Ray may start it again on another node if its own is lost: it goes on from the last one. The
process that asked reads what the tasks log, shows it, selects and reports, as if it had trained the trials itself.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairtune.config import RunConfig, TrialConfig
from pairtune.data.earlier import prompts_before
from pairtune.data.prepare import prepare_data
from pairtune.engine import native
from pairtune.engine.kernels import Kernels
from pairtune.engine.trial import TrialInputs, load_start
from pairtune.errors import BadInput, Interrupted, RunFailed, one_line
from pairtune.files import fingerprint, write_atomic
from pairtune.models.load import blank_model, weights_fingerprint
from pairtune.models.start import open_base_of
from pairtune.run.folder import Run
from pairtune.run.lock import writing
from pairtune.run.metrics import Evaluation, TrainingStep
from pairtune.run.records import DataRecord, TrialRecord
from pairtune.sweep.groups import lockstep_key, train_in_groups
from pairtune.track.sinks import JsonlSink, Sink

# How often Ray starts a task again whose node was lost.
_RETRIES = 3
# Seconds between looks at what tasks have logged.
_INTERVAL = 0.5
_STOP = "STOP"


def train_on_cluster(
    trials: Sequence[TrialConfig],
    config: RunConfig,
    run: Run,
    sink: Sink,
    pairs: int,
    stopping: Callable[[], bool],
) -> Iterator[list[TrialRecord]]:
    """Train trials on the cluster that the settings name.

    Args:
        trials: those that have no record yet, and others of the same search that were given to tasks with them.
        config: the run's settings.
        run: the run, in a folder that every node sees under the same path.
        sink: receives what the trials log.
        pairs: number of training pairs.
        stopping: whether the run was asked to stop; tasks then write a checkpoint and end.

    Yields:
        The records of the trials of each task, when it has ended.

    Raises:
        BadInput: there is no such cluster.
        RunFailed: a task failed, or its node was lost too often.
        Interrupted: the run was asked to stop.
    """
    import ray

    _connect(str(config.cluster))
    stop = run.paths.nodes / _STOP
    stop.unlink(missing_ok=True)
    try:
        options, slots = _resources(ray.nodes())
        slots = run.choices.nodes or slots
        run.remember(nodes=slots)
        task = ray.remote(**options, max_retries=_RETRIES, scheduling_strategy="SPREAD")(train_share)
        places = str(run.root.resolve()), str(Path.cwd())
        pending = {
            task.remote(*places, [each.model_dump_json() for each in share]): share for share in divided(trials, slots)
        }
        logs = {each.name: _Tail(run, each, pairs) for each in trials if run.read_trial(each.name) is None}
        interrupted = False
        while pending:
            ready, _ = ray.wait(list(pending), timeout=_INTERVAL)
            if stopping() and not stop.exists():
                write_atomic(stop, "")
            for log in logs.values():
                log.pass_on(sink)
            for reference in ready:
                share = pending.pop(reference)
                interrupted |= not _ended(reference)
                results = [record for each in share if (record := run.read_trial(each.name))]
                for result in results:
                    if logs.pop(result.name, None):
                        sink.finish(result.name, result.status, result.best_epoch)
                yield results
        if interrupted:
            raise Interrupted(f"interrupted; `pairtune resume {run.root}` continues on the cluster")
        shutil.rmtree(run.paths.nodes)
    except BaseException:
        run.paths.nodes.mkdir(exist_ok=True)
        write_atomic(stop, "")  # whatever ended this process ends its tasks
        raise
    finally:
        ray.shutdown()


def train_share(root: str, where: str, share: Sequence[str]) -> None:
    """What a task does: train some trials of a run, or go on with them.

    Args:
        root: the run's folder.
        where: the working directory of the process that asked, to which paths in the settings are relative.
        share: the settings of the trials, as JSON.

    Raises:
        BadInput: the node does not see the same folders or pairs, or another process trains these trials.
        RunFailed, Interrupted: as in `engine.native.run_trials`.
    """
    for folder in (root, where):
        if not Path(folder).is_dir():
            raise BadInput(
                f"--on: a node of the cluster does not see the folder {folder}; put it on a file system that all "
                "machines share"
            )
    os.chdir(where)
    run = Run(Path(root))
    config = run.settings
    trials = [TrialConfig.model_validate_json(each) for each in share]
    own = _own_run(run, [each.name for each in trials])
    with writing(own):
        own.forget_half_written()
        base = open_base_of(run)
        data = prepare_data(config, base.tokenizer, earlier=prompts_before(run))
        if run.need(DataRecord).splits != data.record.splits:
            raise BadInput(
                f"{run.paths.data}: a node sees other pairs than the run started with; share the data between the "
                "machines"
            )
        inputs = TrialInputs(
            base,
            weights_fingerprint(load_start(trials[0], base)),
            data.train,
            data.validation,
            config.select,
            probed=Kernels(blank_model(base.source), base.device, own.choices.kernels),
            checkpoint_steps=config.checkpoint_steps,
            stopping=(run.paths.nodes / _STOP).exists,
        )
        done = {each.name: record for each in trials if (record := run.read_trial(each.name))}
        for _ in train_in_groups(trials, done, native, inputs, own, JsonlSink(own), config.side_by_side):
            pass


def divided(trials: Sequence[TrialConfig], slots: int) -> list[list[TrialConfig]]:
    """Trials in shares for so many tasks at once; those that can run in lockstep stay together."""
    kinds: dict[Any, list[TrialConfig]] = {}
    for trial in trials:
        kinds.setdefault(lockstep_key(trial), []).append(trial)
    shares = []
    for alike in kinds.values():
        size = math.ceil(len(alike) / max(1, slots // len(kinds)))
        shares += [alike[start : start + size] for start in range(0, len(alike), size)]
    return shares


def rounding_of(run: Run) -> Any:
    """How much of a pair's margin is rounding, as one of the tasks measured it; None if none has."""
    for root in sorted(run.paths.nodes.iterdir() if run.paths.nodes.is_dir() else ()):
        if (sweep := Run(root).sweep) and sweep.rounding:
            return sweep.rounding
    return None


def _own_run(run: Run, names: Sequence[str]) -> Run:
    """The run folder of a task: its own checkpoint, lock and machine choices; the run's trials and references."""
    root = run.paths.nodes / fingerprint(names)
    own = Run(root)
    root.mkdir(parents=True, exist_ok=True)
    for shared in (run.paths.trials, run.paths.reference):
        shared.mkdir(exist_ok=True)
        link = root / shared.name
        if not link.is_symlink():
            link.symlink_to(Path("..", "..", shared.name), target_is_directory=True)
    if not own.paths.environment.is_file():
        shutil.copyfile(run.paths.environment, own.paths.environment)
    return own


def _connect(address: str) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    where = "auto" if address == "ray" else address
    try:
        ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise BadInput(
            f"--on {address}: no Ray cluster answers there ({one_line(error)}); start one with `ray start --head`"
        ) from error


def _resources(nodes: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], int]:
    """What a task asks for, and how many run at once: a GPU each, or where there are none a node's CPUs."""
    found = [each["Resources"] for each in nodes if each["Alive"]]
    if gpus := int(sum(each.get("GPU", 0) for each in found)):
        return {"num_gpus": 1, "num_cpus": 1}, gpus
    cpus = [int(each["CPU"]) for each in found if each.get("CPU", 0) >= 1]
    if not cpus:
        raise BadInput(
            "--on: the Ray cluster has neither GPUs nor CPUs for tasks; add a machine that has (ray start --address)"
        )
    return {"num_cpus": min(cpus)}, len(cpus)


def _ended(reference: Any) -> bool:
    """Whether a task has trained all its trials; False: it was asked to stop before.

    Raises:
        RunFailed: it failed.
    """
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Interrupted):
            return False
        if isinstance(cause, BadInput | RunFailed):
            raise type(cause)(str(cause)) from None
        raise RunFailed(f"a task of the cluster failed: {one_line(error)}") from error
    except ray.exceptions.RayError as error:
        raise RunFailed(
            f"a task was started {_RETRIES + 1} times, and its node lost each time ({one_line(error)}); `pairtune "
            "resume` continues from its checkpoint"
        ) from error
    return True


@dataclass
class _Tail:
    """Passes on what a trial logs on another node."""

    run: Run
    trial: TrialConfig
    pairs: int
    lines: int = 0
    started: bool = False

    def pass_on(self, sink: Sink) -> None:
        """Pass on new lines; if a task went back to its checkpoint, say so first."""
        if not self.run.paths.trial(self.trial.name).metrics.is_file():
            return
        log = self.run.log(self.trial.name)
        both: list[TrainingStep | Evaluation] = [*log.steps, *log.evaluations]
        found = sorted(both, key=lambda line: (line.step, isinstance(line, Evaluation)))
        if not self.started or len(found) < self.lines:
            # What an earlier part of the run logged is not passed on again.
            steps = max((line.step for line in found), default=0)
            total = math.ceil(self.pairs / self.trial.batch_size) * self.trial.epochs
            sink.start(self.trial.name, total, steps, len(found))
            self.started, self.lines = True, len(found)
        for line in found[self.lines :]:
            sink.log(self.trial.name, line)
        self.lines = len(found)
