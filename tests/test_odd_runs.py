"""Run folders that were cut off, edited, emptied or closed: every page and command says so, and none of them fails."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from conftest import small_run
from rich.console import Console

from pairtune import pipeline
from pairtune.errors import BadInput, Interrupted, RunFailed
from pairtune.evaluation.audit.check import audit
from pairtune.evaluation.audit.read import read_evidence
from pairtune.report.write import write_report
from pairtune.run.folder import Run

TRIES = int(os.environ.get("PAIRTUNE_FUZZ_RUNS", "30"))  # `make chaos` tries more
ODD = [None, math.nan, math.inf, -1, 0, 1e308, 10**30, "x", "", [], {}, [None], {"a": 1}, True, "\x1b[31m", "\ud800"]
ODD += ["../../etc/passwd", "a" * 300]
PAGES = (
    "/runs/",
    "/runs/r/",
    "/runs/r/live",
    "/runs/r/pairs",
    "/runs/r/report",
    "/runs/r/push",
    "/runs/compare?run=r&run=s",
)
TEXTS = (".json", ".jsonl", ".yaml")


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    return small_run(tiny_model, folder, learning_rate=[3e-3, 1e-3], epochs=[2], out=folder / "whole").root


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The site's pages in this process, without a server."""
    folder = tmp_path_factory.mktemp("odd-site")
    (folder / "runs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DJANGO_SETTINGS_MODULE", "pairtune.web.settings")
        patch.setenv("PAIRTUNE_SITE", str(folder / "site"))
        patch.setenv("DATABASE_URL", f"sqlite:///{folder / 'site.sqlite3'}")
        import django
        from django.conf import settings

        django.setup()
        # Another module may have loaded the settings already, with the user's own database.
        patch.setattr(settings, "PAIRTUNE_SITE", folder / "site")
        from django.db import connection

        connection.close()
        patch.setitem(connection.settings_dict, "NAME", str(folder / "site.sqlite3"))
        from django.test import Client

        from pairtune.web.server import open_database

        open_database()
        patch.setattr(settings, "PAIRTUNE_RUNS", folder / "runs")
        yield Client(headers={"host": "localhost"}), folder / "runs"
        connection.close()


def changed(value, draw: random.Random):
    """A JSON value of which one part is something else."""
    if draw.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return draw.choice(ODD)
    if isinstance(value, list):
        at = draw.randrange(len(value))
        return [changed(each, draw) if number == at else each for number, each in enumerate(value)]
    name, how = draw.choice(list(value)), draw.random()
    rest = {key: each for key, each in value.items() if key != name}
    if how < 0.2:
        return rest
    return rest | {draw.choice(["x", "", "é", "a/b"]) if how < 0.3 else name: changed(value[name], draw)}


def spoil(file: Path, draw: random.Random) -> str:
    """Damage a file, and say how."""
    how = draw.choice(["value"] * 4 + ["cut", "bytes", "gone", "folder", "json"])
    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[: draw.randrange(len(content) + 1)])
    elif how == "bytes":
        file.write_bytes(draw.randbytes(draw.randrange(200)))
    elif how in ("gone", "folder"):
        file.unlink()
        if how == "folder":
            file.mkdir()
    elif how == "json" or file.suffix not in TEXTS:
        file.write_text(json.dumps(draw.choice(ODD)))
    elif file.suffix == ".yaml":
        file.write_text(yaml.safe_dump(changed(yaml.safe_load(content), draw)))
    elif file.suffix == ".json":
        file.write_text(json.dumps(changed(json.loads(content), draw)))
    else:
        lines = content.decode().splitlines()
        at = draw.randrange(len(lines))
        lines[at] = json.dumps(changed(json.loads(lines[at]), draw))
        file.write_text("\n".join(lines) + "\n")
    return f"{file.name}: {how}"


def test_a_damaged_run_is_shown_as_such(whole, pages):
    client, runs = pages
    names = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    names = [name for name in names if not name.name.startswith(("tokenizer", "special_tokens", "."))]
    shutil.copytree(whole, runs / "s")
    for number in range(TRIES):
        draw = random.Random(number)
        shutil.rmtree(runs / "r", ignore_errors=True)
        shutil.copytree(whole, runs / "r")
        if draw.random() < 0.3:
            (runs / "r" / "COMPLETE").unlink()
        there = [name for name in names if (runs / "r" / name).exists()]
        said = [spoil(runs / "r" / name, draw) for name in draw.sample(there, draw.choice((1, 1, 2)))]
        for page in PAGES:
            answer = client.get(page)
            assert answer.status_code in (200, 302, 404), (number, page, said)
        assert b">s<" in client.get("/runs/").content, (number, said)  # the others are still there
        for work in (lambda: audit(read_evidence(runs / "r")), lambda: write_report(Run.finished(runs / "r"))):
            try:
                work()
            except (BadInput, OSError) as error:  # of an OSError the command line makes a line as well
                assert "\n" not in str(error), (number, said)


