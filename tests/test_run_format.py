"""Runs of an earlier format open, resume, report, export and are served.

`tests/data/run-format-1.tar.gz` was written by the last version before records had a format: a random two-layer Llama,
a finished run with two trials, and the same run interrupted after the first epoch.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import openai
import pytest
from rich.console import Console

from pairtune.errors import BadInput
from pairtune.evaluation.audit.check import audit
from pairtune.evaluation.audit.read import read_evidence
from pairtune.files import saved_fingerprint
from pairtune.pipeline import resume
from pairtune.publish.export import export_run
from pairtune.report.write import write_report
from pairtune.run.folder import Run, RunState
from pairtune.run.records import Selection, SweepRecord, TestRecord
from pairtune.run.schema import FORMAT
from pairtune.serve.process import WorkerProcess

ARCHIVE = Path(__file__).parent / "data" / "run-format-1.tar.gz"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """Unpack the archive where its relative paths resolve."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_old_run_opens_with_all_its_records(old):
    run = Run.open(Path("finished"))
    assert run.state is RunState.FINISHED
    assert run.damage == []
    assert "format" not in json.loads(run.paths.selection.read_text())
    assert run.selection.winner == "lr-0.003-beta-0.1"
    assert run.selection.settled == all(each.differs for each in run.selection.comparisons)
    assert run.test.pairs == 4
    assert set(run.generations.models) == {"base", "lr-0.003-beta-0.1", "lr-0.001-beta-0.1"}
    assert [trial.name for trial in run.trials] == ["lr-0.003-beta-0.1", "lr-0.001-beta-0.1"]
    assert [len(trial.evaluations) for trial in run.trials] == [2, 2]
    assert len(run.trials[0].log.steps) == 8
    assert run.trials[0].record.best.eval_loss == pytest.approx(0.6468, abs=1e-4)
    assert run.choices.kernels["float32"].least == 16


def test_an_old_run_is_reported_audited_and_exported(old):
    run = Run.finished(Path("finished"))
    write_report(run)
    assert "lr 0.003" in run.paths.report.read_text()
    assert [finding.level for finding in audit(read_evidence(run.root)).findings if finding.level == "error"] == []
    assert export_run(run, "merged", old / "merged").holds


def test_an_old_run_that_was_interrupted_goes_on_to_the_results_of_the_whole(old):
    run, whole = Run.open(Path("interrupted")), Run.open(Path("finished"))
    assert run.state is RunState.UNFINISHED
    resume(run.root, Console(quiet=True))
    assert run.state is RunState.FINISHED
    for kind in (SweepRecord, Selection, TestRecord):
        assert json.loads((run.root / kind.file).read_text())["format"] == FORMAT
    for name in ("lr-0.003-beta-0.1", "lr-0.001-beta-0.1"):
        found, expected = (each.trial(name).evaluations for each in (run, whole))
        assert [each.eval_loss for each in found] == pytest.approx([each.eval_loss for each in expected], abs=1e-5)


def test_an_old_run_is_served(old):
    with WorkerProcess(["finished"]) as worker:
        client = openai.OpenAI(base_url=f"{worker.url}/v1", api_key=worker.key, max_retries=0)
        assert {each.id for each in client.models.list()} >= {"model", "finished", "finished/lr-0.001-beta-0.1"}
        answer = client.chat.completions.create(
            model="finished", messages=[{"role": "user", "content": "Hi"}], max_tokens=4
        )
        assert answer.system_fingerprint.endswith(saved_fingerprint(Path("finished/best")))


def test_a_run_of_a_later_format_is_refused_in_one_line(old):
    file = Path("finished/selection.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": FORMAT + 1}))
    run = Run.open(Path("finished"))
    assert (run.selection, run.state) == (None, RunState.DAMAGED)
    with pytest.raises(BadInput, match=r"selection\.json: .*format 3.*update pairtune"):
        run.need(Selection)
