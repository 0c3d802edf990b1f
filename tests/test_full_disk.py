"""Full disks, at any point of a run and of an export: one line that says so, and nothing half-written that passes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import pairtune, small_run, write_pairs
from model_hub import online, serve_models
from power import without_times

from pairtune.errors import RunFailed
from pairtune.models.save import explaining_writers
from pairtune.run.folder import Run, is_run

ROOMS = int(os.environ.get("PAIRTUNE_FULL_DISKS", "3"))  # `make chaos` tries more


@contextmanager
def disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of this size; the test is skipped where none can be made."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("only root can make a small file system, and not in every container")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def enlarge(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=50m", str(folder)], check=True)


def test_a_run_on_a_full_disk_is_gone_on_with_when_there_is_room(tiny_model, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", range(24))
    flags = ["--model", tiny_model, "--data", data, "--lr", "1e-3", "--beta", "0.1", "--epochs", "2", "--samples", "2"]
    assert pairtune("tune", *flags, "--out", tmp_path / "whole").returncode == 0
    needed = sum(file.stat().st_blocks for file in (tmp_path / "whole").rglob("*")) // 2  # kilobytes
    expected, full = without_times(tmp_path / "whole"), 0
    for number in range(ROOMS):
        room = 16 + needed * number // ROOMS
        with disk(tmp_path / f"disk-{number}", room) as small:
            out = small / "run"
            done = pairtune("tune", *flags, "--out", out)
            lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
            assert "Traceback" not in done.stderr, done.stderr
            if done.returncode == 0:
                continue
            full += 1
            assert len(lines) == 1
            assert "No space left" in lines[0] or "the disk is full" in lines[0]
            assert not (out / "COMPLETE").exists()
            enlarge(small)
            again = pairtune("resume", out) if is_run(out) else pairtune("tune", *flags, "--out", out)
            assert again.returncode == 0, (room, again.stderr)
            assert not Run.finished(out).damage
            assert without_times(out) == expected, room
            assert not list(out.rglob(".*.tmp"))
    assert full > 1


def test_an_export_on_a_full_disk_leaves_nothing(tiny_model, tmp_path):
    run = small_run(tiny_model, tmp_path, samples=0).root
    with disk(tmp_path / "disk", 100) as small:
        done = pairtune("export", run, "--format", "merged", "--to", small / "model")
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert [
            line
            for line in done.stderr.splitlines()
            if line.startswith("error:") and ("full" in line or "space" in line)
        ]
        assert list(small.iterdir()) == []


def test_a_push_on_a_full_disk_publishes_nothing(tiny_model, tmp_path):
    """What is published is put together in the temporary folder first, of which any part may find no room."""
    run, refused = small_run(tiny_model, tmp_path, samples=1).root, 0
    with serve_models() as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in online(hub, tmp_path / "home").items():
            patch.setenv(name, value)
        needed = sum(file.stat().st_blocks for file in (tiny_model).rglob("*")) // 2  # kilobytes
        for number in range(ROOMS):
            with disk(tmp_path / f"disk-{number}", 8 + 2 * needed * number // ROOMS) as small:
                patch.setenv("TMPDIR", str(small))
                done = pairtune("push", run, "--repo", f"someone/full-{number}", "--what", "merged")
                patch.delenv("TMPDIR")
                published = hub.repositories.get(f"someone/full-{number}", {}).get("main", {})
                assert "Traceback" not in done.stderr, done.stderr
                assert list(small.iterdir()) == []
                if done.returncode == 0:
                    assert {"README.md", "model.safetensors"} <= set(published)
                    continue
                refused += 1
                (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
                assert "full" in line or "space" in line
                assert not published
    assert refused


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_tokenizer_without_room_is_said_in_a_line(tiny_base):
    """Its writer raises a bare Exception; faults of other kinds stay what they are."""
    with pytest.raises(RunFailed, match="No space left"), explaining_writers(Path("model")):
        tiny_base.tokenizer.backend_tokenizer.save("/dev/full")
    with pytest.raises(KeyError), explaining_writers(Path("model")):
        raise KeyError("a fault of ours")
