"""Trackers, with the real libraries: what they record of a run, what they never record, and that they stop nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import evaluation, write_pairs

from pairtune import extras
from pairtune.config import TrialConfig
from pairtune.errors import BadInput
from pairtune.evaluation.audit.read import read_evidence
from pairtune.run.folder import Run
from pairtune.run.metrics import TrainingStep
from pairtune.track import trackers
from pairtune.track.trackers import TrackerSink, check_trackers, tracked_names

SECRETS = {
    name: f"planted-{name.lower()}-0123456789" for name in ("WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD")
}


@pytest.fixture(scope="module")
def tracked(tiny_model, tmp_path_factory):
    """Run with all trackers in a separate process; returns the folder and the output."""
    folder = tmp_path_factory.mktemp("tracked")
    environment = os.environ | SECRETS | {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "HOME": str(folder)}
    environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    command = [sys.executable, "-m", "pairtune", "tune", "--model", tiny_model, "--dtype", "float32", "--samples", "1"]
    command += ["--data", write_pairs(folder / "pairs.jsonl", range(12)), "--lr", "3e-3", "--lr", "1e-3"]
    command += ["--beta", "0.1", "--epochs", "2", "--out", folder / "run"]
    command += ["--track", "wandb", "--track", "tensorboard", "--track", "mlflow"]
    done = subprocess.run(
        [*map(str, command)], env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def lines_of(run: Run, trial: str) -> list[dict]:
    return [json.loads(line) for line in run.paths.trial(trial).metrics.read_text().splitlines()]


TRIALS = ("lr-0.003-beta-0.1", "lr-0.001-beta-0.1")


def test_wandb_has_every_trial_step_and_epoch(tracked):
    folder, _ = tracked
    evidence = read_evidence(folder / "wandb")
    logs = {log.name: log for log in evidence.trials}
    assert set(logs) == {*TRIALS, "result"}
    for name in TRIALS:
        lines = lines_of(Run(folder / "run"), name)
        steps, evaluations = ([row for row in lines if ("eval_loss" in row) is kind] for kind in (False, True))
        assert [row["loss"] for row in logs[name].steps] == [row["loss"] for row in steps]
        assert [row["loss"] for row in logs[name].evaluations] == [row["eval_loss"] for row in evaluations]
        assert logs[name].evaluations[1]["rewards/margins"] == evaluations[1]["eval_rewards/margins"]
        assert (logs[name].beta, logs[name].learning_rate) == (0.1, float(name.split("-")[1]))


def test_tensorboard_has_every_trial_step_and_epoch(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = tracked
    run = Run(folder / "run")
    for name in TRIALS:
        events = EventAccumulator(str(run.paths.tensorboard / name))
        events.Reload()
        lines = lines_of(run, name)
        for tag, metric in (("train/rewards/margins", "rewards/margins"), ("eval/loss", "eval_loss")):
            expected = [(row["step"], row[metric]) for row in lines if metric in row]
            assert [(each.step, each.value) for each in events.Scalars(tag)] == [
                (step, pytest.approx(value, rel=1e-6)) for step, value in expected
            ]


def test_mlflow_has_every_trial_under_one_run_with_the_report(tracked):
    from mlflow import MlflowClient

    folder, _ = tracked
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("pairtune").experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    parent = by_name["run"]
    assert set(by_name) == {"run", *TRIALS}
    assert parent.data.tags["verdict"]
    for name in TRIALS:
        assert by_name[name].data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert by_name[name].info.status == "FINISHED"
        history = client.get_metric_history(by_name[name].info.run_id, "eval/loss")
        assert [each.value for each in history] == [
            row["eval_loss"] for row in lines_of(Run(folder / "run"), name) if "eval_loss" in row
        ]


def test_no_secret_reaches_an_artefact_or_a_message(tracked):
    folder, printed = tracked
    assert all(secret not in printed for secret in SECRETS.values())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 30
    for path in files:
        content = path.read_bytes()
        for secret in SECRETS.values():
            assert secret.encode() not in content, path


def test_names_are_those_of_transformers_trackers():
    step = TrainingStep(step=3, epoch=0.5, loss=0.6, margin=0.1, grad_norm=2.0)
    assert tracked_names(step) == {
        "train/global_step": 3,
        "train/epoch": 0.5,
        "train/loss": 0.6,
        "train/rewards/margins": 0.1,
        "train/grad_norm": 2.0,
    }
    names = tracked_names(evaluation(step=3, epoch=1, loss=0.6, eval_loss=0.5, margin=0.2))
    assert {name: value for name, value in names.items() if value} == {
        "train/global_step": 3,
        "train/epoch": 1,
        "train/epoch_loss": 0.6,
        "eval/loss": 0.5,
        "eval/rewards/margins": 0.2,
    }
    assert set(names) >= {"eval/rewards/chosen", "eval/logps/rejected", "eval/logits/chosen"}


class Broken:
    """A tracker that fails at its second step."""

    def __init__(self) -> None:
        self.logged = 0

    def open(self, trial, steps):
        pass

    def log(self, trial, step, metrics):
        self.logged += 1
        if self.logged == 2:
            raise ConnectionError("the network is gone")

    def close(self, trial, summary):
        raise AssertionError("it was given up before")


def test_a_tracker_that_fails_is_given_up_with_one_line(monkeypatch, tmp_path):
    broken, said = Broken(), []
    monkeypatch.setattr(trackers, "open_tracker", lambda *_: broken)
    sink = TrackerSink("wandb", Run(tmp_path), lambda name: TrialConfig(learning_rate=1, beta=1), said.append)
    sink.start("a", 5, 0, 0)
    for step in range(1, 6):
        sink.log("a", TrainingStep(step=step, epoch=1, loss=0.5))
    sink.finish("a", "finished", None)
    assert broken.logged == 2
    assert said == ["wandb: the network is gone; the run continues without it, all is in metrics.jsonl"]


def test_wandb_without_a_network_is_tracked_offline(tmp_path):
    """The real client, a key, and an unreachable server."""
    script = (
        "import sys; from pathlib import Path\n"
        "from pairtune.config import TrialConfig\n"
        "from pairtune.run.folder import Run\n"
        "from pairtune.run.metrics import TrainingStep\n"
        "from pairtune.track import trackers\n"
        "trackers._WANDB_WAITS = 3\n"
        "trial = TrialConfig(learning_rate=1e-3, beta=0.1)\n"
        "sink = trackers.TrackerSink('wandb', Run(Path('run')), lambda name: trial, print)\n"
        "sink.start(trial.name, 1, 0, 0)\n"
        "sink.log(trial.name, TrainingStep(step=1, epoch=1, loss=0.5))\n"
        "sink.finish(trial.name, 'finished', None)\n"
    )
    environment = os.environ | {
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_DIR": str(tmp_path),
    }
    environment.pop("WANDB_MODE", None)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "tracking offline, upload with `wandb sync`" in done.stdout
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (log,) = read_evidence(file).trials
    assert [row["loss"] for row in log.steps] == [0.5]


def test_a_missing_package_is_said_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"--track mlflow: needs the package mlflow; pip install 'pairtune\[mlflow\]'"):
        check_trackers(["mlflow"])
    check_trackers([])


def test_trackers_are_imported_only_where_they_are_asked_for():
    code = "import sys, pairtune.pipeline; print({'wandb', 'mlflow', 'tensorboard'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
