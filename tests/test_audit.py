"""The audit of foreign logs: what it reads, what it finds, and its errors for unreadable files."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pairtune.errors import BadInput
from pairtune.evaluation.audit.check import RULES, audit
from pairtune.evaluation.audit.evidence import Evidence, TrialLog
from pairtune.evaluation.audit.logged_rows import describe, with_options
from pairtune.evaluation.audit.read import read_evidence
from pairtune.report.render_audit import audit_markdown, render_audit
from pairtune.run.records import AuditRecord, Finding

BASE = {"chosen": -120.0, "rejected": -140.0}


def evaluation(beta: float, chosen: float, rejected: float, **more) -> dict[str, float]:
    """A row of a trial whose log-probs have moved by this many nats."""
    margin = beta * (chosen - rejected)
    return {
        "eval_loss": math.log1p(math.exp(-margin)),
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/accuracies": 0.75,
        "rewards/margins": margin,
        "logps/chosen": BASE["chosen"] + chosen,
        "logps/rejected": BASE["rejected"] + rejected,
        **more,
    }


def write_csv(path: Path, rows) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(
            {name: f"{value:.6f}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
        )
    return path


def findings(path: Path, **options) -> list[Finding]:
    options = {"eval_rows": None, "batch_size": None, "betas": None, **options}
    return audit(with_options(read_evidence(path), **options)).findings


def rules(found: list[Finding]) -> dict[str, set[str]]:
    by_rule: dict[str, set[str]] = {}
    for finding in found:
        by_rule.setdefault(finding.rule, set()).update(finding.trials)
    return by_rule


@pytest.fixture(scope="module")
def assignment() -> Path:
    path = SHARED.parent / "reference" / "assignment_runs.csv"
    if not path.is_file():
        pytest.skip("the assignment's tables are kept beside the project, not in it")
    return path


def test_the_assignments_tables_give_themselves_away(assignment):
    found = findings(assignment)
    by_rule = rules(found)
    assert by_rule["start-not-base"] == {"run 2", "run 3", "run 4"}
    continued = [set(each.trials) for each in found if each.rule == "trials-continue"]
    assert continued == [{"run 1", "run 2"}, {"run 3", "run 4"}]
    evidence = " ".join(each.evidence for each in found)
    assert "-137.299118 and -137.299698" in evidence
    assert "-149.098358 and -149.098358" in evidence
    assert "labelled beta 0.1, but its rewards over its log-prob changes give beta 0.202" in evidence
    assert "labelled beta 0.2, but its rewards over its log-prob changes give beta 0.1," in evidence
    assert by_rule["beta-mislabelled"] == {"run 2", "run 3"}
    assert by_rule["train-loss-zero"] == {"run 2", "run 3", "run 4"}
    assert by_rule["rows-repeat"] == {"run 4"}
    assert not {"few-rows", "accuracy-impossible", "winner-unsettled"} & by_rule.keys(), "rows are not guessed"


def test_with_the_number_of_rows_the_accuracies_are_wrong(assignment):
    wrong = [each for each in findings(assignment, eval_rows=5) if each.rule == "accuracy-impossible"]
    assert {each.level for each in wrong} == {"error"}
    assert (
        "0.833333 cannot come from 5 rows; averaging over batches of 2 with a smaller last batch" in wrong[-1].evidence
    )
    (unsettled,) = (each for each in findings(assignment, eval_rows=5) if each.rule == "winner-unsettled")
    assert "the winner cannot be distinguished from the others" in unsettled.evidence


def test_the_command_prints_the_findings_and_fails(assignment, tmp_path):
    command = [sys.executable, "-m", "pairtune", "audit", assignment]
    done = subprocess.run([*command, "--markdown", tmp_path / "audit.md"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "start-not-base" in done.stdout
    written = (tmp_path / "audit.md").read_text()
    assert written.startswith("# Audit of ")
    assert "-149.098358" in written
    printed = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False).stdout
    record = AuditRecord.model_validate_json(printed)
    assert record.verdict == "error"
    assert audit_markdown(record) == written


def test_a_sound_table_is_left_alone(tmp_path):
    rows = [
        {
            "run": number,
            "learning_rate": rate,
            "beta": beta,
            "epoch": epoch,
            **evaluation(beta, 0.5 * epoch * speed, -epoch * speed),
        }
        for number, (rate, beta, speed) in enumerate([(3e-5, 0.1, 1.0), (1e-5, 0.1, 0.4), (3e-5, 0.2, 1.1)], 1)
        for epoch in (1, 2, 3)
    ]
    found = findings(write_csv(tmp_path / "sound.csv", rows), eval_rows=400)
    assert rules(found).keys() <= {"beta-ranking", "winner-unsettled"}  # accuracies are equal


def errors(found: list[dict]) -> set[str]:
    return {each.rule for each in found if each.level == "error"}


def test_what_is_alike_has_not_gone_on_from_one_another(tmp_path):
    """Trials of one epoch each that end in the same place; the first step of the second is at the base, or unknown."""
    rows = [{"run": run, "beta": 0.1, "epoch": 1, **evaluation(0.1, -8.0, -20.0)} for run in ("a", "b")]
    assert not errors(findings(write_csv(tmp_path / "twins.csv", rows), eval_rows=400))


def test_trials_of_one_name_stay_apart(tmp_path):
    rows = [
        {"run": "dpo", "beta": beta, "epoch": epoch, **evaluation(beta, -2.0 * epoch, -5.0 * epoch)}
        for beta in (0.1, 0.2)
        for epoch in (1, 2)
    ]
    path = write_csv(tmp_path / "same.csv", rows)
    assert not errors(findings(path, eval_rows=400))
    assert [trial.name for trial in read_evidence(path).trials] == ["dpo (1)", "dpo (2)"]


def test_trials_of_other_models_are_not_compared(tmp_path):
    rows = []
    for run, base, way in (("a", 0.0, -3.0), ("b", 0.0, -3.1), ("c", -300.0, -4.0), ("d", -300.0, 0.001)):
        for epoch in (1, 2)[: 1 if run == "d" else 2]:
            row = evaluation(0.1, way * epoch, 2 * way * epoch)
            row |= {f"logps/{answer}": row[f"logps/{answer}"] + base for answer in BASE}
            rows.append({"run": run, "beta": 0.1, "epoch": epoch, **row})
    assert not errors(findings(write_csv(tmp_path / "models.csv", rows), eval_rows=400))


def test_first_evaluations_at_other_steps_are_not_compared(tmp_path):
    rows = [
        {"run": 1, "learning_rate": 1e-5, "beta": 0.1, "step": step, **evaluation(0.1, -step / 20, -step / 10)}
        for step in (50, 500)
    ]
    rows.append({"run": 2, "learning_rate": 1e-5, "beta": 0.1, "step": 500, **evaluation(0.1, -25.1, -50.0)})
    assert "start-not-base" not in rules(findings(write_csv(tmp_path / "steps.csv", rows), eval_rows=400))


def test_accuracies_are_as_exact_as_they_are_printed(tmp_path):
    path = tmp_path / "four.csv"
    path.write_text("epoch,eval_loss,rewards/accuracies\n1,0.6,0.6667\n2,0.5,0.8333\n")
    assert not errors(findings(path, eval_rows=6))
    assert errors(findings(path, eval_rows=5)) == {"accuracy-impossible"}


def test_losses_that_were_rounded_to_0_are_no_nan(tmp_path):
    rows = [{"step": 1, "epoch": 0.1, "loss": 0.0, "grad_norm": 2e-3, "rewards/margins": 11.0}]
    found = findings(trainer_state(tmp_path, rows))
    assert [(each.rule, each.level) for each in found] == [("train-loss-zero", "warning")]


def test_a_table_of_a_log_with_its_steps_is_one_trial(tmp_path):
    """As pandas writes a `log_history`: steps with a falling learning rate, an evaluation, and a summary."""
    rows = [
        {"step": step, "epoch": step / 8, "loss": 0.6, "grad_norm": 1.0, "learning_rate": 1e-5 * (9 - step)}
        for step in range(1, 9)
    ]
    evaluated = {f"eval_{name}" if "/" in name else name: value for name, value in evaluation(0.1, -1.0, -3.0).items()}
    rows += [{"step": 8, "epoch": 1.0, **evaluated}, {"step": 8, "train_runtime": 12.5}]
    (trial,) = read_evidence(write_csv(tmp_path / "log.csv", rows)).trials
    assert (len(trial.steps), len(trial.evaluations)) == (8, 1)


def test_rules_that_could_not_look_do_not_pass(tmp_path):
    rows = [{"run": run, "beta": 0.1, "epoch": 1, "eval_loss": 0.5} for run in (1, 2)]
    record = audit(read_evidence(write_csv(tmp_path / "losses.csv", rows)))
    assert {"winner-unsettled", "few-rows", "accuracy-impossible"} <= set(record.not_checked)


def test_a_beta_shows_in_a_trial_that_does_not_move(tmp_path):
    rows = [{"run": 1, "beta": 0.1, "epoch": epoch, **evaluation(0.1, -3.0 * epoch, -6.0 * epoch)} for epoch in (1, 2)]
    rows += [{"run": 2, "beta": 0.1, "epoch": epoch, **evaluation(0.5, -9.0, -12.0)} for epoch in (1, 2)]
    assert rules(findings(write_csv(tmp_path / "still.csv", rows)))["beta-mislabelled"] == {"run 2"}


@given(beta=st.floats(0.01, 2), chosen=st.lists(st.floats(-30, 30), min_size=2, max_size=5, unique=True))
def test_beta_follows_from_rewards_and_log_probs(beta, chosen):
    rows = [evaluation(beta, moved, moved - 5) for moved in chosen]
    log = TrialLog("any", evaluations=[{"loss": row["eval_loss"], **row} for row in rows])
    found = log.implied_beta()
    if found is not None:  # None: it hardly moved
        value, error = found
        assert abs(value - beta) <= error + 1e-9
    elif max(chosen) - min(chosen) > 1:
        raise AssertionError("it moved by more than a nat")


def test_prefixed_and_titled_columns_are_the_same(tmp_path):
    row = {"beta": 0.1, "epoch": 1, **evaluation(0.1, -4.0, -8.0)}
    plain = write_csv(tmp_path / "plain.csv", [row])
    prefixed = write_csv(
        tmp_path / "prefixed.csv", [{f"eval_{name}" if "/" in name else name: value for name, value in row.items()}]
    )
    titles = {"eval_loss": "Validation Loss", "logps/chosen": "Logps/chosen", "beta": "Beta"}
    titled = write_csv(tmp_path / "titled.csv", [{titles.get(name, name): value for name, value in row.items()}])
    logs = [read_evidence(path).trials[0] for path in (plain, prefixed, titled)]
    assert [log.evaluations for log in logs] == [logs[0].evaluations] * 3
    assert {log.beta for log in logs} == {0.1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("epoch,accuracy\n1,0.5\n", "neither eval_loss nor rewards/chosen among its columns"),
        ("epoch,eval_loss\n1,high\n", "row 2, eval_loss: 'high' is not a number"),
        ("epoch,eval_loss,rewards/accuracies\n1,0.5,60\n", "row 2, rewards/accuracies: 60 is not between 0 and 1"),
        ("epoch,eval_loss\n1,0.5,7\n", "row 2: has more or fewer cells"),
        ("epoch,eval_loss\n1\n", "row 2: has more or fewer cells"),
        (b"\xff\xfe\x00", "cannot be read as CSV"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=message):
        read_evidence(path)


def test_what_cannot_be_audited_is_said(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for path, message in (
        (tmp_path / "nothing", "no such file"),
        (tmp_path / "notes.txt", "cannot be audited"),
        (tmp_path, "cannot be audited"),
    ):
        with pytest.raises(BadInput, match=message):
            read_evidence(path)
    with pytest.raises(BadInput, match="2 given for 1 trial;"):
        with_options(read_evidence(write_csv(tmp_path / "a.csv", [evaluation(0.1, 1.0, 0.0)])), None, None, [0.1, 0.2])


def trainer_state(folder: Path, rows, **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows, **more}))
    return folder / "trainer_state.json"


def eval_row(step: int, loss: float) -> dict[str, float]:
    metrics = {f"eval_{name}" if "/" in name else name: value for name, value in evaluation(0.1, 1.0, -1.0).items()}
    return {"step": step, "epoch": step / 10, **metrics, "eval_loss": loss}


def test_a_trainer_state_tells_which_weights_were_saved(tmp_path):
    rows = [eval_row(10, 0.6), eval_row(20, 0.5), eval_row(30, 0.65)]
    last = findings(trainer_state(tmp_path / "last", rows, global_step=30))
    (left,) = (each for each in last if each.rule == "weights-not-reported")
    assert left.level == "note"
    assert "the weights are those of step 30" in left.evidence
    (tmp_path / "last" / "checkpoint-20").mkdir()
    assert "weights-not-reported" not in rules(findings(tmp_path / "last" / "trainer_state.json"))
    kept = trainer_state(
        tmp_path / "kept", rows, global_step=30, best_model_checkpoint="out/checkpoint-20", best_metric=0.5
    )
    assert "weights-not-reported" not in rules(findings(kept))
    other = trainer_state(
        tmp_path / "other", rows, global_step=30, best_model_checkpoint="out/checkpoint-30", best_metric=0.65
    )
    assert "the best checkpoint is from step 30" in str(findings(other))


def test_of_a_trainings_checkpoints_the_last_counts_and_trainings_are_trials(tmp_path):
    for number, folder in enumerate(("a/checkpoint-10", "a/checkpoint-20", "b"), 1):
        trainer_state(tmp_path / folder, [eval_row(10, 0.6)] * number, global_step=10 * number)
    trials = read_evidence(tmp_path).trials
    assert [(trial.name, len(trial.evaluations)) for trial in trials] == [("a", 2), ("b", 3)]


def test_nan_in_a_trainer_state_is_found(tmp_path):
    path = trainer_state(
        tmp_path, [{"step": 1, "epoch": 0.1, "loss": 0.0, "grad_norm": math.nan, "rewards/margins": 0.2}]
    )
    found = [each.evidence for each in findings(path) if each.rule == "nan-as-zero"]
    assert any("NaN was logged as 0" in each for each in found)
    (tmp_path / "trainer_state.json").write_text("[]")
    with pytest.raises(BadInput, match="no log_history"):
        read_evidence(path)


def test_a_real_offline_run_of_wandb_is_read(tmp_path):
    """W&B's own client writes it in a separate process, as a training script would."""
    script = (
        "import wandb\n"
        "run = wandb.init(project='p', name='first', mode='offline', config={'beta': 0.1, 'learning_rate': 3e-5})\n"
        "run.log({'train/loss': 0.0, 'train/grad_norm': 0.5, 'train/rewards/margins': 2.0, 'train/global_step': 1})\n"
        "run.log({'eval/loss': 0.5, 'eval/rewards/chosen': -2.0, 'train/global_step': 2})\n"
        "run.finish()\n"
    )
    env = os.environ | {
        "WANDB_DIR": str(tmp_path),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "HOME": str(tmp_path),
    }
    subprocess.run([sys.executable, "-c", script], check=True, env=env, capture_output=True, cwd=tmp_path, timeout=120)
    evidence = read_evidence(tmp_path / "wandb")
    (trial,) = evidence.trials
    assert (evidence.kind, trial.name, trial.beta, trial.learning_rate) == ("W&B offline run", "first", 0.1, 3e-5)
    assert trial.steps[0]["loss"] == 0.0
    assert trial.evaluations[0]["rewards/chosen"] == -2.0
    assert "train-loss-zero" in {each.rule for each in audit(evidence).findings}
    (file,) = tmp_path.rglob("*.wandb")
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])  # its writer was killed
    assert read_evidence(file).trials[0].evaluations == trial.evaluations
    file.write_bytes(whole[:100] + b"damaged" + whole[107:])
    with pytest.raises(BadInput, match="is damaged"):
        read_evidence(file)


