"""The audit's rules, one by one: each finds the fault that is planted in a clean run, and clean runs are left alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import evaluation, small_run, write_pairs

from pairtune.config import TrialConfig
from pairtune.evaluation.audit.check import RULES, audit
from pairtune.evaluation.audit.monitor import LiveAudit
from pairtune.evaluation.audit.read import read_evidence
from pairtune.files import write_atomic
from pairtune.run.folder import Run
from pairtune.run.metrics import TrainingStep

# Clean runs that the audit must not call wrong; `make alarms` has a hundred.
CLEAN_RUNS = int(os.environ.get("PAIRTUNE_CLEAN_RUNS", "8"))
FALSE_ALARMS = 0.05


def clean_run(tiny_model, folder: Path, seed: int, **more) -> Run:
    """A run with two trials of the tiny model on learnable pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = {"data": (0, 10), "eval_data": (200, 224), "test_data": (300, 304)}
    first = 1000 * seed
    sources = {
        key: [str(write_pairs(folder / f"{key}.jsonl", range(first + start, first + stop)))]
        for key, (start, stop) in pairs.items()
    }
    settings = {"learning_rate": [1e-3], "beta": [0.1, 0.2], "epochs": [2], "batch_size": [4], "samples": 0}
    return small_run(tiny_model, folder, **{**sources, **settings, "seed": seed, **more})


@pytest.fixture(scope="module")
def clean(tiny_model, tmp_path_factory):
    return clean_run(tiny_model, tmp_path_factory.mktemp("clean"), 0, samples=2)


def found(run: Run) -> dict[str, str]:
    """The worst level that each rule finds."""
    levels: dict[str, str] = {}
    for finding in audit(read_evidence(run.root)).findings:
        levels.setdefault(finding.rule, finding.level)
    return levels


def first_trial(run: Run):
    return run.paths.trial(json.loads(run.paths.sweep.read_text())["trials"][0]["name"])


def change_lines(run: Run, change, trial=None) -> None:
    """Rewrite a trial's metrics line by line."""
    file = (trial or first_trial(run)).metrics
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(rows):
        change(row, number, "eval_loss" in row)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_table(path: Path, **columns) -> None:
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, path)


def evaluations(**values):
    """A change that sets metrics of every evaluation; functions get the old value."""

    def change(row, number, evaluation):
        if evaluation:
            named = {f"eval_{name.replace('__', '/')}": value for name, value in values.items()}
            row |= {name: value(row[name]) if callable(value) else value for name, value in named.items()}

    return change


# Every fault changes the run's files as the fault itself would have.


def starts_elsewhere(run):
    def change(row, number, evaluation):
        if row["step"] == 1 and not evaluation:
            row |= {"rewards/chosen": -0.8, "rewards/rejected": -1.3, "rewards/margins": 0.5}

    change_lines(run, change)


def goes_on(run):
    """The second trial starts where the first one ended, far from the base."""
    one, other = (run.paths.trial(entry["name"]) for entry in json.loads(run.paths.sweep.read_text())["trials"])
    base = next(json.loads(line) for line in one.metrics.read_text().splitlines())  # its first step is at the base

    def far(beta, way):
        def change(row, number, evaluation):
            if row["step"] == 1 and not evaluation and beta == 0.2:
                row |= {"rewards/chosen": -4.0, "rewards/rejected": -8.0, "rewards/margins": 4.0}
            if evaluation:
                moved = way + 1e-3 * row["epoch"]
                for answer, share in (("chosen", 1), ("rejected", 2)):
                    row[f"eval_logps/{answer}"] = base[f"logps/{answer}"] - share * moved
                    row[f"eval_rewards/{answer}"] = -beta * share * moved

        return change

    change_lines(run, far(0.1, 20.0), one)
    change_lines(run, far(0.2, 20.001), other)


def other_beta(run):
    change_json(first_trial(run).record, lambda record: record["config"].update(beta=0.4))


def batch_means(run):
    change_lines(run, evaluations(rewards__accuracies=5 / 7))


def zero_loss(run):
    change_lines(run, lambda row, number, evaluation: row.update(loss=0.0))


def nan(run):
    change_lines(run, lambda row, number, evaluation: evaluation or row.update(loss=float("nan")))


def overflow(run):
    change_lines(run, lambda row, number, evaluation: number != 2 or row.update(grad_norm=float("inf")))


def hidden_nan(run):
    def change(row, number, evaluation):
        if not evaluation and number > 0:
            row |= {"loss": 0.0, "rewards/margins": 0.0, "grad_norm": 0.0}

    change_lines(run, change)


def no_effect(run):
    change_lines(
        run,
        evaluations(
            **{f"rewards__{name}": 0.0 for name in ("chosen", "rejected", "margins")},
            **{f"logps__{answer}": -80.0 for answer in ("chosen", "rejected")},
            loss=float(np.log(2)),
        ),
    )


