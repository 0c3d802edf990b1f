"""The stages of a run in their order. Each stage hands on through the run folder; `COMPLETE` is written last."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.console import Console

from pairtune.config import Resolved
from pairtune.data.prepare import PreparedData, prepare_data
from pairtune.evaluate.generations import compare_answers, held_out_prompts
from pairtune.models.load import LoadedBase, open_base
from pairtune.runs import RunFolder, write_atomic, write_json
from pairtune.sweep.run import run_sweep
from pairtune.sweep.select import install_best, select_best
from pairtune.track.live import LiveView
from pairtune.track.sinks import JsonlSink, Sinks


def tune(resolved: Resolved, console: Console) -> RunFolder:
    """Run everything from the data to the chosen model. Progress goes to `console`.

    Raises:
        BadInput: something given cannot be used; nothing was trained.
        RunFailed: the run stopped on one of its guards. The folder stays, without `COMPLETE`.
    """
    config = resolved.config
    console.print(f"opening {config.model}", highlight=False)
    base = open_base(config.model, config.dtype)
    data = _prepare(resolved, base, console)
    run = RunFolder.create(config.out)  # only now: bad input leaves nothing behind
    write_atomic(run.config, resolved.to_yaml())
    write_json(run.data, data.record)

    trials = [trial.name for trial in config.trials()]
    console.print(
        f"{len(trials)} trials x {config.epochs} epochs, {len(data.train)} training and {len(data.validation)} "
        f"validation pairs, {str(base.dtype).removeprefix('torch.')} on {base.device.type}",
        highlight=False,
    )
    with LiveView(trials, console) as live:
        results = run_sweep(config, data, base, run, Sinks([JsonlSink(run), live]))
    install_best(run, results, select_best(results, config.select, len(data.validation)))
    if config.samples:
        _write_generations(resolved, data, base, run, console)
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    write_atomic(run.complete, finished + "\n")
    return run


def _prepare(resolved: Resolved, base: LoadedBase, console: Console) -> PreparedData:
    with console.status("reading pairs") as status:
        data = prepare_data(
            resolved.config, base.tokenizer, lambda rows: status.update(f"reading pairs: {rows:,} rows")
        )
    for source in data.record["sources"]:
        for reason, rows in source["dropped"].items():
            console.print(f"{source['source']}: {rows} of {source['rows_in']} rows dropped: {reason}", highlight=False)
        if source["shortened"]:
            console.print(f"{source['source']}: {source['shortened']} prompts lost their oldest turns", highlight=False)
    return data


def _write_generations(
    resolved: Resolved, data: PreparedData, base: LoadedBase, run: RunFolder, console: Console
) -> None:
    """Answer held-out prompts with every model; the test split's prompts where there are some."""
    config = resolved.config
    prompts = held_out_prompts(data.test if len(data.test) else data.validation, config.samples)
    finished = [trial["name"] for trial in run.read_json(run.sweep)["trials"] if trial["status"] == "finished"]
    tuned = {name: run.trial(name).best for name in finished}
    with console.status("answering held-out prompts") as status:
        generations = compare_answers(
            base,
            tuned,
            prompts,
            config.seed,
            lambda name, done: status.update(f"answering held-out prompts: {name} {done}/{len(prompts)}"),
        )
    write_json(run.generations, generations)
