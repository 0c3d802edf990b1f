"""The stages of a run, in order. Stages communicate through the run folder; `COMPLETE` is written last."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
from rich.console import Console

from pairtune.budget import check_divided, expected, fitted
from pairtune.config import RunConfig, TrialConfig, flag_of
from pairtune.data.earlier import Earlier, keep_prompts, prompts_before, prompts_of_round
from pairtune.data.prepare import PreparedData, prepare_data
from pairtune.engine.kernels import Kernels
from pairtune.engine.lora import check_targets, settings_of_adapter
from pairtune.engine.processes import Processes
from pairtune.environment import describe_environment
from pairtune.errors import BadInput, RunFailed, plural
from pairtune.evaluation.audit.check import audit
from pairtune.evaluation.audit.monitor import LiveAudit
from pairtune.evaluation.audit.own_runs import evidence_of_run
from pairtune.evaluation.generations import MOST, AnsweringModels, Prompt, affordable, compare_answers, held_out_prompts
from pairtune.extras import require
from pairtune.files import write_atomic
from pairtune.models.load import LoadedBase, blank_model, check_adapter, device_name, pick_device
from pairtune.models.start import Start, open_base_of, open_start
from pairtune.publish.export import Format
from pairtune.publish.hub import push_run
from pairtune.report.render_plan import time_range
from pairtune.report.write import shared_report, write_report
from pairtune.resolve_config import Resolved, resolve
from pairtune.run.examples import Examples
from pairtune.run.folder import Run
from pairtune.run.lock import writing
from pairtune.run.records import (
    AnswersRecord,
    BaseModelRecord,
    Choosing,
    DataRecord,
    Environment,
    Finding,
    Generations,
    Selection,
    SweepRecord,
    TrialRecord,
)
from pairtune.sweep.final import evaluate_test
from pairtune.sweep.regressions import find_regressions
from pairtune.sweep.run import run_sweep
from pairtune.sweep.search import Search, open_search
from pairtune.sweep.select import (
    best_examples,
    install_best,
    rounding_warnings,
    select_best,
    summarise_best,
)
from pairtune.track.live_view import LiveView
from pairtune.track.sinks import JsonlSink, Sink, Sinks
from pairtune.track.starved import StarvedSink
from pairtune.track.time_left import ProgressSink, TimeLeft, forget_process
from pairtune.track.trackers import TrackerSink, check_trackers

R = TypeVar("R", bound=AnswersRecord)

_HIGHEST_RATE = 0.1  # tiny models, in tests and courses, learn at rates up to here


def tune(resolved: Resolved, console: Console) -> Run | None:
    """Run the whole pipeline, from the data to the selected model. Progress goes to `console`.

    Returns:
        The run; None in every process but the first.

    Raises:
        BadInput: an input cannot be used; nothing was trained.
        RunFailed: a guard stopped the run. The folder is kept, without `COMPLETE`.
        Interrupted: the run was asked to stop; `resume` continues it.
    """
    start, data, processes, console = _open(resolved.config, console)
    base = start.base
    if start.lineage is None:  # so that resuming, serving and repeating the run use the same files of the Hub
        pinned = resolved.config.model_copy(update={"model": base.source.pinned})
        resolved = replace(resolved, config=pinned)
    if base.adapter:
        check_adapter(base.adapter, blank_model(base.source))
        resolved = with_settings_of_adapter(resolved, base.adapter)
    if resolved.config.push and resolved.config.method == "lora" and base.source.hub_id is None:
        raise BadInput(
            f"--push {resolved.config.push}: the base model exists only on this machine, so nobody else could load the "
            "adapter; tune a model from the Hub, or push the merged model afterwards (pairtune push RUN --what merged)"
        )
    if resolved.config.select == "fewer_faults" and not held_out_prompts(data.validation, 1):
        raise BadInput(
            "--select fewer_faults: every validation prompt comes with tools, so that none can be answered in text; "
            "select by eval_loss, accuracy or margin"
        )
    if resolved.config.lora_targets and not base.adapter:
        check_targets(blank_model(base.source), resolved.config.lora_targets)
    if processes.first:
        resolved = fitted(resolved, base, data.train, processes.count, console)
    resolved = processes.from_first(resolved)
    if resolved.config.dtype != "auto":
        base = replace(base, dtype=getattr(torch, resolved.config.dtype))
    run = Run(processes.from_first(resolved.config.out))
    held = ExitStack()

    def write(run: Run) -> None:
        held.enter_context(writing(run))
        write_atomic(run.paths.config, resolved.to_yaml())
        run.write(data.record)
        data.index().write(run.paths.pairs)
        run.write(_environment(base))
        start.keep(run)
        if start.run:
            keep_prompts(run, prompts_of_round(start.run))

    with held:
        if processes.first:
            Run.create(run.root, write)  # only now, so that bad input leaves nothing behind
        processes.wait()
        if base.adapter:
            base = replace(base, adapter=run.paths.start)
        return _carry_out(resolved.config, base, data, run, processes, console)


def resume(root: Path, console: Console) -> Run | None:
    """Continue a run that was interrupted or killed; a complete run is returned as it is.

    Returns:
        As `tune`.

    Raises:
        BadInput: there is no such run, or its data has changed.
        RunFailed, Interrupted: as in `tune`.
    """
    run = Run.started(root)
    if run.complete:
        return run
    config = resolve(run.paths.config, {"out": root}).config
    first = Processes(pick_device()).first
    with writing(run) if first else nullcontext():
        if first:
            run.forget_half_written()
        start, data, processes, console = _open(config, console, run)
        before, now = run.need(DataRecord), data.record
        # The example shows whether pairs are still rendered the same way.
        if before.splits != now.splits or before.example not in (None, now.example):
            raise BadInput(f"{run.paths.data}: the pairs have changed since the run started; start a new run")
        processes.wait()
        return _carry_out(config, start.base, data, run, processes, console)


def with_settings_of_adapter(resolved: Resolved, adapter: Path) -> Resolved:
    """A new run's settings, with those of the adapter that its trials train further.

    Raises:
        BadInput: other settings were given, or the adapter cannot be trained further.
    """
    found = settings_of_adapter(adapter)
    has = {"lora_rank": found.rank, "lora_alpha": found.alpha, "rslora": found.rslora, "lora_targets": found.targets}
    config = resolved.config
    for name, value in has.items():
        given = config.dimensions.get(name, [getattr(config, name)])
        if not resolved.origins[name].startswith("default") and given != [value]:
            raise BadInput(
                f"{flag_of(name)} {given[0]}: the adapter that is trained further has {value}; omit the flag, or use "
                "--on-top new"
            )
    if any(each.lora_dropout for each in config.trials()):
        raise BadInput(
            "--lora-dropout: would drop parts of what the adapter has learned, so that the trials would not start at "
            "it; omit the flag, or use --on-top new"
        )
    return resolved.with_chosen(has, f"the adapter of {config.model}")


def _open(
    config: RunConfig, console: Console, run: Run | None = None
) -> tuple[Start, PreparedData, Processes, Console]:
    """Open the base model and the pairs, and set up the processes, of which only the first one prints.

    A resumed run keeps the dtype and the number of threads chosen for it.
    """
    _check_extras(config)
    threads = run.choices.threads if run else None
    if threads and threads <= torch.get_num_threads():
        torch.set_num_threads(threads)
    base_device = pick_device()
    processes = Processes(base_device)
    if config.engine == "trl" and processes.count > 1:
        raise BadInput(
            "--engine trl: runs in a single process; start it without the launcher, or use --engine pairtune"
        )
    if processes.count > 1:
        check_divided(config)
    console = console if processes.first else Console(quiet=True)
    console.print(f"opening {config.model}", highlight=False)
    with processes.first_before_others():
        if run:
            start, earlier = Start(open_base_of(run)), prompts_before(run)
        else:
            start = open_start(config.model, config.dtype, config.on_top, config.reference, config.method)
            earlier = prompts_of_round(start.run) if start.run else {}
        data = _prepare(config, start.base, earlier, console)
    return start, data, processes, console


def _check_extras(config: RunConfig) -> None:
    """Make sure that what the settings need is installed, before anything else is done."""
    check_trackers(config.track)
    if config.engine == "trl":
        require("trl", "--engine trl")
    if config.search != "grid":
        require("search", f"--search {config.search}")
    if config.prune:
        require("search", "--prune")
    if config.cluster:
        require("ray", "--on")
    if any(trial.optimizer == "adamw-8bit" for trial in config.trials()):
        require("8bit", "--optimizer adamw-8bit")


def _carry_out(
    config: RunConfig,
    base: LoadedBase,
    data: PreparedData,
    run: Run,
    processes: Processes,
    console: Console,
) -> Run | None:
    """Run every stage after the data, or those that are left."""
    try:
        kernels = _choose_kernels(config, base, run, processes, console)
        search = open_search(config)
        results, progress, trackers = _train(config, base, data, run, processes, console, search, kernels)
        selection: Selection | None = None
        if progress:
            progress.stage("comparing the trials")
            selection = _select(config, base, data, run, results, console)
        selection = processes.from_first(selection)
        assert selection is not None  # noqa: S101 - the first process sets it
        if len(data.test) and not processes.from_first(run.paths.test.is_file()):
            if progress:
                progress.stage("evaluating the test pairs")
            _test(search.trial(selection.winner), selection, data, base, run, kernels, console)
        if progress:
            if config.samples != 0:
                progress.stage("answering held-out prompts")
                _write_generations(config, data, base, run, console)
            progress.stage("writing the report")
            _conclude(data, run, selection, trackers)
            if config.push:
                _push(config, config.push, run, console)
        processes.wait()
    finally:
        if processes.first:
            forget_process(run)
    return run if processes.first else None


def _train(
    config: RunConfig,
    base: LoadedBase,
    data: PreparedData,
    run: Run,
    processes: Processes,
    console: Console,
    search: Search,
    kernels: Kernels,
) -> tuple[list[TrialRecord], ProgressSink | None, list[TrackerSink]]:
    """Train all trials, or those that are left.

    Returns:
        The records of the trials, and the sinks that later stages report to; in the first process only.
    """
    planned = config.trials() if config.search == "grid" else []  # other searches propose trials as they go
    steps = {each.name: math.ceil(len(data.train) / each.batch_size) * each.epochs for each in planned}
    shared = f" in {processes.count} processes" if processes.count > 1 else ""
    console.print(
        f"{plural(search.count, 'trial')}, {len(data.train):,} training and "
        f"{plural(len(data.validation), 'validation answer' if config.unpaired else 'validation pair')}, "
        f"{str(base.dtype).removeprefix('torch.')} on {base.device.type}{shared}",
        highlight=False,
    )
    for warning in _odd_settings(planned, len(data.train)):
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    epochs = {each.name: each.epochs for each in planned}
    cost = expected(config, base, data) if processes.count == 1 else None
    if cost and cost.seconds:
        console.print(f"expected: {time_range(cost)}, {cost.memory_gb:.1f} GB of memory", highlight=False)
    left = TimeLeft(
        steps,
        epochs,
        search.count,
        len(data.validation) / max(1, config.batch_size),
        config.epochs,
        (cost.step_seconds, cost.evaluation_seconds) if cost and cost.seconds else None,
    )
    for trial in run.trials:
        if trial.record:  # a resumed run does not start it again
            left.finish(trial.name, trial.status, trial.best_epoch)
    progress = ProgressSink(run, left) if processes.first else None
    with stop_on_signals(console) as stopping, LiveView(steps, search.count, left, console) as live:
        warn = partial(console.print, style="yellow", highlight=False, soft_wrap=True)
        watching = LiveAudit(run, search.trial, partial(_print_finding, console))
        trackers = _trackers(config, search, run, processes, console)
        sinks: list[Sink] = [left, live, progress, watching, StarvedSink(warn), *trackers] if progress else []
        if progress and not config.cluster:  # on a cluster, each task writes the logs of its trials
            sinks.insert(1, JsonlSink(run))
        try:
            results = run_sweep(config, search, data, base, run, Sinks(sinks), kernels, stopping)
        finally:
            for tracker in trackers:
                tracker.interrupt()  # does nothing once all trials have ended
    return results, progress, trackers


def _odd_settings(trials: Sequence[TrialConfig], pairs: int) -> list[str]:
    """Settings that are allowed, but hardly meant."""
    found = []
    if (most := max((each.batch_size for each in trials), default=0)) > pairs:
        found.append(f"--batch-size {most}: there are only {pairs:,} to train on, so that each epoch is one step")
    if (rate := max((each.learning_rate for each in trials), default=0.0)) > _HIGHEST_RATE:
        found.append(f"--lr {rate:g}: is far above what fine-tuning uses (1e-6 to 1e-3); a digit may be missing")
    return found


def _select(
    config: RunConfig,
    base: LoadedBase,
    data: PreparedData,
    run: Run,
    results: Sequence[TrialRecord],
    console: Console,
) -> Selection:
    """Select the best trial, and install its weights."""
    wins = _wins_on_validation(config, data, base, run, console) if config.select == "fewer_faults" else None
    examples = best_examples(run, results)
    records = {name: each.metrics for name, each in examples.items()}
    first = next(iter(examples.values()))
    chosen = select_best(results, records, config.select, wins, first.groups, first.cases)
    warnings = chosen.warnings + rounding_warnings(run.need(SweepRecord), chosen)
    selection = chosen.model_copy(update={"examples": summarise_best(examples), "warnings": warnings})
    if not run.paths.test.is_file():  # else a killed run had got past this point: its selection stands
        install_best(run, results, selection)
    return selection


def _test(
    trial: TrialConfig,
    selection: Selection,
    data: PreparedData,
    base: LoadedBase,
    run: Run,
    kernels: Kernels,
    console: Console,
) -> None:
    """Evaluate the selected trial on the test pairs."""
    total = len(data.test)
    with console.status("evaluating the test pairs") as status:
        evaluate_test(
            trial,
            selection,
            data.test,
            base,
            run,
            kernels,
            lambda done: status.update(f"evaluating the test pairs: {done}/{total}"),
        )


def _conclude(data: PreparedData, run: Run, selection: Selection, trackers: Sequence[TrackerSink]) -> None:
    """Audit the run, report it, and mark it as complete."""
    _write_regressions(data, run, selection)
    run.write(audit(evidence_of_run(run.root)))
    ended = datetime.now(UTC)
    write_report(run, ended)
    if trackers:
        shared = shared_report(run, prompts=run.settings.share_prompts, ended=ended).html
        for tracker in trackers:
            tracker.conclude(run, selection, shared)
    run.paths.progress.unlink(missing_ok=True)
    run.mark_complete(ended)


def _choose_kernels(config: RunConfig, base: LoadedBase, run: Run, processes: Processes, console: Console) -> Kernels:
    """Choose how this machine computes matrix products, and record it so that a resumed run does the same."""
    kernels = Kernels(blank_model(base.source), base.device, run.choices.kernels)
    with console.status("probing this machine's matrix products"):
        for dtype in {base.dtype, getattr(torch, config.eval_dtype or str(base.dtype).removeprefix("torch."))}:
            kernels.probe(dtype)
    if processes.first:
        run.remember(
            dtype=str(base.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            kernels=kernels.record(),
        )
    processes.wait()
    return kernels


@contextmanager
def stop_on_signals(console: Console) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C or SIGTERM stop the run after its step, with a checkpoint, and a second one at once.

    Yields:
        A function that tells whether the run was asked to stop.
    """
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        console.print("stopping after this step, with a checkpoint; interrupt again to stop at once", highlight=False)

    if threading.current_thread() is not threading.main_thread():  # signals can be handled only there
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(base: LoadedBase) -> Environment:
    source = base.source
    described = BaseModelRecord(
        name=source.name, hub_id=source.hub_id, revision=source.revision, license=source.licence
    )
    return describe_environment(device_name(base.device), described)