def clipped(run):
    trial = first_trial(run)
    rows = [json.loads(line) for line in trial.metrics.read_text().splitlines()]
    steps = [row for row in rows if "eval_loss" not in row]
    more = [{**steps[-1], "step": 100 + number, "grad_norm": 9.0} for number in range(600)]
    trial.metrics.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))


def failed(run):
    change_json(first_trial(run).record, lambda record: record.update(status="failed", reason="the loss became nan"))


def collapse(run):
    def change(row, number, evaluation):
        if evaluation:
            row |= {"eval_rewards/chosen": -4.0, "eval_rewards/rejected": -9.0, "eval_rewards/margins": 5.0}
            row |= {"eval_logps/chosen": -140.0, "eval_logps/rejected": -210.0}

    change_lines(run, change)


def overfit(run):
    def change(row, number, evaluation):
        if evaluation:
            row["eval_loss"] = 0.5 if row["epoch"] == 1 else 0.7

    change_lines(run, change)
    change_json(first_trial(run).record, lambda record: record.update(best_epoch=2))


def length_bias(run):
    file = best_records(run)
    rows = pq.read_table(file).num_rows
    long = np.arange(rows) % 2 == 0
    change_table(
        file,
        **{"tokens/chosen": np.where(long, 50, 10), "tokens/rejected": np.full(rows, 30)},
        **{"rewards/accuracies": long.astype(float)},
    )


def best_records(run: Run) -> Path:
    trial = first_trial(run)
    return trial.examples(json.loads(trial.record.read_text())["best_epoch"])


def summary_of_winner(**values):
    def plant(run):
        winner = json.loads(run.paths.selection.read_text())["winner"]

        def change(generations):
            generations["models"]["base"]["summary"] |= {"median_tokens": 40.0, "ended_share": 0.9}
            generations["models"][winner]["summary"] |= {"median_tokens": 40.0, "ended_share": 0.9, **values}

        change_json(run.paths.generations, change)

    return plant


def swapped_labels(run):
    change_lines(run, evaluations(rewards__accuracies=4 / 24, rewards__margins=-0.3))


def claims_without_rows(run):
    change_json(run.paths.data, lambda data: data["splits"]["validation"].update(pairs=6))
    for trial in run.paths.trials.iterdir():
        change_lines(run, evaluations(rewards__accuracies=5 / 6), run.paths.trial(trial.name))


def ranked_by_loss(run):
    change_json(run.paths.selection, lambda selection: selection.update(rule="eval_loss"))


def unsettled(run):
    def change(selection):
        selection["settled"] = False
        selection["comparisons"] = [{**entry, "differs": False} for entry in selection["comparisons"]]

    change_json(run.paths.selection, change)


def other_weights(run):
    file = run.paths.best / "adapter_model.safetensors"
    other = next(
        run.paths.trial(trial.name).best
        for trial in run.paths.trials.iterdir()
        if trial.name != json.loads(run.paths.selection.read_text())["winner"]
    )
    shutil.copy(other / "adapter_model.safetensors", file)


def overlap(run):
    table = pq.read_table(run.paths.pairs).to_pylist()
    train = next(row for row in table if row["split"] == "train")
    for row in table:
        if row["split"] == "validation":
            row["prompt"] = train["prompt"]
    pq.write_table(pa.Table.from_pylist(table, schema=pq.read_schema(run.paths.pairs)), run.paths.pairs)


def truncated(run):
    change_json(
        run.paths.data, lambda data: data["sources"][0].update(shortened=4, dropped={"longer than 64 tokens": 3})
    )


def margins(run):
    change_lines(run, evaluations(rewards__margins=lambda value: value + 0.3))


def accuracy(value, **more):
    return lambda run: change_lines(run, evaluations(rewards__accuracies=value, **more))


def positive_log_probs(run):
    change_lines(run, evaluations(logps__chosen=abs))


def loss_below_bound(run):
    change_lines(run, evaluations(loss=0.2, rewards__chosen=0.1, rewards__rejected=0.0, rewards__margins=0.1))


def negated_rewards(run):
    def change(row, number, evaluation):
        if evaluation:
            row |= {"eval_rewards/chosen": -row["epoch"], "eval_rewards/rejected": row["epoch"]}
            row |= {"eval_rewards/margins": -2.0 * row["epoch"]}
            row |= {"eval_logps/chosen": -80.0 + 9 * row["epoch"], "eval_logps/rejected": -90.0 - 9 * row["epoch"]}

    change_lines(run, change)


def steps_go_back(run):
    change_lines(
        run, lambda row, number, evaluation: row.update(step=7 - row["step"] if row["step"] > 3 else row["step"])
    )


