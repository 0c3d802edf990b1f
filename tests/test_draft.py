"""Drafting pairs without people: answers through the scheduler, ranked, with provenance; and rounds of it."""

from __future__ import annotations

import io
import json
from collections import Counter
from itertools import pairwise

import pytest
from conftest import pairtune
from rich.console import Console

from pairtune import draft
from pairtune.draft import Drafting, draft_pairs, judge_calls, read_prompts
from pairtune.errors import BadInput
from pairtune.evaluation.winrate import ConciseJudge, better
from pairtune.models.sampling import SamplingParams
from pairtune.run.folder import Run
from pairtune.run.records import Answer


class Longest:
    """A judge with a known preference: the longer answer."""

    name = "the longer answer"

    def judge(self, prompts, ours, base, on_progress):
        return [better(len(mine.text), len(theirs.text)) for mine, theirs in zip(ours, base, strict=True)]


class Said:
    """A model whose answers are given: [answers][prompts]."""

    name, fingerprint = "said", "f" * 16

    def __init__(self, *texts: list[str]) -> None:
        self._texts = texts

    def answer(self, prompts, params, count):
        return [[Answer(text=text, tokens=len(text), ended=True) for text in turn] for turn in self._texts[:count]]


def test_best_and_worst_by_a_round_robin():
    prompts = [({"role": "user", "content": each},) for each in ("One?", "Two?", "Three?")]
    model = Said(["a", "b", ""], ["aaa", "b", "c"], ["aa", "b", "cc"])
    found = draft_pairs(model, prompts, Drafting(3, Longest(), SamplingParams(temperature=1.0, seed=7)))
    (row,) = found.rows
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("aaa", "a")
    assert (row["draft"]["chosen_wins"], row["draft"]["rejected_wins"]) == (2, 0)
    assert (row["draft"]["judge"], row["draft"]["seed"]) == ("the longer answer", 7)
    assert found.left_out == Counter({"all answers are equally good": 1, "an empty answer": 1})


def test_the_concise_rule_orders_answers():
    """Sensible over others, others over flawed ones; by hand."""
    sensible = "A lighthouse warns ships of rocks at night, so that they can find a safe way into the harbour."
    asked = [({"role": "user", "content": "What is a lighthouse for?"},)]
    answers = [
        Answer(text=sensible, tokens=30, ended=True),
        Answer(text="I think a lighthouse warns ships.", tokens=20, ended=True),
        Answer(text="Ships.", tokens=3, ended=True),
    ]
    judge = ConciseJudge()
    for one, other in pairwise(answers):
        assert judge.judge(asked, [one], [other], lambda done: None) == [1.0]
        assert judge.judge(asked, [other], [one], lambda done: None) == [0.0]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.txt", "\n\n", "has no prompt"),
        ("bad.jsonl", '{"prompt": "Fine?"}\n{"question": "?"}', "bad.jsonl:2: should be a JSON object with a field"),
        (
            "turns.jsonl",
            '{"prompt": [{"role": "assistant", "content": "Hi"}]}',
            "turns.jsonl:1: prompt should be a text",
        ),
        ("number.jsonl", '{"prompt": 3}', "number.jsonl:1: prompt should be a text, or messages"),
    ],
)
def test_bad_prompts(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=told.replace("(", r"\(")):
        read_prompts(tmp_path / name)
    with pytest.raises(BadInput, match="cannot be read"):
        read_prompts(tmp_path / "absent.txt")


def test_prompts_are_read_once_each(tmp_path):
    (tmp_path / "p.txt").write_text("Why?\n\nwhy?\nWho?\n")
    assert [prompt[0]["content"] for prompt in read_prompts(tmp_path / "p.txt")] == ["Why?", "Who?"]


