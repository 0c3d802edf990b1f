"""Files of strangers: published shapes are read with the labels that they mean, everything else is refused or counted.

Rows are made from a drawn winner, which is then written in the way of each data set; what is read back has to name the
same winner.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from conftest import byte_tokenizer

from pairtune.config import Reading, SourceConfig
from pairtune.data.convert import convert_source
from pairtune.data.inspect_source import inspect_source
from pairtune.data.preference import BadRow, LeftOut, PreferencePair
from pairtune.data.row_parser import RowParser, parse_row
from pairtune.data.source_reader import SourceReader
from pairtune.errors import BadInput

ROWS = 60


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def reader(source: str, **reading) -> SourceReader:
    return SourceReader.open(SourceConfig(source=source), "SRC", Reading(**reading), None)


def pairs(opened: SourceReader) -> list[PreferencePair]:
    return [pair for _, pair in opened.parsed() if isinstance(pair, PreferencePair)]


def inspected(opened: SourceReader):
    found = inspect_source(opened, byte_tokenizer(), 4096)
    assert found.rows_in + found.further == found.kept + sum(entry.rows for entry in found.dropped.values())
    return found


# --- published shapes ------------------------------------------------------------------------------------------------

# From a question, the answers "first" and "second", and the winner (a, b or tie) to a row as it was published.
Shape = Callable[[str, str, str, str], dict[str, Any]]


def coded(a: Any, b: Any, tie: Any = None) -> Callable[[str], Any]:
    return lambda winner: {"a": a, "b": b, "tie": tie}[winner]


def pandalm(question: str, first: str, second: str, winner: str) -> dict[str, Any]:
    """Two of three annotators agree."""
    code = coded(1, 2, 0)(winner)
    votes = [code, code, random.choice([0, 1, 2])]
    return {
        "instruction": question,
        "input": float("nan"),
        "response1": first,
        "response2": second,
        **{f"annotator{number}": vote for number, vote in enumerate(votes, 1)},
    }


SHAPES: dict[str, Shape] = {
    "LLMBar": lambda q, a, b, w: {"input": q, "output_1": a, "output_2": b, "label": coded(1, 2)(w)},
    "PandaLM": pandalm,
    "JudgeBench": lambda q, a, b, w: {
        "pair_id": "7",
        "question": q,
        "response_A": a,
        "response_B": b,
        "label": coded("A>B", "B>A", "A=B")(w),
    },
    "Auto-J": lambda q, a, b, w: {
        "scenario": "planning",
        "prompt": q,
        "response 1": a,
        "response 2": b,
        "label": coded(0, 1, 2)(w),
    },
    "AlpacaFarm": lambda q, a, b, w: {
        "instruction": q,
        "input": "",
        "output_1": a,
        "output_2": b,
        "preference": coded(1.2, 1.9, 1.5)(w),
    },
    "Prometheus": lambda q, a, b, w: {
        "orig_instruction": q,
        "orig_response_A": a,
        "orig_response_B": b,
        "orig_preference": coded("A", "B")(w),
        "instruction": "Judge these two",
    },
    "HelpSteer2 preference": lambda q, a, b, w: {
        "prompt": q,
        "response_1": a,
        "response_2": b,
        "preference_strength": coded(-3, 1, 0)(w),
    },
    "HelpSteer3": lambda q, a, b, w: {
        "context": [user(q)],
        "response1": a,
        "response2": b,
        "overall_preference": coded(-1, 2, 0)(w),
    },
    "PKU-SafeRLHF": lambda q, a, b, w: {
        "prompt": q,
        "response_0": a,
        "response_1": b,
        "better_response_id": coded(0, 1)(w),
        "safer_response_id": coded(1, 0)(w),
    },
    "WebGPT": lambda q, a, b, w: {
        "question": {"full_text": q, "id": "7"},
        "answer_0": a,
        "answer_1": b,
        "score_0": coded(0.5, -0.5, 0.0)(w),
        "score_1": coded(-0.5, 0.5, 0.0)(w),
    },
    "SHP": lambda q, a, b, w: {
        "history": q,
        "human_ref_A": a,
        "human_ref_B": b,
        "labels": coded(1, 0)(w),
        "score_A": 9,
        "score_B": 3,
    },
    "summary comparisons": lambda q, a, b, w: {
        "info": {"post": q},
        "summaries": [{"text": a}, {"text": b}],
        "choice": coded(0, 1)(w),
    },
    "arena": lambda q, a, b, w: {
        "conversation_a": [user(q), assistant(a)],
        "conversation_b": [user(q), assistant(b)],
        "winner": coded("model_a", "model_b", "tie (bothbad)")(w),
        "model_a": "m",
        "model_b": "n",
    },
    "arena table": lambda q, a, b, w: {
        "prompt": json.dumps([q]),
        "response_a": json.dumps([a]),
        "response_b": json.dumps([b]),
        **{f"winner_{name}": int(w == side) for name, side in (("model_a", "a"), ("model_b", "b"), ("tie", "tie"))},
    },
    "UltraFeedback completions": lambda q, a, b, w: {
        "instruction": q,
        "completions": [
            {"response": a, "overall_score": coded(9.0, 2.5, 4.0)(w), "fine-grained_score": 1.0},
            {"response": b, "overall_score": coded(3.0, 8.0, 4.0)(w), "fine-grained_score": 5.0},
        ],
    },
    "Nectar": lambda q, a, b, w: {
        "prompt": f"\n\nHuman: {q}\n\nAssistant: ",
        "answers": [{"answer": a, "rank": coded(1, 2)(w)}, {"answer": b, "rank": coded(2, 1)(w)}],
    },
    "ShareGPT": lambda q, a, b, w: {
        "conversations": [{"from": "human", "value": q}],
        "chosen": coded(a, b)(w),
        "rejected": coded(b, a)(w),
    },
}
NO_TIES = {"LLMBar", "Prometheus", "PKU-SafeRLHF", "SHP", "summary comparisons", "Nectar", "ShareGPT"}


@pytest.mark.parametrize("name", SHAPES)
def test_a_published_shape_has_the_labels_that_were_written(tmp_path, name):
    random.seed(name)
    expected, rows = [], []
    for number in range(ROWS):
        question, first, second = f"Question {number}?", f"first {number}", f"second {number}"
        winner = random.choice(["a", "b"] if name in NO_TIES else ["a", "b", "tie"])
        rows.append(SHAPES[name](question, first, second, winner))
        if winner != "tie":
            expected.append((question, *((first, second) if winner == "a" else (second, first))))
    opened = reader(write(tmp_path / "rows.jsonl", rows))
    opened.probe()
    read = [(pair.prompt[-1]["content"], pair.chosen, pair.rejected) for pair in pairs(opened)]
    assert read == expected
    assert opened.format == name
    found = inspected(reader(opened.source.name))
    assert (found.kept, sum(entry.rows for entry in found.dropped.values())) == (len(expected), ROWS - len(expected))


def test_of_annotators_the_majority_counts_and_disagreement_is_counted(tmp_path):
    votes = {(1, 1, 1): "1", (1, 1, 2): "1", (2, 0, 2): "2", (0, 0, 1): "tie", (0, 1, 2): "none", (1, 2, 0): "none"}
    rows = [
        {"instruction": f"Q {number}", "input": "", "response1": "1", "response2": "2"}
        | {f"annotator{at}": vote for at, vote in enumerate(given, 1)}
        for number, given in enumerate(votes)
    ]
    found = inspected(reader(write(tmp_path / "rows.jsonl", rows)))
    assert found.kept == 3
    assert {reason: entry.rows for reason, entry in found.dropped.items()} == {"no majority": 3}
    assert found.notes == {"annotators disagree: the majority counts": 2}
    assert [pair.chosen for pair in pairs(reader(found.source))] == ["1", "1", "2"]


def test_mt_bench_is_cut_at_the_judged_turn():
    turns = [user("One?"), assistant("{}"), user("Two?"), assistant("{} again")]
    sides = {
        f"conversation_{side}": [{**turn, "content": turn["content"].format(side)} for turn in turns] for side in "ab"
    }
    row = {**sides, "winner": "model_b", "judge": "author_2", "turn": 1}
    pair = parse_row(row, "f:1")
    assert (pair.prompt, pair.chosen, pair.rejected) == ((user("One?"),), "b", "a")
    with pytest.raises(LeftOut) as caught:
        parse_row({**row, "turn": 2}, "f:1")
    assert caught.value.reason == "conversations part before the last answer"


def test_rows_of_one_prompt_become_pairs_together(tmp_path):
    rows = [
        {"prompt": prompt, "response": f"{prompt} {score} {number}", "helpfulness": score, "verbosity": 2}
        for prompt, scores in (("p", (1, 4, 3)), ("q", (2,)), ("r", (3, 3)), ("s", (0, 4)))
        for number, score in enumerate(scores)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    assert [(pair.chosen, pair.rejected, pair.origin) for pair in pairs(reader(path))] == [
        ("p 4 1", "p 1 0", f"{path}:1"),
        ("s 4 1", "s 0 0", f"{path}:7"),
    ]
    found = inspected(reader(path))
    assert {reason: entry.rows for reason, entry in found.dropped.items()} == {
        "joined to an earlier row with its prompt": 4,
        "a single answer": 1,
        "tie": 1,
    }
    assert found.unused == {"verbosity": 8}
    every = inspected(reader(path, pairing="all"))
    assert (every.rows_in, every.further, every.kept) == (8, 2, 4)
    assert len(pairs(reader(path, pairing="all", min_gap=2))) == 3


def test_answer_lists_give_a_pair_for_each_style(tmp_path):
    row = {"prompt": "Q", "chosen": ["a", "b", "c"], "rejected": ["x", "y", "c"], "domain": "chat"}
    path = write(tmp_path / "rows.jsonl", [row, {**row, "chosen": ["a"], "rejected": ["x", "y"]}])
    assert [(pair.chosen, pair.rejected, pair.origin) for pair in pairs(reader(path))] == [
        ("a", "x", f"{path}:1"),
        ("b", "y", f"{path}:1.2"),
        ("a", "x", f"{path}:2"),
        ("a", "y", f"{path}:2.2"),
    ]
    found = inspected(reader(path))
    assert (found.rows_in, found.further, found.kept) == (2, 3, 4)
    assert {reason: entry.rows for reason, entry in found.dropped.items()} == {"chosen equals rejected": 1}


# --- columns that a person names -------------------------------------------------------------------------------------


def labelled(values, **more) -> list[dict[str, Any]]:
    return [
        {"ask": f"Q {number}", "left": f"l{number}", "right": f"r{number}", "gold": value, **more}
        for number, value in enumerate(values)
    ]


AB = {"prompt": "ask", "label": "gold", "answer_a": "left", "answer_b": "right"}


@pytest.mark.parametrize(
    ("values", "more", "chosen"),
    [
        ([1, 2, 2], {}, "lrr"),
        (["1", 2.0, "2"], {}, "lrr"),
        (["A", "b", "tie"], {}, "lr"),
        (["left", "right", "both"], {}, "lr"),
        (["model_b", "model_a", "tie (bothbad)"], {}, "rl"),
        ([0, 1, 1], {"label_a": "0"}, "lrr"),
        ([0, 1, 1], {"label_a": "1"}, "rll"),
        ([True, False, True], {"label_b": "True"}, "rlr"),
        ([0, 1, 2], {"label_a": "1", "label_b": "2"}, "lr"),
        ([0, 1, 2], {"label_a": "0", "label_b": "1"}, "lr"),
        ([-1, 1, 0], {"label_a": "-1", "label_b": "1"}, "lr"),
        ([[1, 1, 2], [2, 2, 2]], {}, "lr"),
    ],
)
def test_a_labels_values_mean_what_they_name_or_what_a_person_says(tmp_path, values, more, chosen):
    opened = reader(write(tmp_path / "rows.jsonl", labelled(values)), columns={**AB, **more})
    assert "".join(pair.chosen[0] for pair in pairs(opened)) == chosen
    assert "left where the label is" in opened.better


@pytest.mark.parametrize("values", [[0, 1], [True, False], [0, 1, 2], [-2, 1], ["x", "y"], [1, 1], [None]])
def test_values_that_do_not_say_it_are_not_guessed(tmp_path, values):
    path = write(tmp_path / "rows.jsonl", labelled(values))
    with pytest.raises(BadInput, match=r"--label gold: has .*say which value means left: --label-a VALUE"):
        reader(path, columns=AB).probe()


def test_several_columns_of_annotators_are_votes(tmp_path):
    rows = [
        {"ask": f"Q {number}", "left": "l", "right": "r", **{f"by{at}": vote for at, vote in enumerate(votes)}}
        for number, votes in enumerate([("a", "a", "b"), ("b", "b", "b"), ("a", "b", None)])
    ]
    opened = reader(write(tmp_path / "rows.jsonl", rows), columns={**AB, "label": "by0,by1,by2"})
    found = inspected(opened)
    assert (found.kept, found.notes) == (2, {"annotators disagree: the majority counts": 1})
    assert {reason: entry.rows for reason, entry in found.dropped.items()} == {"no majority": 1}


def test_scores_and_rated_lists_can_be_named(tmp_path):
    scored = [{"q": f"Q {n}", "one": "1", "two": "2", "s1": n, "s2": "3.5"} for n in range(8)]
    columns = {"prompt": "q", "answer_a": "one", "answer_b": "two", "score_a": "s1", "score_b": "s2"}
    path = write(tmp_path / "scored.jsonl", scored)
    assert "".join(pair.chosen for pair in pairs(reader(path, columns=columns))) == "22221111"
    assert len(pairs(reader(path, columns=columns, min_gap=2))) == 4
    rated = [{"q": "Q", "all": ["x", "y", "z"], "stars": [3, 5, 1]}]
    path = write(tmp_path / "rated.jsonl", rated)
    (pair,) = pairs(reader(path, columns={"prompt": "q", "answers": "all", "scores": "stars"}))
    assert (pair.chosen, pair.rejected) == ("y", "z")
    objects = [{"q": "Q", "all": [{"text": "x", "stars": 3}, {"text": "y", "stars": 5}]}]
    path = write(tmp_path / "objects.jsonl", objects)
    (pair,) = pairs(reader(path, columns={"prompt": "q", "answers": "all", "scores": "stars"}))
    assert pair.chosen == "y"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "inputs", "chosen": "left", "rejected": "right"}, "there is no column inputs; the rows have ask"),
        (
            {"prompt": "ask", "chosen": "left", "rejected": "right"},
            r"column gold \(values 1, 2\) may say which answer is better.*--label gold --answer-a left --answer-b r",
        ),
        ({"prompt": "ask", "system": "left"}, "chosen and rejected are not named; give --column prompt=NAME"),
        ({"label": "gold", "answer_a": "left", "answer_b": "right"}, "name the column of the prompt"),
        ({"prompt": "ask", "label": "gold", "answer_a": "left"}, "--answer-b: name the columns of both answers"),
        ({"prompt": "ask", "answer_a": "left", "answer_b": "right"}, "name what says which answer is better"),
        ({**AB, "label_a": "7"}, r"no row has the value 7; it has 1 \(1 row\), 2 \(1 row\)"),
        ({"prompt": "ask", "answers": "left"}, "name the column of the scores too"),
    ],
)
def test_a_mapping_that_cannot_be_meant_is_refused(tmp_path, columns, message):
    path = write(tmp_path / "rows.jsonl", labelled([1, 2]))
    with pytest.raises(BadInput, match=message):
        reader(path, columns=columns).probe()


def test_named_columns_are_not_ok_before_somebody_says_so(tmp_path):
    path = write(tmp_path / "rows.jsonl", labelled([1, 2] * 60))
    assert inspected(reader(path, columns=AB)).verdict == "not confirmed"
    assert inspected(reader(path, columns=AB, confirmed=True)).verdict == "ok"
    pair_columns = {"prompt": "ask", "chosen": "left", "rejected": "right"}
    assert inspected(reader(path, columns=pair_columns, confirmed=True)).better == "left, as --column says"


@pytest.mark.parametrize(("answer", "code"), [(b"y\n", 0), (b"n\n", 2)])
def test_a_person_at_a_terminal_is_asked(tmp_path, answer, code):
    path = write(tmp_path / "rows.jsonl", labelled([1, 2]))
    flags = [part for name, column in AB.items() for part in ("--column", f"{name}={column}")]
    terminal, end = pytest.importorskip("pty").openpty()
    whole = [sys.executable, "-m", "pairtune", "data", "inspect", path, *flags]
    asked = subprocess.Popen(whole, stdin=end, stdout=end, stderr=end)
    os.close(end)
    said, answered = b"", False
    with suppress(OSError):  # how the end of a terminal reads
        while block := os.read(terminal, 4096):
            said += block
            if b"[y/N]" in said and not answered:
                answered = os.write(terminal, answer) > 0
    os.close(terminal)
    assert asked.wait(60) == code, said
    assert b"Is this the better answer: left where the label is 1" in said


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "pairtune", "data", *arguments]
    return subprocess.run(whole, capture_output=True, text=True, check=False, timeout=120)


def test_the_short_flags_stand_for_columns(tmp_path):
    path = write(tmp_path / "rows.jsonl", labelled([1, 2]))
    flags = ["--label", "gold", "--answer-a=left", "--answer-b", "right", "--column", "prompt=ask"]
    done = command("convert", path, str(tmp_path / "out.jsonl"), *flags)
    assert done.returncode == 0, done.stderr
    assert "the better answer: left where the label is 1, right where the label is 2" in done.stderr
    chosen = [json.loads(line)["chosen"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [turns[0]["content"] for turns in chosen] == ["l0", "r1"]
    done = command("convert", path, str(tmp_path / "more.jsonl"), "--label")
    assert (done.returncode, done.stderr) == (2, "error: --label: requires the name of a column\n")


# --- what is in no known format --------------------------------------------------------------------------------------


def test_an_unknown_format_is_refused_with_the_nearest_and_a_command(tmp_path):
    rows = [{"inputs": "Q", "answer_x": "x", "output_a": "l", "output_b": "r", "preference": 0}] * 3
    path = write(tmp_path / "rows.jsonl", rows)
    done = command("inspect", path)
    assert done.returncode == 2
    assert "row 1 is in no known format; it has inputs, answer_x, output_a" in done.stderr
    flags = "--column prompt=inputs --label preference --answer-a output_a --answer-b output_b"
    assert f"pairtune data inspect {path} {flags}" in done.stderr
    assert "AlpacaFarm (instruction, output_1, output_2, preference)" in done.stderr
    heavy = "print(*{'torch', 'transformers', 'datasets'} & sys.modules.keys(), sep=',')"
    code = f"import sys; from pairtune.cli import app\ntry:\n    app(sys.argv[1:])\nexcept Exception:\n    {heavy}"
    refused = subprocess.run(
        [sys.executable, "-c", code, "data", "inspect", path], capture_output=True, text=True, check=True, timeout=120
    )
    assert refused.stdout == "\n", "nothing heavy is imported first"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "completion": "A", "label": True},
        {"messages": [user("Q"), assistant("A")], "label": False},
        {"instruction": "Q", "input": "", "output": "A", "kto_tag": True},
    ],
)
def test_one_answer_with_a_thumb_is_called_what_it_is(row):
    with pytest.raises(BadRow, match="one answer with a label") as caught:
        parse_row(row, "f:1")
    assert caught.value.reason == "not a pair"
    (pair,) = RowParser(Reading(wanted="single answers")).parse(row, "f:1")
    assert (pair.chosen or pair.rejected, bool(pair.chosen)) == ("A", row.get("label", row.get("kto_tag")))


def test_a_pointer_of_git_lfs_is_called_one(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123\n")
    with pytest.raises(BadInput, match=r"train\.jsonl: is a Git LFS pointer, not the data; run `git lfs pull`"):
        reader(str(path)).probe()


# --- fields that are not text ----------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}


def test_unused_fields_are_counted_once_and_empty_ones_are_not(tmp_path):
    rows = [
        {
            "prompt": f"Q {n}",
            "chosen": "a",
            "rejected": "b",
            "id": n,
            "source": "x" * (n % 2),
            "tools": [],
            "images": [],
        }
        for n in range(4)
    ]
    found = inspected(reader(write(tmp_path / "rows.jsonl", rows)))
    assert found.unused == {"id": 4, "source": 2}
    assert any(each.message == "fields that are not used: id (4 rows), source (2 rows)" for each in found.findings)


def test_a_system_prompt_is_a_system_message():
    pair = parse_row({"prompt": "Q", "chosen": "a", "rejected": "b", "system_prompt": "Be brief."}, "f:1")
    assert pair.prompt == ({"role": "system", "content": "Be brief."}, user("Q"))


@pytest.mark.parametrize("field", ["images", "image"])
def test_images_are_refused_with_the_reason(field):
    with pytest.raises(BadRow, match="has images, and only text can be trained on"):
        parse_row({"prompt": "Q", "chosen": "a", "rejected": "b", field: ["a.png"]}, "f:1")


CALLS = [
    user("Rain in Rome?"),
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}]},
    {"role": "tool", "name": "weather", "content": "dry"},
]
# Writes tools, calls, results and thinking, as Qwen's templates do.
ROOM = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tool_row(**more) -> dict[str, Any]:
    thoughtful = {**assistant("It is dry."), "thinking": "The tool said so."}
    return {"prompt": CALLS, "chosen": [thoughtful], "rejected": [assistant("Yes.")], **more}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_and_thinking_go_through_a_template_with_room_for_them(tmp_path, tools):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ROOM
    found = inspect_source(reader(write(tmp_path / "rows.jsonl", [tool_row(tools=tools)] * 2)), tokenizer, 4096)
    assert found.kept == 2
    assert '"name": "weather"' in found.example.prompt
    assert "dry<|im_end|>" in found.example.prompt
    assert "<think>The tool said so.</think>It is dry." in found.example.chosen
    assert not found.template_warnings


def test_what_a_template_has_no_room_for_is_counted(tmp_path):
    path = write(tmp_path / "rows.jsonl", [tool_row(tools=[TOOL])] * 3)
    plain = byte_tokenizer()
    plain.chat_template = ROOM.replace("{% if tools %}", "{% if false %}").replace("m.reasoning_content", "false")
    found = inspect_source(reader(path), plain, 4096)
    assert found.template_warnings == [
        "3 pairs with tools, for which the model's chat template has no room",
        "3 pairs with thinking, for which the model's chat template has no room",
    ]


def test_converted_rows_keep_tools_and_thinking(tmp_path):
    path = write(tmp_path / "rows.jsonl", [tool_row(tools=[TOOL])])
    convert_source(reader(path), tmp_path / "out.jsonl", "stop")
    (again,) = pairs(reader(str(tmp_path / "out.jsonl")))
    (pair,) = pairs(reader(path))
    assert (again.prompt, again.thinking, again.tools) == (pair.prompt, pair.thinking, pair.tools)
    assert pair.thinking == ("The tool said so.", "")
    with pytest.raises(BadInput, match=r"has tools or thinking, which only \.jsonl can hold"):
        convert_source(reader(path), tmp_path / "out.parquet", "stop")


# --- what looks like something else ----------------------------------------------------------------------------------


def two(q: str, names: tuple[str, str], **more) -> dict[str, Any]:
    return {q: "Q", names[0]: "one", names[1]: "two", **more}


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ([two("input", ("output_1", "output_2"), label=value) for value in (1, 0)], "LLMBar"),
        ([two("input", ("output_1", "output_2"), label=1)], "LLMBar"),
        ([two("instruction", ("output_1", "output_2"), preference=value) for value in (1, 0)], "AlpacaFarm"),
        ([two("instruction", ("response1", "response2"), annotator1=value) for value in (1, 0)], "PandaLM"),
        ([two("prompt", ("response 1", "response 2"), scenario="x", label=value) for value in (1, 2)], "Auto-J"),
        ([two("context", ("response1", "response2"), overall_preference=value) for value in (1, 5)], "HelpSteer3"),
    ],
)
def test_codes_are_those_of_the_format_or_have_to_be_said(tmp_path, rows, name):
    """The same columns with other codes would be read backwards; skipping bad rows would keep only these."""
    opened = reader(write(tmp_path / "rows.jsonl", rows))
    for read in (opened.probe, lambda: pairs(opened)):
        with pytest.raises(BadInput, match=f"look like {name}, but the values of .* are not its codes.*--label"):
            read()


def test_a_limit_does_not_hide_the_other_codes(tmp_path):
    rows = [two("input", ("output_1", "output_2"), label=value) for value in (1, 1, 2)]
    source = SourceConfig(source=write(tmp_path / "rows.jsonl", rows))
    assert len(pairs(SourceReader.open(source, "SRC", Reading(), 2))) == 2


@pytest.mark.parametrize("winner", ["", " ", None, float("nan")])
def test_an_empty_winner_is_no_verdict(winner):
    sides = {f"conversation_{side}": [user("Q"), assistant(side)] for side in "ab"}
    with pytest.raises(LeftOut) as caught:
        parse_row({**sides, "winner": winner}, "f:1")
    assert caught.value.reason == "no verdict"


@pytest.mark.parametrize(
    ("values", "more", "message"),
    [
        (["A", "tie"], {"label_a": "A"}, "say as well which value means answer b"),
        ([0, 1], {"label_a": "1", "label_b": "1"}, "both have 1; a value means one answer"),
        ([1, 2], {"answer_a": "answer_2", "answer_b": "answer_1"}, "may mean either; name them the other way round"),
        (
            [1, 2],
            {"score_a": "ask", "score_b": "ask"},
            "label, score_a, score_b say which answer is better in different",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, values, more, message):
    rows = labelled(values, answer_1="1", answer_2="2")
    with pytest.raises(BadInput, match=message):
        reader(write(tmp_path / "rows.jsonl", rows), columns={**AB, **more}).probe()


def test_a_tie_stays_a_tie_when_one_answer_is_said(tmp_path):
    opened = reader(write(tmp_path / "rows.jsonl", labelled(["x", "y", "tie"])), columns={**AB, "label_a": "x"})
    assert [pair.chosen for pair in pairs(opened)] == ["l0", "r1"]


def test_ranks_are_best_when_lowest(tmp_path):
    rows = [{"q": "Q", "all": [{"text": "best", "rank": 1}, {"text": "worst", "rank": 4}]}]
    path = write(tmp_path / "rows.jsonl", rows)
    opened = reader(path, columns={"prompt": "q", "answers": "all"})
    assert [pair.chosen for pair in pairs(opened)] == ["best"]
    assert "because it is a rank" in opened.better


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        (
            {"prompt": "Q", "answer_1": "a", "answer_2": "b", "score_2": 5, "score_1": 1},
            "--answer-a answer_1 --answer-b answer_2 --score-a score_1 --score-b score_2",
        ),
        ({"query": "Q", "unchosen": "b", "chosen_text": "a"}, "--column prompt=query --column chosen=chosen_text"),
        ({"prompt": "Q", "answers": [{"text": "a", "score": 3}]}, "--column answers=answers"),
        ({"query": "Q", "chosen": "The sea", "rejected": "The sky"}, "--column prompt=query --column chosen=chosen"),
        ({"Prompt": "Q", "chosen": "The sea", "rejected": "The sky"}, "--column prompt=Prompt --column chosen=chosen"),
    ],
)
def test_the_proposed_command_names_what_belongs_together(row, flags):
    with pytest.raises(BadRow) as caught:
        parse_row(row, "f:1")
    assert flags in str(caught.value)


def test_scores_that_contradict_the_names_are_counted(tmp_path):
    rows = [
        {"prompt": f"Q {n}", "chosen": "a", "rejected": "b", "chosen_score": n, "rejected_score": 1} for n in range(3)
    ]
    found = inspected(reader(write(tmp_path / "rows.jsonl", rows)))
    assert (found.kept, found.notes) == (2, {"chosen has a lower score than rejected": 1})
    assert found.dropped["tie"].rows == 1


def test_a_label_beside_chosen_and_rejected_is_warned_of(tmp_path):
    rows = [{"prompt": f"Q {n}", "chosen": "a", "rejected": "b", "betterAnswer": 1} for n in range(3)]
    found = inspected(reader(write(tmp_path / "rows.jsonl", rows)))
    assert any(each.level == "warning" and "betterAnswer is not used" in each.message for each in found.findings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"a": 1}] [{"a": 2}]', "goes on after the ] that ends its rows"),
        ("a.csv", "prompt,chosen,chosen\nQ,a,b\n", "has 2 columns called 'chosen'"),
        ("a.csv", "prompt,a,a,chosen,chosen,chosen\nQ,a,b,c,d,e\n", "has 3 columns called 'chosen'"),
    ],
)
def test_rows_and_columns_do_not_vanish(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=message):
        pairs(reader(str(tmp_path / name)))


def test_numbers_beyond_reason_are_faults_and_no_crash(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": ' + "9" * 5000 + "}\n")
    ((_, fault),) = reader(str(path)).parsed()
    assert isinstance(fault, BadRow)
    scored = {"question": {"full_text": "Q"}, "answer_0": "a", "answer_1": "b", "score_0": 10**400, "score_1": 1}
    with pytest.raises(BadRow, match="should be a number"):
        parse_row(scored, "f:1")
    with pytest.raises(BadRow, match="should be a list"):
        parse_row({"instruction": "Q", "history": 3, "chosen": "a", "rejected": "b"}, "f:1")


def test_turns_in_the_cells_of_a_table_are_turns(tmp_path):
    turns = "[{'role': 'assistant', 'content': 'a'}]", json.dumps([assistant("b")]).replace('"', '""')
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected\nQ,"{}","{}"\n'.format(*turns))
    (pair,) = pairs(reader(str(tmp_path / "a.csv")))
    assert (pair.chosen, pair.rejected) == ("a", "b")
