"""Two processes that share each batch make the same steps as one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
from conftest import write_pairs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_two_processes_are_the_same_trajectory(tiny_model, tmp_path, method):
    """Nine pairs in batches of two: the second process gets no share of the last batch."""
    data, held = write_pairs(tmp_path / "train.jsonl", range(9)), write_pairs(tmp_path / "held.jsonl", range(20, 25))
    command = ["tune", "--model", tiny_model, "--data", data, "--eval-data", held, "--lr", 1e-3, "--lr", 5e-4]
    command += ["--beta", 0.1, "--epochs", 2, "--dtype", "float32", "--samples", 1, "--method", method, "--json"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", 2]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", free_port()]
    answers = {}
    for name, start in {"one": [], "two": launcher}.items():
        done = subprocess.run(
            [sys.executable, *map(str, [*start, "-m", "pairtune", *command, "--out", tmp_path / name])],
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "PAIRTUNE_CACHE": str(tmp_path / "cache" / name),
            },
            capture_output=True,
            timeout=120,
            check=True,
        )
        assert (b" in 2 processes" in done.stderr) == (name == "two")
        answers[name] = json.loads(done.stdout)  # the first process alone answers
    for trial in answers["one"]["trials"]:
        lines = {}
        for name in answers:
            text = (tmp_path / name / "trials" / trial["name"] / "metrics.jsonl").read_text()
            lines[name] = [json.loads(line) for line in text.splitlines()]
        assert len(lines["one"]) == len(lines["two"]) == 12
        for one, two in zip(lines["one"], lines["two"], strict=True):
            assert one == pytest.approx(two, abs=1e-5, rel=1e-5)
    best = [(run["selection"]["winner"], run["selection"]["best_epoch"]) for run in answers.values()]
    assert best[0] == best[1]
    assert all((tmp_path / name / "COMPLETE").is_file() for name in answers)
