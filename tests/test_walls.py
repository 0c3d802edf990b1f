"""The layers of docs/architecture.md hold, and the check can fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def check(root: Path) -> subprocess.CompletedProcess[str]:
    lint_imports = Path(sys.executable).parent / "lint-imports"
    return subprocess.run(
        [str(lint_imports), "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_room_imports_across_a_wall():
    done = check(ROOT)
    assert done.returncode == 0, done.stdout


def test_an_import_across_a_wall_is_found_even_inside_a_function(tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    formats = tmp_path / "src/pairtune/data/formats.py"
    formats.write_text(formats.read_text() + "\n\ndef wrong() -> None:\n    import pairtune.engine.summaries\n")
    tables = tmp_path / "src/pairtune/report/render_run.py"
    tables.write_text("import torch\n" + tables.read_text())
    done = check(tmp_path)
    assert done.returncode == 1
    assert "pairtune.data.formats -> pairtune.engine.summaries" in done.stdout
    assert "pairtune.report.render_run -> torch" in done.stdout