def test_rules_say_what_to_do_and_have_names_of_their_own():
    assert len({rule.id for rule in RULES}) == len(RULES) >= 17
    for rule in RULES:
        assert rule.explanation.endswith(".")
        assert rule.advice.endswith(".")


def test_the_audit_needs_no_torch():
    rooms = "pairtune.evaluation.audit.read, pairtune.evaluation.audit.check, pairtune.report.write"
    code = f"import sys, {rooms}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def log(*steps, name="one", evaluations=(), **more):
    return TrialLog(name, 1e-5, 0.1, steps=list(steps), evaluations=list(evaluations), **more)


def verdicts(*trials, kind="trainer_state.json"):
    record = audit(Evidence(Path("log"), kind, list(trials)))
    return {finding.rule for finding in record.findings}, set(record.passed), record.not_checked


def rewards(step, chosen, rejected, **more):
    return {"step": step, "rewards/chosen": chosen, "rewards/rejected": rejected, **more}


def test_losses_without_a_reference_are_not_accused_of_their_start():
    """CPO, SimPO and ORPO log beta times the log-probs themselves: -8 and -9 before any training."""
    steps = [
        {"step": n, "loss": 0.9, "logps/chosen": -80.0 - n, "logps/rejected": -90.0 - 2 * n}
        | {"rewards/chosen": -8.0 - n / 10, "rewards/rejected": -9.0 - n / 5}
        for n in range(1, 5)
    ]
    found, passed, missing = verdicts(log(*steps, evaluations=[{**step, "epoch": step["step"]} for step in steps]))
    assert found.isdisjoint({"start-not-base", "trials-continue", "beta-mislabelled", "no-effect", "chosen-collapse"})
    assert "start-not-base" not in passed
    assert "this loss has none" in missing["start-not-base"]
    with_reference = [{**step, "logps/chosen": -50.0} for step in steps]
    assert "start-not-base" in verdicts(log(*with_reference))[0]