@pytest.fixture(scope="module")
def interrupted(tiny_model, tmp_path_factory):
    """A run that was stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("interrupted")

    def half_way() -> bool:
        logs = [file.read_text().splitlines() for file in folder.glob("whole/trials/*/metrics.jsonl")]
        return any(len(lines) > 5 for lines in logs)  # four steps and an evaluation are an epoch

    @contextmanager
    def stop_soon(console):
        yield half_way

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "stop_on_signals", stop_soon)
        with pytest.raises(Interrupted):
            small_run(tiny_model, folder, learning_rate=[3e-3, 1e-3], epochs=[2], samples=0, out=folder / "whole")
    assert (folder / "whole" / "checkpoint.safetensors").is_file()
    return folder / "whole"


def test_a_damaged_run_is_gone_on_with_or_refused_in_a_line(interrupted, tmp_path):
    names = [path.relative_to(interrupted) for path in sorted(interrupted.rglob("*")) if path.is_file()]
    ended = Counter()
    for number in range(TRIES):
        draw, root = random.Random(1000 + number), tmp_path / "run"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(interrupted, root)
        said = spoil(root / draw.choice(names), draw)
        try:
            pipeline.resume(root, Console(quiet=True))
            ended["finished"] += 1
        except (BadInput, RunFailed, OSError) as error:
            ended[type(error).__name__] += 1
            assert "\n" not in str(error), (number, said)
        else:
            assert not Run.finished(root).damage, (number, said)
    assert ended["finished"] > 0
    assert ended["BadInput"] > 0


@pytest.mark.parametrize(
    "line",
    [
        "5",
        "null",
        "[1]",
        '"eval_loss"',
        "{}",
        '{"step": 1}',
        '{"step": 1, "epoch": 1, "loss": NaN}',
        '{"eval_loss": 1}',
    ],
)
def test_a_line_of_metrics_that_is_none_hides_no_run(whole, pages, line):
    client, runs = pages
    shutil.rmtree(runs / "r", ignore_errors=True)
    shutil.copytree(whole, runs / "r")
    (runs / "r" / "COMPLETE").unlink()
    for log in (runs / "r").glob("trials/*/metrics.jsonl"):
        log.write_text(log.read_text() + line + "\n")
        (log.parent / "trial.json").unlink()
    for page in PAGES[:4]:
        assert client.get(page).status_code == 200


AS_NOBODY = """
import os
os.setgid(65534)
os.setuid(65534)
"""
CLOSED = """
from pairtune.web.server import open_database
open_database()
from django.test import Client
client = Client(headers={"host": "localhost"})
for page in ("/runs/", "/runs/closed/", "/runs/partly/", "/runs/a-file/", "/runs/compare?run=open&run=closed"):
    answer = client.get(page)
    print(page, answer.status_code, "may not be read" in answer.content.decode())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read a file")
def test_a_folder_without_permission_hides_no_run(whole, tmp_path_factory):
    folder = Path(tempfile.mkdtemp(prefix="pairtune-closed-"))  # unlike pytest's, its parents let everybody pass
    environment = {
        **{name: value for name, value in os.environ.items() if name != "DATABASE_URL"},
        "PAIRTUNE_RUNS": str(folder / "runs"),
        "PAIRTUNE_SITE": str(folder / "site"),
        "DJANGO_SETTINGS_MODULE": "pairtune.web.settings",
    }
    try:
        if subprocess.run([sys.executable, "-c", AS_NOBODY + "import pairtune.web.server"], check=False).returncode:
            pytest.skip("the packages of this environment may be read by root alone")
        for name in ("open", "closed", "partly", "a-file"):
            shutil.copytree(whole, folder / "runs" / name)
        (folder / "site").mkdir()
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 65534, 65534)
        for name in ("closed", "partly/trials", "a-file/selection.json"):
            (folder / "runs" / name).chmod(0)
        command = [sys.executable, "-c", AS_NOBODY + CLOSED]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.stdout.splitlines() == [
            "/runs/ 200 True",
            "/runs/closed/ 200 True",
            "/runs/partly/ 200 True",
            "/runs/a-file/ 200 True",
            "/runs/compare?run=open&run=closed 200 False",
        ], done.stderr
    finally:
        shutil.rmtree(folder, ignore_errors=True)