def _prepare(config: RunConfig, base: LoadedBase, earlier: Earlier, console: Console) -> PreparedData:
    with console.status("reading pairs") as status:
        data = prepare_data(
            config, base.tokenizer, lambda rows: status.update(f"reading pairs: {rows:,} rows"), earlier
        )
    for source in data.record.sources:
        for reason, rows in source.dropped.items():
            console.print(
                f"{source.source}: {rows:,} of {plural(source.rows_in, 'row')} dropped: {reason}", highlight=False
            )
        if source.shortened:
            console.print(
                f"{source.source}: oldest turns removed from {plural(source.shortened, 'prompt')}", highlight=False
            )
    for given in config.sources:
        if given.columns or config.columns:
            better = data.record.better.get(given.source, "")
            console.print(f"{given.source}: the better answer: {better}", highlight=False, soft_wrap=True)
    for name, unused in data.record.unused.items():
        fields = ", ".join(f"{field} ({plural(rows, 'row')})" for field, rows in unused.items())
        console.print(f"{name}: not used: {fields}", highlight=False, soft_wrap=True)
    for name, notes in data.record.notes.items():
        for note, rows in notes.items():
            console.print(f"{name}: {note}: {plural(rows, 'row')}", highlight=False, soft_wrap=True)
    for warning in data.record.template_warnings:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    return data