def test_a_loss_with_label_smoothing_may_fall_below_that_without():
    """At a margin of -1 and a smoothing of 0.1: log(1 + e) - 0.1 = 1.2133, where the loss without it is 1.3133."""
    rows = [
        {**rewards(n, -0.5, 0.5), "rewards/margins": -1.0, "rewards/accuracies": 0.0, "loss": 1.2133}
        for n in range(1, 5)
    ]
    evaluations = [{**row, "epoch": row["step"]} for row in rows]
    plain, smoothed = (log(*rows, evaluations=evaluations, eval_rows=8) for _ in range(2))
    describe(plain, {"loss_type": ["sigmoid"]})
    describe(smoothed, {"loss_type": ["sigmoid"], "label_smoothing": 0.1})
    assert "loss-below-bound" in verdicts(plain)[0]
    assert "loss-below-bound" not in verdicts(smoothed)[0]


def test_a_first_row_at_step_ten_far_from_the_base_is_found():
    """Mean rewards of +3 and -4 over ten steps that then stay there cannot have started at 0."""
    later = [rewards(20, 3.05, -4.1), rewards(30, 3.0, -4.0)]
    found, passed, _ = verdicts(log(rewards(10, 3.0, -4.0), *later))
    assert "start-not-base" in found
    assert "start-not-base" in verdicts(log(rewards(10, 3.0, -4.0)))[0]
    found, passed, missing = verdicts(log(rewards(10, 0.02, -0.03), rewards(20, 0.1, -0.2)))
    assert "start-not-base" not in found | passed
    assert "the first row is the mean of steps 1 to 10" in missing["start-not-base"]


