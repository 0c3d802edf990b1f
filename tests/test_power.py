"""Power cuts: at any moment of a run, what is left on the disk can be gone on with, to the same bits."""

from __future__ import annotations

import os
import random

import pytest
from conftest import write_pairs
from power import Disk, without_times
from rich.console import Console

from pairtune import files
from pairtune.files import fill_folder, write_atomic
from pairtune.pipeline import resume, tune
from pairtune.resolve_config import resolve
from pairtune.run.folder import Run, is_run
from pairtune.run.records import SweepRecord
from pairtune.run.records.base import Record

CUTS = int(os.environ.get("PAIRTUNE_POWER_CUTS", "8"))  # `make chaos` makes more


def test_the_disk_forgets_what_was_not_synced(tmp_path, monkeypatch):
    """The simulation itself: without syncs a file is empty or absent, with them it is there."""
    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(root, monkeypatch, lambda _: None)
    (root / "careless").write_text("x")
    (root / "half").write_text("x")
    handle = os.open(root, os.O_RDONLY)
    os.fsync(handle)
    (root / "half").unlink()
    write_atomic(root / "a" / "b" / "careful", "y")
    fill_folder(root / "folder", lambda made: (made / "file").write_text("z"))
    left = disk.left(tmp_path / "left")
    os.close(handle)
    disk.close()
    found = {str(path.relative_to(left)): path.read_text() for path in left.rglob("*") if path.is_file()}
    assert found == {"careless": "", "a/b/careful": "y", "folder/file": "z"}


@pytest.mark.parametrize("able", [True, False])
def test_macos_is_asked_to_empty_the_disks_cache(tmp_path, monkeypatch, able):
    """Where a file system cannot do that, it is synced as elsewhere."""
    full, asked, synced = 51, [], []

    def fcntl(handle: int, command: int) -> int:
        asked.append(command)
        if not able:
            raise OSError(45, "Operation not supported")
        return 0

    monkeypatch.setattr(files, "_FULL_SYNC", full)
    monkeypatch.setattr(files.fcntl, "fcntl", fcntl)
    monkeypatch.setattr(files.os, "fsync", synced.append)
    files.sync(tmp_path)
    assert asked == [full]
    assert len(synced) == (not able)


@pytest.fixture(scope="module")
def settings(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("power")
    return {
        "model": str(tiny_model),
        # More pairs, thus more steps, for more cuts than a short run has moments.
        "data": [str(write_pairs(folder / "train.jsonl", range(max(8, CUTS // 5))))],
        "eval_data": [str(write_pairs(folder / "held.jsonl", range(20, 24)))],
        "learning_rate": [3e-3, 1e-3],
        "beta": [0.1],
        "epochs": 2,
        "dtype": "float32",
        "samples": 0,
        "checkpoint_steps": 1,
    }


def test_a_run_goes_on_after_a_power_cut_at_any_moment(settings, tmp_path, monkeypatch):
    quiet = Console(quiet=True)
    moments: list[int] = []
    root = tmp_path / "disk"
    root.mkdir()

    def count(_: Disk) -> None:
        moments.append(len(moments))

    with monkeypatch.context() as patch:
        disk = Disk(root, patch, count)
        whole = tune(resolve(None, {**settings, "out": root / "run"}), quiet)
        disk.close()
    assert whole is not None
    expected, selected = without_times(whole.root), whole.selection
    assert len(moments) > 60
    chosen = set(random.Random(len(moments)).sample(moments, CUTS)) | {moments[-1]}
    again = tmp_path / "again"
    again.mkdir()
    moment = -1

    def cut(disk: Disk) -> None:
        nonlocal moment
        moment += 1
        if moment in chosen:
            disk.left(tmp_path / f"left-{moment}")

    with monkeypatch.context() as patch:
        disk = Disk(again, patch, cut)
        tune(resolve(None, {**settings, "out": again / "run"}), quiet)
        disk.close()
    tried = 0
    for number in sorted(chosen):
        left = tmp_path / f"left-{number}" / "run"
        if not left.parent.exists():  # the second run synced once less
            continue
        if not is_run(left):
            assert not left.exists(), "half a run folder"
            continue
        if Run(left).complete:
            assert not Run(left).damage
        assert resume(left, quiet) is not None
        assert without_times(left) == expected, f"cut at moment {number}"
        assert Run(left).selection.winner == selected.winner
        assert not list(left.rglob(".*.tmp"))
        tried += 1
    assert tried > len(chosen) // 2


def test_a_run_killed_right_after_its_last_trials_record_goes_on(settings, tmp_path, monkeypatch):
    """A moment that random cuts rarely hit: all trials have ended, and what they share is not on record yet."""
    quiet = Console(quiet=True)
    whole = tune(resolve(None, {**settings, "out": tmp_path / "whole"}), quiet)
    assert whole is not None
    write = Run.write

    def killed(run: Run, record: Record) -> None:
        if isinstance(record, SweepRecord) and record.trials:
            raise KeyboardInterrupt
        write(run, record)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(resolve(None, {**settings, "out": tmp_path / "run"}), quiet)
    assert resume(tmp_path / "run", quiet) is not None
    assert without_times(tmp_path / "run") == without_times(whole.root)