def _trackers(config: RunConfig, search: Search, run: Run, processes: Processes, console: Console) -> list[TrackerSink]:
    def say(message: str) -> None:
        console.print(message, highlight=False, soft_wrap=True)

    return [TrackerSink(name, run, search.trial, say) for name in config.track] if processes.first else []


def _push(config: RunConfig, repo: str, run: Run, console: Console) -> None:
    """Publish the finished run; a failure here leaves it complete."""
    what: Format = "adapter" if config.method == "lora" else "merged"
    try:
        with console.status(f"pushing to {repo}"):
            pushed = push_run(run, repo, what)
    except (BadInput, RunFailed) as error:
        raise RunFailed(
            f"{error} (the run is complete; `pairtune push {run.root} --repo {repo}` tries again)"
        ) from error
    console.print(pushed.url, highlight=False)


def _print_finding(console: Console, finding: Finding) -> None:
    names = ", ".join(finding.trials)
    console.print(
        f"{finding.level}: {names}: {finding.title.lower()} ({finding.evidence})", highlight=False, soft_wrap=True
    )


def _write_generations(config: RunConfig, data: PreparedData, base: LoadedBase, run: Run, console: Console) -> None:
    """Answer held-out prompts with every model: the test split's where there is one, else the validation split's."""
    if run.paths.generations.is_file():
        return
    prompts = held_out_prompts(data.test if len(data.test) else data.validation, config.samples or MOST)
    if not prompts:
        console.print("no held-out prompt was answered: all of them come with tools", highlight=False)
        return
    models = _answering_models(base, run)
    if config.samples is None:
        seconds = sum(trial.record.own_seconds for trial in run.trials if trial.record)
        prompts = prompts[: affordable(models, prompts, seconds, config.seed)]
    run.write(_answer(Generations, models, prompts, config.seed, console))