def test_a_first_mean_that_leaves_no_room_for_ln_2_is_found():
    """Ten losses of which the first is ln 2 have a mean of at least 0.069."""
    low = rewards(10, 0.5, -0.5, loss=0.05), rewards(20, 0.9, -0.9, loss=0.04)
    assert "start-not-base" in verdicts(log(*low, loss="sigmoid"))[0]
    assert "start-not-base" not in verdicts(log(*low))[0], "another loss can be that low"
    enough = rewards(10, 0.5, -0.5, loss=0.07), rewards(20, 0.9, -0.9, loss=0.0)
    assert "start-not-base" not in verdicts(log(*enough, loss="sigmoid"))[0]


@pytest.mark.parametrize("every", [10, 20, 25])
@pytest.mark.parametrize("pace", [0.002, 0.02, 0.2, 1.0, 3.0])
def test_sound_logs_of_every_pace_are_not_accused(every, pace):
    """Rewards that grow from 0 linearly, saturating, or after a warm-up, with the noise of small batches."""
    generator = np.random.default_rng(int(1000 * pace) + every)
    steps = np.arange(200)
    for shape in (steps, 40 * (1 - np.exp(-steps / 8)), 3 * (1 - np.exp(-steps / 3)), np.maximum(0, steps - 20)):
        chosen, rejected = (
            (sign * pace * shape + generator.normal(0, 0.1 * pace, 200) * (steps > 0)) for sign in (0.7, -1.0)
        )
        loss = np.logaddexp(0, -(chosen - rejected))
        rows = [
            rewards(at + every, *(float(each[at : at + every].mean()) for each in (chosen, rejected)))
            | {"loss": float(loss[at : at + every].mean())}
            for at in range(0, 200, every)
        ]
        assert "start-not-base" not in verdicts(log(*rows))[0]


