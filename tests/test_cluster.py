"""A grid on a Ray cluster of two nodes, of which one is lost: the same results as on one machine."""

from __future__ import annotations

import json
import threading
import time
from contextlib import nullcontext

import pytest
from conftest import pairtune, small_run, write_pairs
from rich.console import Console
from test_lockstep import trial

from pairtune.config import RunConfig
from pairtune.errors import Interrupted
from pairtune.pipeline import resume
from pairtune.run.folder import Run
from pairtune.sweep.cluster import _Tail, divided
from pairtune.track.sinks import Sink

ray = pytest.importorskip("ray")
GRID = {"learning_rate": [3e-3, 1e-3], "beta": [0.1, 0.5], "epochs": [3], "samples": 0, "checkpoint_steps": 1}


@pytest.fixture
def cluster(monkeypatch):
    """A head without CPUs and two nodes with one each, all on this machine."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    size = 80 << 20
    # Ray takes the loopback for this machine's own address, on which it would then listen.
    monkeypatch.setattr("ray._private.services.get_node_ip_address", lambda *_, **__: "127.0.0.1")
    each = {"object_store_memory": size, "node_ip_address": "127.0.0.1", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **each})
    cluster.both = [cluster.add_node(num_cpus=1, **each) for _ in range(2)]
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def logged(run: Run) -> dict[str, list]:
    return {each.name: [line.metrics() for line in (*each.log.steps, *each.log.evaluations)] for each in run.trials}


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_node_is_lost_in_the_middle_of_a_grid(cluster, tiny_model, tmp_path):
    here = small_run(tiny_model, tmp_path / "here", side_by_side=2, **GRID)
    there = Run(tmp_path / "there" / "run")
    lost = []

    def lose_a_node():
        wait_for(lambda: len(list(there.root.glob("nodes/*/checkpoint.safetensors"))) == 2)
        node = cluster.both.pop()
        cluster.remove_node(node, allow_graceful=False)
        lost.append(node)

    killer = threading.Thread(target=lose_a_node)
    killer.start()
    run = small_run(tiny_model, tmp_path / "there", cluster=cluster.address, side_by_side=2, **GRID)
    killer.join()
    assert lost
    assert run.complete
    assert run.choices.nodes == 2
    assert logged(run) == logged(here)  # to the last bit: each task went on from its checkpoint
    assert (run.selection.winner, run.selection.best_epoch) == (here.selection.winner, here.selection.best_epoch)
    assert run.sweep.rounding == here.sweep.rounding
    assert not run.paths.nodes.exists()


@pytest.mark.slow
def test_a_run_on_a_cluster_is_stopped_and_goes_on(cluster, tiny_model, tmp_path, monkeypatch):
    here = small_run(tiny_model, tmp_path / "here", side_by_side=2, **GRID)
    there = Run(tmp_path / "there" / "run")

    def stop_soon(console):
        return nullcontext(lambda: len(list(there.root.glob("nodes/*/checkpoint.safetensors"))) == 2)

    monkeypatch.chdir(tmp_path)  # a task sees what paths are relative to
    settings = {**GRID, "data": ["there/train.jsonl"], "cluster": cluster.address, "side_by_side": 2}
    with monkeypatch.context() as patched:
        patched.setattr("pairtune.pipeline.stop_on_signals", stop_soon)
        with pytest.raises(Interrupted, match="continues on the cluster"):
            small_run(tiny_model, tmp_path / "there", **settings)
    assert not there.complete
    run = resume(there.root, Console(quiet=True))
    assert run.complete
    assert logged(run) == logged(here)


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line(tiny_model, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", range(8))
    done = pairtune("tune", "--model", tiny_model, "--data", data, "--on", "ray", "--out", tmp_path / "run", "--yes")
    assert done.returncode == 2
    assert "error: --on ray: no Ray cluster answers there" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("more", [{"engine": "trl"}, {"prune": True}])
def test_what_a_cluster_cannot_do_is_refused(more):
    with pytest.raises(ValueError, match="omit --"):
        RunConfig(data=["x"], cluster="ray", **more)


def test_trials_are_divided_among_the_tasks():
    trials = [trial(beta=beta, learning_rate=rate) for beta in (0.1, 0.2, 0.3) for rate in (1e-3, 3e-3)]
    assert [len(share) for share in divided(trials, 2)] == [3, 3]
    assert [len(share) for share in divided(trials, 4)] == [2, 2, 2]
    assert [len(share) for share in divided(trials, 1)] == [6]
    mixed = [*trials, *(trial(lora_rank=8, beta=beta) for beta in (0.1, 0.2))]
    assert [len(share) for share in divided(mixed, 4)] == [3, 3, 1, 1]
    assert [each for share in divided(mixed, 4) for each in share] == mixed


def test_what_a_task_repeats_after_a_loss_is_passed_on_again(tmp_path):
    """Lines after the checkpoint belong to steps that are made again."""
    seen, run, config = [], Run(tmp_path), trial()
    file = run.paths.trial(config.name).metrics
    file.parent.mkdir(parents=True)

    class Seen(Sink):
        def start(self, trial, total_steps, steps, lines):
            seen.append(("start", total_steps, steps, lines))

        def log(self, trial, line):
            seen.append(line.step)

    def write(*steps):
        lines = ({"step": step, "epoch": 0.5, "loss": 0.7} for step in steps)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    tail = _Tail(run, config, pairs=7)
    tail.pass_on(Seen())
    assert not seen
    write()
    tail.pass_on(Seen())
    write(1, 2, 3)
    tail.pass_on(Seen())
    tail.pass_on(Seen())
    assert seen == [("start", 8, 0, 0), 1, 2, 3]
    write(1)
    tail.pass_on(Seen())
    write(1, 2)
    tail.pass_on(Seen())
    assert seen[4:] == [("start", 8, 1, 1), 2]
