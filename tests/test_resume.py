"""A stopped run resumes to the same bits: from any point between two steps, and from any moment at all."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import random
import resource
import signal
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Lines, make_pair, write_pairs
from rich.console import Console

from pairtune.config import RunConfig, TrialConfig
from pairtune.data.table import PairTable
from pairtune.engine import native
from pairtune.engine.trial import BaseOutputs, TrialInputs, load_start
from pairtune.errors import Interrupted, RunFailed
from pairtune.models.load import weights_fingerprint
from pairtune.pipeline import stop_on_signals
from pairtune.run.folder import Run
from pairtune.sweep.run import run_sweep
from pairtune.sweep.search import open_search
from pairtune.track.sinks import JsonlSink

# How many moments `test_a_killed_run_...` tries; `make chaos` tries more.
MOMENTS = int(os.environ.get("PAIRTUNE_CHAOS_MOMENTS", "20"))


def trial(**changes):
    settings = {"learning_rate": 3e-3, "beta": 0.1, "epochs": 2, "dtype": "float32", "lora_rank": 2, **changes}
    return TrialConfig(**settings)


@pytest.fixture
def inputs(tiny_base):
    pairs = [make_pair(number, rejected="No {0}" * (number % 3 + 1)) for number in range(7)]
    tables = [PairTable.of(each, tiny_base.tokenizer) for each in (pairs[:5], pairs[5:])]
    start = weights_fingerprint(load_start(trial(), tiny_base))
    return TrialInputs(tiny_base, start, *tables, "eval_loss", checkpoint_steps=2)


def content(root: Path) -> dict[str, str]:
    """Hash all files that a trial leaves, except those that contain times."""
    kept = [path for path in root.rglob("*") if path.is_file() and path.name not in ("trial.json", "sweep.json")]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def stopping_at(call: int):
    """A stop callback that returns true from the n-th call on."""
    calls = count(1)
    return lambda: next(calls) >= call


GRIDS = {
    "side by side": [trial(epochs=1), trial(beta=0.3, loss="ipo"), trial(learning_rate=1e25)],
    "dropout": [trial(lora_dropout=0.4)],
    "full": [trial(method="full", learning_rate=1e-3)],
    "8 bits": [trial(method="full", learning_rate=1e-3, optimizer="adamw-8bit")],
}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_run_can_stop_between_any_two_steps(inputs, tmp_path, grid):
    trials = GRIDS[grid]
    whole = Run(tmp_path / "whole")
    expected = native.run_trials(trials, inputs, whole, JsonlSink(whole))
    assert [result.status for result in expected].count("finished") >= 1
    assert not whole.paths.checkpoint.exists()
    stops = 0
    for call in range(1, 100):
        run = Run(tmp_path / str(call))
        again = replace(inputs, stopping=stopping_at(call), base_outputs=BaseOutputs())
        try:
            native.run_trials(trials, again, run, JsonlSink(run))
            break
        except Interrupted as stop:
            stops += 1
            assert f"`pairtune resume {run.root}`" in str(stop)
        results = native.run_trials(trials, replace(inputs, base_outputs=BaseOutputs()), run, JsonlSink(run))
        assert content(run.root) == content(whole.root), f"stopped at call {call}"
        assert [result.epochs for result in results] == [result.epochs for result in expected]
        assert [result.train_pairs for result in results] == [result.train_pairs for result in expected]
    assert stops >= 2 * 3 + 2, "between all steps, and in evaluations"


def test_a_stopped_run_goes_on_from_its_checkpoint_and_not_from_the_start(inputs, tmp_path):
    run, lines = Run(tmp_path), Lines()
    with pytest.raises(Interrupted):
        native.run_trials([trial()], replace(inputs, stopping=lambda: len(lines.of[trial().name]) == 2), run, lines)
    assert [result.trial.name for result in native.checkpointed(run)] == [trial().name]
    more = Lines()
    native.run_trials([trial()], inputs, run, more)
    assert [line["step"] for line in more.of[trial().name]] == [3, 3, 4, 5, 6, 6]


def interrupted(inputs, run, trials):
    with pytest.raises(Interrupted):
        native.run_trials(trials, replace(inputs, base_outputs=BaseOutputs(), stopping=stopping_at(6)), run, Lines())


def test_a_damaged_checkpoint_is_never_trusted(inputs, tmp_path):
    run = Run(tmp_path)
    interrupted(inputs, run, [trial()])
    whole = run.paths.checkpoint.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        run.paths.checkpoint.write_bytes(whole[:length])
        with pytest.raises(RunFailed, match="the checkpoint is damaged; remove it"):
            native.run_trials([trial()], inputs, run, Lines())


def test_a_checkpoint_of_other_settings_is_refused(inputs, tmp_path):
    run = Run(tmp_path)
    interrupted(inputs, run, [trial()])
    with pytest.raises(RunFailed, match="belongs to other settings, other pairs or another base model"):
        native.run_trials([trial(max_grad_norm=0.5)], inputs, run, Lines())
    (run.paths.reference / "train.safetensors").unlink()  # it would be refused first
    with pytest.raises(RunFailed, match="belongs to other settings, other pairs or another base model"):
        native.run_trials([trial()], replace(inputs, train=inputs.train[:4], base_outputs=BaseOutputs()), run, Lines())


def test_a_full_disk_stops_the_run_with_the_last_checkpoint_intact(inputs, tmp_path):
    """A file size limit simulates the disk: a write beyond it fails as on a full disk."""
    run = Run(tmp_path)
    interrupted(inputs, run, [trial()])
    before = run.paths.checkpoint.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1000, limit[1]))
        with pytest.raises(RunFailed, match="the checkpoint cannot be written .*; free some disk space, then"):
            native.run_trials([trial()], inputs, run, Lines())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert run.paths.checkpoint.read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    native.run_trials([trial()], inputs, run, Lines())


def test_the_first_ctrl_c_asks_and_the_second_stops_at_once():
    said, before = io.StringIO(), signal.getsignal(signal.SIGINT)
    with stop_on_signals(Console(file=said)) as stopping:
        assert not stopping()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping()
        assert "interrupt again to stop at once" in said.getvalue()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def carry_on(out: Path, settings: dict) -> None:
    """The child process: start the run, or resume it."""
    import torch

    from pairtune.pipeline import resume, tune
    from pairtune.resolve_config import resolve

    torch.set_num_threads(1)
    quiet = Console(quiet=True)
    if out.exists():
        resume(out, quiet)
    else:
        tune(resolve(None, {**settings, "out": out}), quiet)


@pytest.fixture(scope="module")
def children():
    """Start children with all imports done, so that a kill hits the work, not the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pairtune.pipeline", "pairtune.engine.native", "transformers.models.llama"])
    return context