def evaluations_reversed(run):
    """Four epochs in which the training goes away from the base and the evaluations come back to it."""
    trial = first_trial(run)
    lines = trial.metrics.read_text().splitlines()
    step, evaluation = ({}, {})
    for line in map(json.loads, lines):
        step, evaluation = (step, line) if "eval_loss" in line else (line, evaluation)
    rows = []
    for epoch in range(1, 5):
        rows.append(
            {**step, "step": epoch, "epoch": epoch, "rewards/chosen": epoch / 10, "rewards/rejected": -epoch / 10}
        )
        away = (5 - epoch) / 10
        rewards = {"eval_rewards/chosen": away, "eval_rewards/rejected": -away, "eval_rewards/margins": 2 * away}
        rows.append({**evaluation, "step": epoch, "epoch": epoch, **rewards})
    trial.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def other_row(run):
    """Five epochs, of which the third has the log-probs of other pairs."""
    trial = first_trial(run)
    evaluation = next(row for row in map(json.loads, trial.metrics.read_text().splitlines()) if "eval_loss" in row)
    rows = []
    for epoch in range(1, 6):
        rewards = {"eval_rewards/chosen": epoch / 10, "eval_rewards/rejected": -epoch / 10}
        logps = {"eval_logps/chosen": epoch - 80.0, "eval_logps/rejected": -epoch - 90.0 - 5.0 * (epoch == 3)}
        margin = {"eval_rewards/margins": epoch / 5, "eval_loss": 0.6 - epoch / 100}
        rows.append({**evaluation, "step": epoch, "epoch": epoch, **rewards, **logps, **margin})
    trial.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pasted_evaluation(run):
    seen = {}

    def change(row, number, evaluation):
        if evaluation:
            row |= {name: value for name, value in seen.items() if name not in ("step", "epoch")}
            seen.update(row)

    change_lines(run, change)


def same_trials(run):
    one, other = (run.paths.trial(entry["name"]) for entry in json.loads(run.paths.sweep.read_text())["trials"])
    shutil.copy(one.metrics, other.metrics)


def constant_norm(run):
    change_lines(run, lambda row, number, evaluation: evaluation or row.update(grad_norm=1.0))


def rate_zero(run):
    change_lines(run, lambda row, number, evaluation: evaluation or row.update(learning_rate=1e-3 * (row["step"] < 3)))


def rate_jumps(run):
    change_lines(
        run, lambda row, number, evaluation: evaluation or row.update(learning_rate=1e-2 if row["step"] == 3 else 1e-3)
    )


def moved_reference(run):
    """The second trial's base is where the first one ended."""
    one, other = (run.paths.trial(entry["name"]) for entry in json.loads(run.paths.sweep.read_text())["trials"])

    def place(start, beta):
        def change(row, number, evaluation):
            if evaluation:
                for answer, sign in (("chosen", 1), ("rejected", -1)):
                    row[f"eval_logps/{answer}"] = -80.0 + sign * (start + row["epoch"])
                    row[f"eval_rewards/{answer}"] = beta * sign * row["epoch"]
                row["eval_rewards/margins"] = 2 * beta * row["epoch"]

        return change

    change_lines(run, place(0.0, 0.1), one)
    change_lines(run, place(2.0, 0.2), other)


def trained_on_evaluation(run):
    def change(row, number, evaluation):
        moved = row["epoch"] if evaluation else row["step"]
        start = "eval_" if evaluation else ""
        for answer, sign in (("chosen", 1), ("rejected", -1)):
            row[f"{start}logps/{answer}"] = -80.0 + sign * moved
            row[f"{start}rewards/{answer}"] = 0.1 * sign * moved
        row[f"{start}rewards/margins"] = 0.2 * moved

    change_lines(run, change)


