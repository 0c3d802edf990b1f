"""One writer for a run folder: the second one is told, and the first one's files are left alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import pairtune, small_run, write_pairs

from pairtune.errors import BadInput
from pairtune.files import fill_folder, restore_moved
from pairtune.run.folder import Run
from pairtune.run.lock import writing


def is_being_written(run: Run) -> bool:
    try:
        with writing(run):
            return False
    except BadInput:
        return True


def test_a_second_writer_is_told_and_a_lock_ends_with_its_holder(tmp_path):
    run = Run(tmp_path / "run")
    run.root.mkdir()
    assert not is_being_written(run)
    holder = f"""
import sys, time
from pathlib import Path
from pairtune.run.folder import Run
from pairtune.run.lock import writing
with writing(Run(Path({str(run.root)!r}))):
    print("held", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        assert is_being_written(run)
        with (
            pytest.raises(BadInput, match="another process is working on this run; wait until it has ended"),
            writing(run),
        ):
            pass
    finally:
        process.kill()
        process.wait()
    assert not is_being_written(run)
    with writing(run):
        assert is_being_written(run)
    assert not is_being_written(run)


def test_two_resumes_of_one_run_do_not_write_together(tiny_model, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", range(24))
    out = tmp_path / "run"
    flags = [
        "--data",
        str(data),
        "--model",
        str(tiny_model),
        "--epochs",
        "40",
        "--lr",
        "1e-3",
        "--beta",
        "0.1",
        "--out",
        str(out),
    ]
    first = subprocess.Popen(
        [sys.executable, "-m", "pairtune", "tune", *flags, "--samples", "0"], stderr=subprocess.PIPE, text=True
    )
    try:
        metrics = out / "trials"
        until = time.monotonic() + 120
        while not list(metrics.glob("*/metrics.jsonl")):
            assert first.poll() is None, first.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.05)
        half_written = out / ".theirs.tmp"
        half_written.write_text("another writer's")
        second = pairtune("resume", out)
        assert second.returncode == 2
        assert f"process {first.pid} is working on this run" in second.stderr
        third = pairtune("tune", *flags)
        assert third.returncode == 2
        assert "already exists" in third.stderr
        assert half_written.read_text() == "another writer's"
    finally:
        first.wait(300)
    [log] = metrics.glob("*/metrics.jsonl")
    steps = [line["step"] for line in map(json.loads, log.read_text().splitlines()) if "eval_loss" not in line]
    assert steps == list(range(1, len(steps) + 1))
    assert pairtune("resume", out).returncode == 0


def test_two_runs_into_one_folder_leave_one_whole(tiny_model, tmp_path):
    def run(learning_rate: float) -> str:
        folder = tmp_path / f"{learning_rate}"
        folder.mkdir()
        try:
            small_run(tiny_model, folder, learning_rate=[learning_rate], samples=0, out=tmp_path / "out")
        except BadInput as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:
        said = list(pool.map(run, (1e-3, 2e-3, 3e-3)))
    assert said.count("") == 1
    assert all("already exists" in each for each in said if each)
    finished = Run.finished(tmp_path / "out")
    assert not finished.damage
    assert len(finished.trials) == 1


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "best"
    fill_folder(target, lambda folder: (folder / "a").write_text("old"))

    def fails(folder):
        (folder / "a").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fill_folder(target, fails)
    assert (target / "a").read_text() == "old"
    with pytest.raises(OSError, match="not empty"):
        fill_folder(target, lambda folder: None, new=True)
    fill_folder(target, lambda folder: (folder / "b").write_text("new"))
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_what_a_killed_replacement_had_moved_aside_comes_back(tmp_path):
    (tmp_path / "trials" / ".best.abc12345.old").mkdir(parents=True)
    (tmp_path / "trials" / ".best.abc12345.old" / "weights").write_text("the only ones")
    (tmp_path / ".kept.one.abc12345.old").mkdir()
    (tmp_path / "kept.one").mkdir()
    restore_moved(tmp_path)
    assert (tmp_path / "trials" / "best" / "weights").read_text() == "the only ones"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.one", "trials"]