def test_pairs_of_a_real_model_are_repeatable_and_trainable(tiny_model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"Question {chr(97 + number) * 8} {number}?" for number in range(12)))
    flags = ("--prompts", prompts, "--model", tiny_model, "--answers", "8", "--max-tokens", "48")
    for name in ("one.jsonl", "two.jsonl"):
        told = pairtune("data", "draft", *flags, "--out", tmp_path / name, "--json")
        assert told.returncode == 0, told.stderr
        account = json.loads(told.stdout)
        assert account["pairs"] + sum(account["left_out"].values()) == 12
    one = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert all(row["draft"]["model"] == str(tiny_model) and len(row["draft"]["fingerprint"]) == 16 for row in one)
    inspected = json.loads(pairtune("data", "inspect", tmp_path / "one.jsonl", "--model", tiny_model, "--json").stdout)
    assert inspected["kept"] == len(one)
    refused = pairtune("data", "draft", *flags, "--out", tmp_path / "one.jsonl")
    assert (refused.returncode, "already exists" in refused.stderr) == (2, True)


def test_rounds_go_on_from_one_another(tiny_model, tmp_path):
    prompts, settings = tmp_path / "prompts.txt", tmp_path / "light.yaml"
    prompts.write_text("\n".join(f"Question {chr(97 + number % 26) * 8} {number * 31}?" for number in range(200)))
    settings.write_text("learning_rate: [1.0e-3]\nbeta: [0.1]\nepochs: 1\nsamples: 0\ndtype: float32\n")
    told = pairtune(
        *("data", "draft", "--prompts", prompts, "--model", tiny_model, "--answers", "3", "--max-tokens", "8"),
        *("--out", tmp_path / "out", "--rounds", "2", "--settings", settings, "--json"),
    )
    assert told.returncode == 0, told.stderr
    rounds = json.loads(told.stdout)["rounds"]
    assert [each["number"] for each in rounds] == [1, 2]
    assert json.loads((tmp_path / "out" / "rounds.json").read_text()) == rounds
    for each in rounds:
        assert 0 <= each["won"]["interval"][0] <= each["won"]["rate"] <= each["won"]["interval"][1] <= 1
    asked = [
        {json.loads(line)["prompt"][0]["content"] for line in (tmp_path / "out" / f"pairs-{each}.jsonl").open()}
        for each in (1, 2)
    ]
    assert asked[0]
    assert asked[1]
    assert not asked[0] & asked[1]  # each round has prompts of its own
    second = Run.open(tmp_path / "out" / "round-2")
    assert second.lineage is not None
    assert [parent.name for parent in second.lineage.parents] == ["round-1"]


def test_as_many_questions_to_a_judge_are_foretold_as_it_is_asked(tmp_path):
    """Three answers in six orders to each prompt; of held-out ones the two models' answers in both orders a round."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"Question {number}?" for number in range(100)))
    asked = read_prompts(prompts)
    assert judge_calls(asked, 3, 0, 0.2) == 100 * 6
    calls = {rounds: judge_calls(asked, 3, rounds, 0.2) for rounds in (1, 2)}
    held = (calls[2] - calls[1]) // 2
    assert 5 < held < 40
    assert calls[1] == (100 - held) * 6 + held * 2


def test_too_few_prompts_for_the_rounds_are_refused(tiny_model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"Question {number * 31}?" for number in range(8)))
    flags = ("--prompts", prompts, "--model", tiny_model, "--hold-out", "0.5", "--rounds", "8")
    told = pairtune("data", "draft", *flags, "--out", tmp_path / "out")
    assert told.returncode == 2
    assert (
        "of 8 prompts are held out (--hold-out 0.5), which is too few, or leaves less than one for each" in told.stderr
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_told_without_a_terminal_too(monkeypatch, terminal):
    """Now and then in a line of its own; on a terminal it stays in its place."""
    monkeypatch.setattr(draft, "QUIET_SECONDS", -1.0)
    said = io.StringIO()
    with draft._telling(Console(file=said, force_terminal=terminal, width=80), "drafting") as tell:
        tell("3/8 answers, 0:05 left")
    assert "drafting: 3/8 answers, 0:05 left" in said.getvalue()
    assert said.getvalue().endswith("\x1b[2K") == terminal  # erased when the work is over