FAULTS = {
    "margin-arithmetic": (margins, "error"),
    "value-range": (accuracy(1.04), "error"),
    "accuracy-contradiction": (accuracy(0.0), "error"),
    "log-prob-positive": (positive_log_probs, "error"),
    "loss-below-bound": (loss_below_bound, "error"),
    "reward-sign": (negated_rewards, "error"),
    "base-inconsistent": (other_row, "error"),
    "rows-order": (steps_go_back, "error"),
    "evaluations-order": (evaluations_reversed, "error"),
    "rows-repeat": (pasted_evaluation, "error"),
    "trials-repeat": (same_trials, "error"),
    "frozen-column": (constant_norm, "error"),
    "learning-rate-zero": (rate_zero, "error"),
    "learning-rate-schedule": (rate_jumps, "error"),
    "reference-moved": (moved_reference, "warning"),
    "evaluates-training-pairs": (trained_on_evaluation, "error"),
    "start-not-base": (starts_elsewhere, "error"),
    "trials-continue": (goes_on, "error"),
    "beta-mislabelled": (other_beta, "error"),
    "accuracy-impossible": (batch_means, "error"),
    "train-loss-zero": (zero_loss, "error"),
    "nan-as-zero": (nan, "error"),
    "nan-as-zero, hidden": (hidden_nan, "error"),
    "nan-as-zero, in a loss scaler": (overflow, "note"),
    "no-effect": (no_effect, "error"),
    "always-clipped": (clipped, "note"),
    "trial-failed": (failed, "warning"),
    "chosen-collapse": (collapse, "warning"),
    "only-rejected-falls": (collapse, "note"),
    "overfit": (overfit, "warning"),
    "length-bias": (length_bias, "warning"),
    "length-drift": (summary_of_winner(median_tokens=120.0), "note"),
    "answers-break": (summary_of_winner(ended_share=0.2), "warning"),
    "answers-break, empty": (summary_of_winner(empty_share=0.8, median_tokens=0.0), "error"),
    "answers-break, repeating": (summary_of_winner(repeated_share=0.6), "warning"),
    "answers-break, in another language": (summary_of_winner(other_language_share=0.5), "warning"),
    "below-chance": (swapped_labels, "warning"),
    "few-rows": (claims_without_rows, "warning"),
    "beta-ranking": (ranked_by_loss, "note"),
    "winner-unsettled": (unsettled, "note"),
    "weights-not-reported": (other_weights, "error"),
    "split-overlap": (overlap, "error"),
    "truncation": (truncated, "warning"),
}


def cured(run: Run) -> Run:
    """Remove the findings of the small run itself: few rows, betas ranked by loss, an unsettled winner."""
    change_json(run.paths.data, lambda data: data["splits"]["validation"].update(pairs=2400))
    change_json(run.paths.selection, lambda selection: selection.update(rule="accuracy", settled=True))
    return run


@pytest.fixture
def copied(clean, tmp_path):
    """A copy of the clean run to plant faults in."""
    shutil.copytree(clean.root, tmp_path / "run")
    return cured(Run(tmp_path / "run"))


def test_every_rule_has_a_planted_fault():
    assert {name.split(",")[0] for name in FAULTS} == {rule.id for rule in RULES}


def test_the_clean_run_is_clean(clean):
    record = json.loads(clean.paths.audit.read_text())
    assert {finding["rule"] for finding in record["findings"]} <= {"few-rows", "beta-ranking", "winner-unsettled"}
    few = {"always-clipped", "length-bias", "evaluations-order", "base-inconsistent"}
    assert record["not_checked"].keys() == few, "six steps, two epochs and 24 pairs are too few"
    assert not record["partly_checked"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(copied, name):
    plant, level = FAULTS[name]
    rule = name.split(",")[0]
    assert rule not in found(copied)
    plant(copied)
    assert found(copied).get(rule) == level


def test_clean_runs_raise_no_false_alarm(tiny_model, tmp_path):
    """No errors, which would mean wrong results. Seeds are fixed, so the outcome stays the same."""
    accused = {}
    for seed in range(1, CLEAN_RUNS + 1):
        rates = [[1e-3], [3e-3, 1e-3], [1e-4]][seed % 3]
        run = clean_run(tiny_model, tmp_path / str(seed), seed, learning_rate=rates, beta=[[0.1], [0.1, 0.5]][seed % 2])
        errors = [each for each in audit(read_evidence(run.root)).findings if each.level == "error"]
        if errors:
            accused[seed] = errors
        shutil.rmtree(tmp_path / str(seed))
    print(f"accused: {len(accused)} of {CLEAN_RUNS} clean runs")
    assert len(accused) <= FALSE_ALARMS * CLEAN_RUNS, accused


def test_a_running_trial_is_watched_and_each_thing_is_said_once(tmp_path):
    run, said = Run(tmp_path), []
    trial = TrialConfig(learning_rate=1e-3, beta=0.1)
    watching = LiveAudit(run, lambda name: trial, said.append)
    first = {"step": 1, "epoch": 0.5, "loss": 0.69, "rewards/chosen": -0.9, "rewards/rejected": -1.2}
    write_atomic(run.paths.trial("a").metrics, json.dumps(first) + "\n")  # of an earlier call; the trial goes on
    watching.start("a", 10, 1, 1)
    assert not said
    for epoch, loss in ((1, 0.5), (2, 0.7), (3, 0.8)):
        watching.log("a", TrainingStep(step=5 * epoch, epoch=epoch, loss=0.4, margin=0.5, grad_norm=1.0))
        watching.log("a", evaluation(step=5 * epoch, epoch=epoch, loss=0.4, eval_loss=loss))
    watching.finish("a", "finished", 1)
    assert [(finding.rule, finding.trials) for finding in said] == [("start-not-base", ("a",)), ("overfit", ("a",))]