def test_a_killed_run_goes_on_to_the_same_bits(children, tiny_model, tmp_path):
    """SIGKILL at random moments; whatever was being written, the resumed run ends like the undisturbed one."""
    settings = {
        "model": str(tiny_model),
        "data": str(write_pairs(tmp_path / "train.jsonl", range(8))),
        "eval_data": str(write_pairs(tmp_path / "held.jsonl", range(20, 24))),
        "learning_rate": [3e-3, 1e-3],
        "loss": ["sigmoid", "ipo"],
        "beta": [0.1],
        "epochs": 2,
        "lora_rank": 2,
        "side_by_side": 2,
        "checkpoint_steps": 2,
        "dtype": "float32",
        "samples": 0,
    }

    def start(out):
        child = children.Process(target=carry_on, args=(out, settings))
        child.start()
        return child

    for name in ("warm-up", "whole"):  # the first one fills the caches
        started = time.monotonic()
        child = start(tmp_path / name)
        child.join(120)
        assert child.exitcode == 0
    duration = time.monotonic() - started
    expected = content(tmp_path / "whole" / "trials") | content(tmp_path / "whole" / "best")
    drawn = random.Random(0)
    killed = 0
    for number in range(MOMENTS):
        out = tmp_path / str(number)
        child = start(out)
        child.join(drawn.uniform(0.1, 1) * duration)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            killed += 1
        else:  # the machine is less busy than when the undisturbed run was timed
            duration *= 0.8
        child.join()
        child = start(out)
        child.join(120)
        assert child.exitcode == 0, f"moment {number}"
        assert (out / "COMPLETE").is_file()
        assert not list(out.rglob(".*.tmp"))
        assert content(out / "trials") | content(out / "best") == expected, f"moment {number}"
    assert killed > MOMENTS / 2


def swept(inputs, folder, stopping):
    """A grid of four trials in two groups, some of them stopped by successive halving."""
    folder.mkdir(exist_ok=True)
    settings = {"data": "x", "learning_rate": [1e-5, 3e-3, 1e-4, 3e-2], "beta": [0.1], "epochs": 3, "lora_rank": 2}
    config = RunConfig(**settings, prune=True, side_by_side=2, dtype="float32")
    data = SimpleNamespace(train=inputs.train, validation=inputs.validation)
    run = Run(folder)
    results = run_sweep(config, open_search(config), data, inputs.base, run, JsonlSink(run), None, stopping)
    return [(each.trial.name, each.status, each.reason, each.best_epoch, each.epochs) for each in results]


def test_a_pruned_grid_ends_as_if_it_had_not_been_interrupted(inputs, tmp_path):
    """A trial is compared with those judged before it, including those before the interruption."""
    expected = swept(inputs, tmp_path / "whole", lambda: False)
    assert {status for _, status, *_ in expected} == {"finished", "pruned"}
    for call in range(1, 200):
        folder = tmp_path / str(call)
        try:
            swept(inputs, folder, stopping_at(call))
            break
        except Interrupted:
            assert swept(inputs, folder, lambda: False) == expected, f"stopped at call {call}"
    assert call > 20