def test_no_rule_passes_what_it_has_not_seen():
    """Empty evidence, single numbers, and this project's own kind without files: no rule may pass."""
    nothing = {"loss": math.nan}
    for trials in ([], [log()], [log(nothing)], [log(evaluations=[nothing]), log(evaluations=[nothing], name="two")]):
        _, passed, missing = verdicts(*trials)
        assert not passed - {"nan-as-zero"}
        assert all(missing.values())


INPUTS = ("loss", "grad_norm", "rewards", "logps", "accuracies", "examples", "eval_rows", "beta")


@pytest.mark.parametrize("removed", INPUTS)
def test_what_a_rule_needs_is_what_it_says(removed):
    """Two full logs: most rules pass or find; without an input, the rules that need it report so."""
    generator = np.random.default_rng(3)

    def one(name, beta):
        def row(n):
            return {"step": n, "epoch": n / 10, "loss": 0.7 - n / 200, "grad_norm": 0.5, "logps/chosen": -80 + n / 2}

        def full(n):
            up, down = beta * n / 2, -beta * n / 2
            more = {"rewards/chosen": up, "rewards/rejected": down, "rewards/margins": up - down}
            return row(n) | more | {"logps/rejected": -90 - n / 2, "rewards/accuracies": 0.75}

        tokens = {f"tokens/{answer}": generator.integers(5, 50, 40).astype(float) for answer in ("chosen", "rejected")}
        examples = tokens | {"rewards/accuracies": np.tile([1.0, 1.0, 1.0, 0.0], 10)}
        made = log(
            *map(full, range(1, 30)),
            name=name,
            max_grad_norm=1.0,
            loss="sigmoid",
            evaluations=[full(0), *map(full, (10, 20))],
        )
        made.steps[0] |= {f"rewards/{answer}": 0.0 for answer in ("chosen", "rejected", "margins")}
        made.beta, made.eval_rows, made.examples = beta, 40, examples
        made.best_epoch = 2.0
        return made

    def without(trial):
        for rows in (trial.steps, trial.evaluations):
            rows[:] = [{key: value for key, value in row.items() if removed not in key} for row in rows]
        if removed == "examples":
            trial.examples = {}
        if removed in ("eval_rows", "beta"):
            setattr(trial, removed, None)
        return trial

    whole = verdicts(one("one", 0.1), one("two", 0.2))
    needing = {
        "loss": {"overfit", "train-loss-zero"},
        "grad_norm": {"always-clipped"},
        "rewards": {"start-not-base", "no-effect", "chosen-collapse", "only-rejected-falls", "below-chance"},
        "logps": {"beta-mislabelled", "chosen-collapse", "trials-continue"},
        "accuracies": {"accuracy-impossible", "below-chance", "few-rows", "winner-unsettled"},
        "examples": {"length-bias"},
        "eval_rows": {"accuracy-impossible", "below-chance"},
        "beta": {"beta-mislabelled"},
    }[removed]
    assert needing.isdisjoint(whole[2]), "with everything they can look"
    found, passed, missing = verdicts(without(one("one", 0.1)), without(one("two", 0.2)))
    assert needing <= missing.keys() | found
    assert needing.isdisjoint(passed)


