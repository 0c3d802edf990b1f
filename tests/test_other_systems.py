"""What can be checked of other systems without them: modules and calls that only POSIX has are not needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import pairtune, write_pairs

from pairtune import files
from pairtune.engine import trial

# Prepended to a separate process: our own modules, not the libraries, find nothing that Windows does not have.
WITHOUT_POSIX = """
import builtins, os

real = builtins.__import__


def without(name, globals=None, *more, **further):
    ours = (globals or {}).get("__name__", "").startswith(("pairtune", "__main__"))
    if ours and name in ("fcntl", "grp", "pwd", "resource", "termios"):
        raise ImportError(f"No module named {name!r}")
    return real(name, globals, *more, **further)


builtins.__import__ = without
del os.nice, os.sched_getaffinity
"""


def test_a_run_is_made_without_posix(tiny_model: Path, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_POSIX)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    data = write_pairs(tmp_path / "pairs.jsonl", range(20))
    few = ("--lr", "1e-3", "--beta", "0.1", "--epochs", "1", "--samples", "1", "--dtype", "float32")
    run = tmp_path / "run"
    done = pairtune("tune", "--model", tiny_model, "--data", data, *few, "--out", run, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    for command in (
        ("report", run),
        ("audit", run),
        ("export", run, "--format", "merged", "--to", tmp_path / "merged"),
    ):
        done = pairtune(*command, PYTHONPATH=path)
        assert done.returncode == 0, (command, done.stderr)


def test_the_simulated_system_lacks_what_it_should(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_POSIX)
    done = subprocess.run(
        [sys.executable, "-c", "import fcntl"],
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
    )
    assert b"No module named 'fcntl'" in done.stderr


def test_folders_are_not_synced_where_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "fcntl", None)
    opened: list[tuple[Path, int]] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append((path, flags)) or real(path, flags))
    (tmp_path / "file").write_text("x")
    files.sync(tmp_path)
    files.sync(tmp_path / "file")
    assert opened == [(tmp_path / "file", os.O_RDWR)]


def test_peak_memory_is_windows_own_where_that_is_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trial, "Path", lambda name: Path("/nowhere") / name.strip("/"))
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=300 * 2**20))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert trial.peak_memory_mb(torch.device("cpu")) == 300
