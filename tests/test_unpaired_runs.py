"""Whole runs on single answers: from a file with labels to a report, and what is refused on the way."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import make_pair, pairtune, small_run, write_pairs

from pairtune.config import Reading
from pairtune.data.row_parser import RowParser
from pairtune.evaluation.audit.check import audit
from pairtune.evaluation.audit.own_runs import evidence_of_run
from pairtune.run.examples import Examples
from pairtune.run.folder import Run
from pairtune.votes.pairs import harvest
from pairtune.votes.records import Vote, VotedAnswer

NUMBERS = range(60)


def row_of(number, good):
    pair = make_pair(number, rejected="No {0}" * (number % 3 + 1))
    return pair.halves()[0 if good else 1].conversational()


def write_labels(path, numbers, kinds=lambda number: number % 3 > 0):
    path.write_text("".join(json.dumps(row_of(number, kinds(number))) + "\n" for number in numbers))
    return path


@pytest.fixture(scope="module")
def thumbs(tmp_path_factory):
    return write_labels(tmp_path_factory.mktemp("thumbs") / "thumbs.jsonl", NUMBERS)


@pytest.fixture(scope="module")
def run(tiny_model, thumbs):
    """Two trials of KTO on labels alone."""
    return small_run(
        tiny_model,
        thumbs.parent / "whole",
        data=[str(thumbs)],
        eval_data=None,
        test_data=None,
        validation_share=0.2,
        test_share=0.2,
        loss="kto",
        learning_rate=[3e-3, 1e-3],
        batch_size=4,
        epochs=[2],
        samples=0,  # what a random model answers would be found fault with by chance
    )


def test_every_answer_is_accounted_for_and_every_split_has_both_kinds(run):
    data = run.data
    assert sum(source.rows_in for source in data.sources) == len(NUMBERS)
    assert sum(source.kept for source in data.sources) == sum(split.pairs for split in data.splits.values())
    assert set(data.formats.values()) == {"TRL unpaired"}
    for split in ("validation", "test"):
        file = run.paths.test_examples if split == "test" else run.paths.trial(run.trials[0].name).examples(1)
        desirable = Examples.read(file).tokens("chosen") > 0
        assert 0 < desirable.sum() < len(desirable)


def test_metrics_are_those_of_its_answers(run):
    for trial in run.trials:
        for line in trial.record.epochs:
            examples = Examples.read(run.paths.trial(trial.name).examples(line.epoch))
            good = examples.tokens("chosen") > 0
            rewards = np.where(good, examples.metric("rewards/chosen"), examples.metric("rewards/rejected"))
            assert line.chosen_reward == pytest.approx(rewards[good].mean())
            assert line.rejected_reward == pytest.approx(rewards[~good].mean())
            assert line.margin == pytest.approx(rewards[good].mean() - rewards[~good].mean())
            right = [(a > b) + (a == b) / 2 for a in rewards[good] for b in rewards[~good]]
            assert line.accuracy == pytest.approx(np.mean(right))
            assert examples.accuracy_of == "auc"
            estimate = max(0.0, line.metric("eval_kl_estimate"))
            beta = trial.config.beta
            gains = np.where(good, rewards - beta * estimate, beta * estimate - rewards)
            assert line.eval_loss == pytest.approx(np.mean(1 - 1 / (1 + np.exp(-gains))), abs=1e-6)


def test_the_report_says_answers_and_what_its_accuracy_counts(run):
    told = run.paths.report.read_text()
    assert "single answers (lora, kto loss)" in told
    assert "comparisons of a desirable with an undesirable answer" in told
    assert "On 0 of" in told or "the model moved against the label" in told
    markdown = (run.root / "report.md").read_text()
    assert "validation answers" in markdown
    assert " pairs" not in markdown.replace("log-prob margin", "").split("## Cost")[0]


def test_the_audit_finds_no_fault_in_an_honest_run(run):
    found = audit(evidence_of_run(run.root))
    assert [each.rule for each in found.findings if each.level == "error"] == []
    assert {each.rule for each in found.findings} <= {"few-rows", "winner-unsettled", "overfit"}


def test_pairs_and_labels_train_together_and_accuracy_is_within_prompts(tiny_model, tmp_path):
    """Both answers of every held-out prompt are there, so that they are compared with one another."""
    labels = write_labels(tmp_path / "labels.jsonl", range(60, 70))
    run = small_run(
        tiny_model,
        tmp_path,
        loss="bco",
        batch_size=4,
        data=[str(labels), str(write_pairs(tmp_path / "more.jsonl", range(8)))],
    )
    assert run.data.splits["train"].pairs == 10 + 16
    assert run.selection.measured.accuracy_of == "prompts"
    examples = Examples.read(run.paths.trial(run.trials[0].name).examples(1))
    rewards = np.nansum([examples.metric("rewards/chosen"), examples.metric("rewards/rejected")], axis=0)
    right = rewards[0::2] > rewards[1::2]  # a pair's two answers are neighbours
    assert run.selection.ranking[0].metrics.accuracy == pytest.approx(right.mean())
    assert "to the same prompt, among" in run.paths.report.read_text()


def test_a_run_is_evaluated_on_single_answers(run, thumbs, tmp_path):
    done = pairtune("eval", run.root, "--data", thumbs, "--samples", "0", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["pairs"], found["examples"]["accuracy_of"]) == (60, "auc")
    pairs = pairtune("eval", run.root, "--data", write_pairs(tmp_path / "pairs.jsonl", range(5)), "--samples", "0")
    assert "Preferences on 10 answers" in pairs.stdout


def test_answers_of_one_kind_cannot_be_evaluated(run, tmp_path):
    liked = write_labels(tmp_path / "liked.jsonl", range(10), lambda number: True)
    done = pairtune("eval", run.root, "--data", liked, "--samples", "0")
    assert (done.returncode, "all answers are desirable; give undesirable ones too" in done.stderr) == (2, True)


def test_one_file_for_each_kind_is_planned_and_trained_on(tiny_model, tmp_path):
    liked = write_labels(tmp_path / "liked.jsonl", range(20), lambda number: True)
    disliked = write_labels(tmp_path / "disliked.jsonl", range(30, 50), lambda number: False)
    common = ["--model", tiny_model, "--loss", "kto", "--epochs", "1", "--samples", "0"]
    done = pairtune("plan", *common, "--data", disliked, "--json")
    assert done.returncode == 0, done.stderr
    done = pairtune("plan", *common, "--data", liked, "--data", disliked, "--json")
    planned = json.loads(done.stdout)
    good, bad = (
        each["lengths"][side] for each, side in zip(planned["inspections"], ("chosen", "rejected"), strict=True)
    )
    assert planned["lengths"]["chosen"] == pytest.approx((good["mean"] + bad["mean"]) / 2)
    done = pairtune("tune", *common, "--data", liked, "--data", disliked, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr


def test_labels_go_out_as_they_came(thumbs, tmp_path):
    for ending in ("jsonl", "parquet"):
        done = pairtune("data", "convert", thumbs, tmp_path / f"out.{ending}")
        assert done.returncode == 0, done.stderr
        again = pairtune("data", "inspect", tmp_path / f"out.{ending}", "--json")
        found = json.loads(again.stdout)
        assert (found["kept"], found["single"]) == (60, [40, 20])
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert {name: first[name] for name in ("prompt", "completion", "label")} == row_of(0, good=False)


def test_the_doctor_counts_kinds_repeats_and_contradictions(tmp_path):
    rows = [
        row_of(1, True),
        row_of(1, True),
        {**row_of(1, True), "label": False},
        *(row_of(n, True) for n in range(2, 9)),
    ]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = pairtune("data", "inspect", tmp_path / "odd.jsonl").stdout
    assert "single answers, 9 desirable and 1 undesirable" in told
    assert "undesirable answers are few: --undesirable-weight 9 would balance" in told
    liked = write_labels(tmp_path / "liked.jsonl", range(10), lambda number: True)
    assert "answers contradict another one: same answer, opposite label" in told
    assert "answers that repeat another one: 1 of 10" in told
    said = " ".join(pairtune("data", "inspect", liked).stdout.split())
    assert "no answer is undesirable: both kinds are needed, perhaps from another source" in said
    assert "nan" not in said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "row 1 has one answer with a label, which --loss kto or bco learn from"),
        (["--loss", "kto", "--engine", "trl"], "--engine: is for pairs, and kto learns from single answers"),
        (["--loss", "kto", "--loss", "sigmoid"], "--loss: some learn from pairs and some from single answers"),
        (["--loss", "bco", "--sft-weight", "1"], "--sft-weight: is a term of pair losses, which bco is not; omit it"),
        (["--loss", "kto", "--desirable-weight", "0"], "--desirable-weight"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_model, thumbs, tmp_path, arguments, told):
    done = pairtune("tune", "--model", tiny_model, "--data", thumbs, "--out", tmp_path / "run", *arguments)
    assert (done.returncode, "Traceback" in done.stderr, (tmp_path / "run").exists()) == (2, False, False)
    assert told in " ".join(done.stderr.split())


def test_one_kind_of_answers_is_not_enough(tiny_model, tmp_path):
    only = write_labels(tmp_path / "liked.jsonl", range(20), lambda number: True)
    done = pairtune("tune", "--model", tiny_model, "--data", only, "--loss", "kto", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "answers for train are all desirable; give rows with undesirable answers too" in " ".join(
        done.stderr.split()
    )


def test_votes_and_thumbs_are_labels(tmp_path):
    """An answer that won is desirable, one that lost or got a thumb down is not; ties say nothing."""
    carp, pike, none = (VotedAnswer(model="m", text=text) for text in ("A carp.", "A pike.", "No."))
    given = [
        ("thumb", "up", [carp]),
        ("thumb", "down", [none]),
        ("arena", "right", [none, pike]),
        ("arena", "tie", [carp, pike]),
    ]
    votes = [
        Vote(
            id=at,
            kind=kind,
            outcome=outcome,
            prompt=make_pair(at // 2).prompt,
            answers=texts,
            voter="v",
            created="2026-01-01",
        )
        for at, (kind, outcome, texts) in enumerate(given)
    ]
    harvest(votes).write_rows(tmp_path / "votes.jsonl", single=True)
    parser = RowParser(Reading(wanted="single answers"))
    rows = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    found = [pair for row in rows for pair in parser.parse(row, "votes:1")]
    assert [(pair.chosen, pair.rejected) for pair in found] == [
        ("A carp.", ""),
        ("", "No."),
        ("", "No."),
        ("A pike.", ""),
    ]


def test_a_sanity_check_takes_whole_rows(tiny_model, tmp_path):
    """Ten unrelated prompts of either kind, in whatever order the rows are."""
    common = ["--model", tiny_model, "--loss", "kto", "--sanity-check", "--epochs", "1", "--samples", "0"]
    first_liked = write_labels(tmp_path / "sorted.jsonl", range(60), lambda number: number < 30)
    for number, data in enumerate((write_pairs(tmp_path / "pairs.jsonl", range(30)), first_liked)):
        done = pairtune("tune", *common, "--data", data, "--out", tmp_path / f"run-{number}")
        assert done.returncode == 0, done.stderr
        assert sum(split.pairs for split in Run(tmp_path / f"run-{number}").data.splits.values()) == 20