def test_what_a_rule_saw_of_some_trials_only_is_said():
    seen = log(*(rewards(n, 0.0, 0.0, grad_norm=0.5) for n in range(1, 30)), name="seen", max_grad_norm=1.0)
    record = audit(Evidence(Path("log"), "CSV", [seen, log(rewards(1, 0.0, 0.0), name="unseen")]))
    assert "always-clipped" in record.passed
    assert record.partly_checked["always-clipped"] == {"unseen": "the norm that gradients were clipped to"}
    assert "partly checked: always-clipped (unseen lacks the norm that gradients were clipped to)" in shown(record)


def shown(record):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_audit(record))
    return console.export_text()


def step_row(step: int) -> dict[str, float]:
    rewards = {"rewards/chosen": 0.1, "rewards/rejected": 0.0}
    return {"step": step, "epoch": step / 10, "loss": 0.6, "learning_rate": 1e-4, **rewards}


ROWS = [step_row(10), step_row(20), eval_row(20, 0.55)]


def wandb_names(row: dict[str, float]) -> dict[str, float]:
    """A row as transformers logs it to W&B, with W&B's own columns."""

    def named(name: str) -> str:
        return f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name.replace('step', 'global_step')}"

    return {"_step": row["step"] // 10, "_runtime": 1.5} | {named(name): value for name, value in row.items()}


@pytest.mark.parametrize("name", ["log.json", "log.jsonl", "history.json", "history.csv"])
def test_bare_rows_and_exports_of_wandb_are_logs(tmp_path, name):
    rows = list(map(wandb_names, ROWS)) if name.startswith("history") else ROWS
    path = tmp_path / name
    if name.endswith(".csv"):
        write_csv(path, rows)
    else:
        path.write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)))
    (trial,) = read_evidence(path).trials
    assert [row["step"] for row in trial.steps] == [10, 20]
    assert [(row["step"], row["loss"]) for row in trial.evaluations] == [(20, 0.55)]
    assert trial.learning_rate == 1e-4