def _write_regressions(data: PreparedData, run: Run, selection: Selection) -> None:
    """Record the held-out pairs on which tuning hurt: the test split's, or else the validation split's."""
    tested = run.paths.test_examples.is_file()
    split, pairs = ("test", data.test) if tested else ("validation", data.validation)
    evaluated = run.paths.trial(selection.winner).examples(selection.best_epoch)
    run.write(find_regressions(split, pairs, Examples.read(run.paths.test_examples if tested else evaluated)))


def _wins_on_validation(
    config: RunConfig, data: PreparedData, base: LoadedBase, run: Run, console: Console
) -> dict[str, list[float]]:
    """Every finished trial's scores against the base on validation prompts, for `--select fewer_faults`."""
    if run.get(Choosing) is None:
        prompts = held_out_prompts(data.validation, config.samples or MOST)
        run.write(_answer(Choosing, _answering_models(base, run), prompts, config.seed, console))
    models = run.need(Choosing).models
    return {name: model.win_rate.scores for name, model in models.items() if model.win_rate}


def _answering_models(base: LoadedBase, run: Run) -> AnsweringModels:
    """The base model, and the best epoch of every finished trial."""
    trials = run.need(SweepRecord).trials
    return AnsweringModels(
        base, {each.name: run.paths.trial(each.name).best for each in trials if each.status == "finished"}
    )


def _answer(kind: type[R], models: AnsweringModels, prompts: Sequence[Prompt], seed: int, console: Console) -> R:
    """Let every model answer the prompts."""
    total = len(prompts) * len(models.names)
    with console.status("answering held-out prompts") as status:
        return compare_answers(
            kind, models, prompts, seed, lambda done: status.update(f"answering held-out prompts: {done}/{total}")
        )
