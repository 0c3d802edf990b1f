"""A run's files: complete or absent."""

from __future__ import annotations

import json
import os
import tracemalloc

import pytest

from pairtune.errors import BadInput
from pairtune.files import fill_folder, fingerprint, forget_oldest, mark_used, user_cache, write_atomic, write_json
from pairtune.run.folder import Run
from pairtune.run.metrics import MetricsLog
from pairtune.run.records import SweepRecord


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"kept": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    with pytest.raises(TypeError):
        write_atomic(path, 3)  # type: ignore[arg-type]
    assert json.loads(path.read_text()) == {"kept": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_fails_to_fill_leaves_the_old_one(tmp_path):
    folder = tmp_path / "best"
    fill_folder(folder, lambda target: (target / "weights").write_text("1") and None)

    def fail(target):
        (target / "weights").write_text("2")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill_folder(folder, fail)
    assert (folder / "weights").read_text() == "1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["best"]


def with_config(run):
    write_atomic(run.paths.config, "seed: 0")


def test_a_run_folder_that_cannot_be_filled_is_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError):
        Run.create(tmp_path / "run", lambda run: write_atomic(run.paths.config, str(1 / 0)))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_half_written_is_removed_and_nothing_else(tmp_path):
    run = Run.create(tmp_path / "run", with_config)
    (run.root / ".mine").write_text("a person's file")
    (run.paths.trials / "one").mkdir(parents=True)
    (run.paths.trials / "one" / ".trial.json.abc.tmp").write_text("{")
    (run.paths.trials / "one" / ".best.abc.tmp").mkdir()
    (run.paths.trials / "one" / ".best.abc.tmp" / "adapter_model.safetensors").write_text("{")
    run.forget_half_written()
    assert {p.name for p in run.root.rglob("*")} == {"config.yaml", ".mine", "trials", "one"}


def test_a_folder_that_exists_is_refused_and_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    Run.create(tmp_path / "run", with_config)  # empty: fine
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 0"
    (tmp_path / "run" / "file").write_text("mine")
    with pytest.raises(BadInput, match="already exists"):
        Run.create(tmp_path / "run", with_config)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(BadInput, match="already exists"):
        Run.create(tmp_path / "taken", with_config)
    with pytest.raises(BadInput, match="cannot be created"):
        Run.create(tmp_path / "taken" / "below", with_config)
    assert (tmp_path / "run" / "file").read_text() == "mine"


def test_an_unfinished_run_is_not_opened(tmp_path):
    with pytest.raises(BadInput, match="no such run folder"):
        Run.finished(tmp_path / "none")
    run = Run.create(tmp_path / "run", with_config)
    with pytest.raises(BadInput, match="unfinished"):
        Run.finished(run.root)
    run.paths.complete.touch()
    assert Run.finished(run.root).complete


def test_a_damaged_file_is_named(tmp_path):
    run = Run(tmp_path)
    run.paths.sweep.write_text("{")
    with pytest.raises(BadInput, match=r"sweep\.json: is not valid JSON"):
        run.need(SweepRecord)
    assert run.sweep is None
    assert [damage.file for damage in run.damage] == ["sweep.json"]


def test_metrics_are_read_as_they_grow_and_anew_where_they_were_rewritten(tmp_path):
    run, file = Run(tmp_path), tmp_path / "trials" / "one" / "metrics.jsonl"
    file.parent.mkdir(parents=True)
    assert run.log("one") == MetricsLog()

    def steps():
        return [(step.step, step.loss) for step in run.log("one").steps]

    lines = [f'{{"step": {step}, "epoch": 0.1, "loss": 0.{step}}}\n' for step in range(1, 5)]
    file.write_text("".join(lines[:2]) + '{"step": 3, "ep')  # the last line is still being written
    assert steps() == [(1, 0.1), (2, 0.2)]
    file.write_text("".join(lines[:3]) + "no line at all\n")
    assert steps() == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert run.log("one").unreadable == 1
    file.write_text("".join(lines).replace("0.1}", "0.9}"))  # as long as before, and longer
    assert steps() == [(1, 0.9), (2, 0.2), (3, 0.3), (4, 0.4)]
    file.write_text(lines[0])  # a resumed trial forgets what it will log again
    assert steps() == [(1, 0.1)]


def test_watching_a_log_that_grows_keeps_one_version_of_it(tmp_path):
    run = Run(tmp_path)
    log = run.paths.trial("one").metrics
    log.parent.mkdir(parents=True)
    line = {"epoch": 0.1, "loss": 0.69, "rewards/margins": 0.0123, "grad_norm": 1.5, "learning_rate": 1e-4}
    log.write_text("".join(json.dumps({"step": number, **line}) + "\n" for number in range(1000)))
    tracemalloc.start()
    try:
        sizes = []
        for number in range(1000, 1060):
            with log.open("a") as file:
                file.write(json.dumps({"step": number, **line}) + "\n")
            assert len(run.log("one").steps) == number + 1
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[-1] - sizes[10] < 300_000  # fifty lines more, and not fifty times a thousand


def test_fingerprints_tell_parts_apart():
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])
    assert fingerprint(["a", b"\xff"]) == fingerprint([b"a", b"\xff"])
    assert len(fingerprint(["\ud800"])) == 16


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PAIRTUNE_CACHE", str(tmp_path))
    assert user_cache() == tmp_path
    monkeypatch.delenv("PAIRTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "pairtune"


def test_a_cache_forgets_what_was_used_longest_ago(tmp_path):
    for number, name in enumerate(("old", "middle", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (number, number))
    (tmp_path / ".being-written").mkdir()
    os.utime(tmp_path / ".being-written", (0, 0))
    mark_used(tmp_path / "old")
    forget_oldest(tmp_path, 200)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new", ".being-written"}
    forget_oldest(tmp_path, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"old", ".being-written"}