def test_an_exported_chart_has_a_column_for_each_run(tmp_path):
    path = tmp_path / "chart.csv"
    path.write_text(
        '"Step","low rate - eval/loss","low rate - eval/loss__MIN","high rate - eval/loss"\n'
        '"10","0.65","0.65","0.6"\n"20","0.6","0.6",""\n'
    )
    trials = {trial.name: trial.evaluations for trial in read_evidence(path).trials}
    assert {name: [row["loss"] for row in rows] for name, rows in trials.items()} == {
        "low rate": [0.65, 0.6],
        "high rate": [0.6],
    }


def test_a_list_without_losses_is_no_log(tmp_path):
    (tmp_path / "rows.json").write_text('[{"step": 1}]')
    with pytest.raises(BadInput, match="has no log_history with losses"):
        read_evidence(tmp_path / "rows.json")


def test_rows_and_batches_follow_from_times_and_speeds(tmp_path):
    timed = {**eval_row(10, 0.6), "eval_runtime": 2.5123, "eval_samples_per_second": 15.921}
    timed["eval_steps_per_second"] = 1.99
    (trial,) = read_evidence(trainer_state(tmp_path, [timed])).trials
    assert (trial.eval_rows, trial.eval_batches) == (40, 5)
    vague = {**timed, "eval_runtime": 4000.0, "eval_samples_per_second": 0.002}
    (trial,) = read_evidence(trainer_state(tmp_path, [vague])).trials
    assert trial.eval_rows is None, "a speed between 0.0015 and 0.0025 may be that of 6 to 10 rows"


def test_settings_beside_a_log_are_read_but_no_pickle(tmp_path):
    path = trainer_state(tmp_path, [eval_row(10, 0.6)])
    (tmp_path / "args.json").write_text(json.dumps({"beta": 0.3, "loss_type": ["hinge"], "max_grad_norm": 0.5}))
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x04.")
    (trial,) = read_evidence(path).trials
    assert (trial.beta, trial.loss, trial.max_grad_norm) == (0.3, "hinge", 0.5)
    (tmp_path / "args.json").unlink()
    (tmp_path / "README.md").write_text("This model was trained with ORPO, a method.")
    assert read_evidence(path).trials[0].loss == "orpo"


