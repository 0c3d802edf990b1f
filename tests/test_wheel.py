"""What is installed from a wheel or a source distribution has all of the package, and works outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import httpx
import pytest
from conftest import write_pairs

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "pairtune"
BUILD = "import sys, setuptools.build_meta as build; print(build.build_{kind}(sys.argv[1]))"
FEW = ("--lr", "1e-3", "--beta", "0.1", "--epochs", "1", "--samples", "1", "--dtype", "float32")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel and a source distribution, by kind, built from a copy of what the repository holds."""
    copy, out = tmp_path_factory.mktemp("tree") / "pairtune", tmp_path_factory.mktemp("dist")
    hidden = shutil.ignore_patterns("__pycache__", "*.egg-info")
    copy.mkdir()
    shutil.copytree(ROOT / "src", copy / "src", ignore=hidden)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    found = {}
    for kind in ("wheel", "sdist"):
        command = [sys.executable, "-c", BUILD.format(kind=kind), str(out)]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=True)
        found[kind] = out / done.stdout.splitlines()[-1]
    return found


@pytest.fixture(scope="module")
def installed(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, without its dependencies."""
    target = tmp_path_factory.mktemp("site-packages")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(target), str(built["wheel"])], check=True)
    return target


def environment(installed: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": os.environ.get("PAIRTUNE_THREADS", "1")}


def run(installed: Path, place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Call the installed command in a folder outside the repository."""
    command = [sys.executable, "-m", "pairtune", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=place,
        env=environment(installed),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_every_file_of_the_package_is_in_both(built: dict[str, Path]):
    kept = {path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    kept = {name for name in kept if "__pycache__" not in name}
    assert len(kept) > 200
    with zipfile.ZipFile(built["wheel"]) as wheel:
        assert kept - set(wheel.namelist()) == set()
    with tarfile.open(built["sdist"]) as source:
        inside = {name.partition("/src/")[2] for name in source.getnames()}
        assert kept - inside == set()


def test_the_installed_package_is_the_one_that_runs(installed: Path, tmp_path: Path):
    command = [sys.executable, "-c", "import pairtune; print(pairtune.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(installed), capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(installed)


def test_it_tunes_reports_exports_and_serves_outside_the_repository(installed: Path, tiny_model: Path, tmp_path: Path):
    data = write_pairs(tmp_path / "pairs.jsonl", range(24))
    for arguments in (
        ("tune", "--model", tiny_model, "--data", data, *FEW, "--out", "runs/first"),
        ("report", "runs/first"),
        ("audit", "runs/first"),
        ("export", "runs/first", "--format", "merged", "--to", "merged"),
        ("data", "convert", "bundled:concise", "concise.jsonl", "--limit", "5"),
        ("demo", "--help"),
    ):
        done = run(installed, tmp_path, *arguments)
        assert done.returncode == 0, (arguments, done.stderr)
    assert "<svg" in (tmp_path / "runs" / "first" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "merged" / "model.safetensors").is_file()

    log = tmp_path / "site.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "pairtune", "serve", "--port", "0"]
        where = {**environment(installed), "PAIRTUNE_SITE": str(tmp_path / "site")}
        site = subprocess.Popen(command, cwd=tmp_path, env=where, stdout=output, stderr=subprocess.STDOUT, text=True)
    try:
        page = httpx.get(f"{address_in(log, site)}/runs/first/", timeout=60).text
        assert "first" in page
        assert "<svg" in page
    finally:
        site.terminate()
        assert site.wait(timeout=30) in (0, -15)


def address_in(log: Path, site: subprocess.Popen[str]) -> str:
    """The address that the site prints when it listens."""
    for _ in range(600):
        for word in log.read_text().split():
            if word.startswith("http://localhost:"):
                return word.rstrip("/")
        assert site.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())