def test_betas_go_to_trials_by_name_or_in_their_natural_order(tmp_path):
    for number in (1, 2, 10):
        trainer_state(tmp_path / f"trial-{number}", [eval_row(10, 0.6)])
    evidence = read_evidence(tmp_path)
    assert [trial.name for trial in evidence.trials] == ["trial-1", "trial-2", "trial-10"]
    with_options(evidence, betas=["0.1", "0.2", "trial-2=0.5", "0.3"])
    assert [trial.beta for trial in evidence.trials] == [0.1, 0.5, 0.3]
    command = [sys.executable, "-m", "pairtune", "audit", tmp_path, "--beta", "trial-2=0.5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == "beta: trial-2 0.5\n"
    for beta, message in (("x", "number above 0"), ("trial-3=0.1", "there is no trial trial-3"), ("-1", "above 0")):
        with pytest.raises(BadInput, match=message):
            with_options(evidence, betas=[beta])
    with pytest.raises(BadInput, match="--loss sigmod: should be one of sigmoid"):
        with_options(evidence, loss="sigmod")


def edited_rows(**changes) -> list[dict[str, float]]:
    """Six evaluations of a sound trial, and what is changed in them, by number."""
    rows = [eval_row(step, 0.6) for step in range(10, 70, 10)]
    for number, row in enumerate(rows, 1):
        moved = evaluation(0.1, number, -2.0 * number)
        row.update({name if name == "eval_loss" else f"eval_{name}": value for name, value in moved.items()})
        row.update(changes.get(f"at_{number}", {}))
    return rows


def test_one_evaluation_with_other_log_probs_is_found_and_a_synchronised_reference_is_not(tmp_path):
    sound = trainer_state(tmp_path / "sound", edited_rows())
    assert "base-inconsistent" not in rules(findings(sound))
    off = trainer_state(tmp_path / "off", edited_rows(at_4={"eval_logps/rejected": -160.0}))
    (found,) = (each for each in findings(off) if each.rule == "base-inconsistent")
    assert found.level == "error"
    assert "the evaluation at step 40" in found.evidence
    later = {f"at_{number}": {"eval_logps/chosen": -100.0 - number} for number in (4, 5, 6)}
    assert "base-inconsistent" not in rules(findings(trainer_state(tmp_path / "synchronised", edited_rows(**later))))


@pytest.mark.parametrize("decimals", [2, 3, 4])
def test_printed_tables_are_as_exact_as_they_are_printed(tmp_path, decimals):
    generator = np.random.default_rng(decimals)
    for number in range(40):
        rows = []
        for step in range(10, 70, 10):
            moved = evaluation(0.1, *np.cumsum(generator.normal(0, 2, 2)))
            rows.append({"step": step, "learning_rate": 5e-6, **moved, "eval_loss": moved["eval_loss"] + 0.01})
        path = tmp_path / f"{number}.csv"
        names = list(rows[0])
        lines = [",".join(names), *(",".join(f"{row[name]:.{decimals}f}" for name in names) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
        assert not errors(findings(path)) - {"chosen-collapse"}


def test_nan_is_found_however_it_is_written_and_gaps_are_none(tmp_path):
    rows = [{**step_row(step), "grad_norm": 1.0} for step in (10, 20, 30)]
    for number, value in enumerate((None, "NaN", "nan", math.nan)):
        path = trainer_state(tmp_path / str(number), [rows[0], {**rows[1], "loss": value}, rows[2]])
        assert "nan-as-zero" in rules(findings(path))
    gaps = [{**row, "eval_loss": None, "eval_rewards/chosen": None} for row in rows]
    (trial,) = read_evidence(trainer_state(tmp_path / "gaps", gaps)).trials
    assert (len(trial.steps), len(trial.evaluations)) == (3, 0)
    path = tmp_path / "nan.csv"
    path.write_text("step,loss,grad_norm,eval_loss\n1,0.6,1.0,\n2,nan,1.0,\n3,,,0.6\n")
    assert "nan-as-zero" in rules(findings(path))


def test_what_the_log_shows_cannot_be_overruled(tmp_path):
    timed = {**eval_row(10, 0.6), "eval_runtime": 2.5, "eval_samples_per_second": 16.0, "eval_steps_per_second": 2.0}
    evidence = read_evidence(trainer_state(tmp_path, [timed]))
    with_options(evidence, eval_rows=40)
    with pytest.raises(BadInput, match="--eval-rows 7: the log of .* shows 40"):
        with_options(evidence, eval_rows=7)


def test_a_checkpoint_is_a_log_of_its_own(tmp_path):
    trainer_state(tmp_path / "run" / "checkpoint-10", [eval_row(10, 0.6)])
    trainer_state(tmp_path / "run" / "tmp-checkpoint-20", [eval_row(10, 0.6), eval_row(20, 0.5)], global_step=20)
    assert [trial.name for trial in read_evidence(tmp_path / "run" / "checkpoint-10").trials] == ["checkpoint-10"]
    (trial,) = read_evidence(tmp_path / "run").trials
    assert len(trial.evaluations) == 2


@pytest.mark.parametrize(
    "state",
    [
        {"global_step": "abc", "trial_params": "x"},
        {"global_step": [1], "trial_params": [2]},
        {"global_step": 10**400, "best_metric": 10**400, "best_model_checkpoint": "a/checkpoint-10"},
        {"best_metric": 0.6, "best_model_checkpoint": "a/checkpoint-²"},
        {"best_metric": 0.6, "best_model_checkpoint": "a/checkpoint-" + "9" * 5000},
    ],
)
def test_odd_states_are_no_crash(tmp_path, state):
    rows = [
        {**eval_row(10, 0.6), "eval_runtime": 1e308, "eval_samples_per_second": 1e308},
        {"step": 10**400, "loss": 1},
    ]
    (trial,) = audit(read_evidence(trainer_state(tmp_path, rows, **state))).trials
    assert trial == tmp_path.name


def test_tables_with_decimal_commas_and_runs_of_one_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("step;loss;eval_loss\n10;0,61;0,62\n20;0,5;0,55\n")
    (trial,) = read_evidence(path).trials
    assert [row["loss"] for row in trial.evaluations] == [0.62, 0.55]
    path.write_text("Name,beta,loss_type,eval/loss\nrun,0.1,sigmoid,0.6\nrun,0.1,hinge,0.9\n")
    assert [(trial.name, trial.loss) for trial in read_evidence(path).trials] == [
        ("run (1)", "sigmoid"),
        ("run (2)", "hinge"),
    ]


def test_a_second_evaluation_of_the_same_weights_is_no_copy(tmp_path):
    rows = edited_rows()
    path = trainer_state(tmp_path, [*rows, {**rows[-1], "eval_runtime": 1.0}])
    assert not rules(findings(path)).keys() & {"rows-repeat", "rows-order"}
