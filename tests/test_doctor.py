"""`pairtune data inspect` and `data convert`: everything is counted, faults are found, the verdict follows."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from conftest import GEMMA, byte_tokenizer, gemma_tokenizer, shared_file
from datasets import Dataset
from rich.console import Console
from trl.data_utils import is_conversational

from pairtune.config import Reading, SourceConfig
from pairtune.data.convert import convert_source
from pairtune.data.inspect_source import inspect_source
from pairtune.data.inspection import Inspection, LengthSummary, PromptCounts
from pairtune.data.source_reader import SourceReader
from pairtune.errors import BadInput
from pairtune.report.figures import draw_lengths
from pairtune.report.render_inspection import render_inspection


def row(number, **changes):
    return {"prompt": f"Question {number}?", "chosen": f"yes {number}", "rejected": f"not {number}", **changes}


def reading(path, limit=None):
    return SourceReader.open(SourceConfig(source=str(path)), "SRC", Reading(), limit)


def inspect(tmp_path, rows, max_length=1024):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in rows))
    return inspect_source(reading(path), byte_tokenizer(), max_length)


def found(record, words):
    return [finding.level for finding in record.findings if words in finding.message]


def test_clean_pairs_are_ok(tmp_path):
    record = inspect(tmp_path, [row(n) for n in range(100, 250)])
    assert (record.verdict, record.format, record.rows_in, record.kept) == ("ok", "TRL standard", 150, 150)
    assert record.prompts == PromptCounts(different=150, unrelated=150)
    assert (record.duplicates, record.conflicts, record.shortened) == (0, 0, 0)


def test_a_template_that_leaves_bos_out_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row(n)) + "\n" for n in range(100, 250)))
    without = inspect_source(reading(path), gemma_tokenizer(GEMMA.removeprefix("{{ bos_token }}")), 1024)
    assert found(without, "does not write it") == ["warning"]
    assert without.verdict == "ok with warnings"
    assert inspect_source(reading(path), gemma_tokenizer(), 1024).verdict == "ok"


def test_special_tokens_without_a_role_are_found_in_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row(1, chosen="yes<end_of_turn>")) + "\n")
    assert inspect_source(reading(path), gemma_tokenizer(), 1024).special_tokens.pairs == 1


def test_lengths_and_the_length_baseline_by_hand(tmp_path):
    rows = [row(100), row(101, chosen="a" * 30), row(102, rejected="a" * 9), row(103, chosen="not 103!")]
    record = inspect(tmp_path, rows)
    # ChatML around the answer costs an end token and a line break; a byte is a token.
    assert record.lengths["chosen"] == LengthSummary(
        mean=15.0, median=9.5, p95=28.7, max=32, histogram=[0, 3, 1, 0, 0, 0, 0, 0, 0, 0]
    )
    # Longer wins: no (7 to 7 is a tie: half), yes, no, yes.
    assert record.longer_wins.accuracy == 0.625
    assert record.longer_wins.same_length == 1
    # Wilson's interval: (0.625 + 1.96^2/8 -+ 1.96 sqrt(0.625 * 0.375/4 + 1.96^2/64)) / (1 + 1.96^2/4)
    #                   = (1.1052 -+ 0.6751) / 1.9604.
    assert record.longer_wins.interval == (pytest.approx(0.2194, abs=1e-4), pytest.approx(0.9081, abs=1e-4))


def test_duplicates_and_conflicts_are_found(tmp_path):
    swapped = row(1, chosen="not 1", rejected="yes 1")
    record = inspect(tmp_path, [row(1), row(1), swapped, row(2), row(1, prompt="question  1?")])
    assert record.duplicates == 2
    assert record.conflicts == 4
    assert found(record, "contradict") == ["warning"]
    assert found(record, "repeat") == ["warning"]


def test_odd_pairs_are_counted(tmp_path):
    record = inspect(tmp_path, [row(1), row(2, rejected="x" * 99), row(3, chosen="y"), row(4)])
    assert record.odd_pairs == {"one answer is more than 4 times as long": 1, "an answer is almost empty": 1}
    assert found(record, "an answer is almost empty: 1 of 4 (25.0%) pairs") == ["note"]


def test_faults_are_named_by_place_and_counted(tmp_path):
    bad = [row(n, chosen="") for n in range(7)]
    record = inspect(tmp_path, [row(99), *bad, "{broken\n", row(98, prompt=5)])
    assert record.rows_in == 10 == record.kept + sum(entry.rows for entry in record.dropped.values())
    assert record.dropped["empty chosen"].rows == 7
    assert len(record.dropped["empty chosen"].places) == 5
    assert (
        record.dropped["empty chosen"]
        .places[0]
        .endswith("a.jsonl: row 2: field chosen is empty; fill it in or remove the row")
    )
    assert record.dropped["not valid JSON"].stops
    assert record.verdict == "not usable"


def test_what_max_length_does_is_counted_and_lengths_are_those_before(tmp_path):
    old = "\n\nHuman: " + "old " * 30 + "\n\nAssistant: yes\n\nHuman: new?\n\nAssistant:"
    record = inspect(tmp_path, [row(1), row(2, prompt=old), row(3, chosen="y" * 300)], max_length=128)
    assert (record.kept, record.shortened) == (2, 1)
    assert record.dropped["longer than 128 tokens"].rows == 1
    assert record.lengths["prompt and longer answer"].max > 300
    assert found(record, "at --max-length 128") == ["warning"]


def test_length_bias_few_pairs_and_special_tokens_warn(tmp_path):
    record = inspect(tmp_path, [row(n, chosen="a" * (20 + n)) for n in range(30)] + [row(31, prompt="<|im_end|>?")])
    assert found(record, "the longer answer wins 98% of the time") == ["warning"]
    assert found(record, "only 31 pairs") == ["warning"]
    assert found(record, "special tokens as text") == ["warning"]
    assert record.verdict == "ok with warnings"


@pytest.mark.parametrize(("rows", "reason"), [([], "the source is empty"), (["7\n"], "no row is a usable pair")])
def test_nothing_usable_is_said(tmp_path, rows, reason):
    record = inspect(tmp_path, rows)
    assert record.verdict == "not usable"
    assert found(record, reason) == ["error"]
    assert render_inspection(record)


@pytest.mark.parametrize(
    ("name", "format_name", "rows", "dropped"),
    [
        (
            "hh_harmless_2000.jsonl.gz",
            "HH transcripts",
            2000,
            {"prompts differ": 4, "empty chosen": 3, "roles do not alternate": 3},
        ),
        ("rm_static_train.jsonl.gz", "rm-static", 1696, {"empty chosen": 3, "roles do not alternate": 3}),
        ("sharegpt_dpo_en_demo.json", "ShareGPT", 300, {}),
    ],
)
def test_real_files_are_told_and_counted(name, format_name, rows, dropped):
    record = inspect_source(reading(shared_file(name)), byte_tokenizer(), 10**6)
    assert (record.format, record.rows_in) == (format_name, rows)
    assert {reason: entry.rows for reason, entry in record.dropped.items()} == dropped
    assert record.kept == rows - sum(dropped.values())
    assert record.verdict == "ok with warnings"


def test_the_four_mismatched_rows_are_named():
    record = inspect_source(reading(shared_file("hh_harmless_2000.jsonl.gz")), byte_tokenizer(), 10**6)
    places = record.dropped["prompts differ"].places
    assert [int(place.split(": row ")[1].split(":")[0]) for place in places] == [1089, 1471, 1692, 1762]


def test_the_figure_is_a_picture(tmp_path):
    record = inspect(tmp_path, [row(n) for n in range(5)])
    path = draw_lengths(record, tmp_path / "new" / "lengths.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_single_answers_of_one_kind_have_a_figure_too(tmp_path):
    rows = [{"prompt": f"Question {n}?", "completion": f"yes {n}", "label": True} for n in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    source = SourceConfig(source=str(tmp_path / "a.jsonl"))
    reader = SourceReader.open(source, "SRC", Reading(wanted="single answers"), None)
    record = inspect_source(reader, byte_tokenizer(), 1024)
    assert record.single == (5, 0)
    assert draw_lengths(record, tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    console = Console(file=io.StringIO(), width=100)
    console.print(render_inspection(record))
    assert "5 rows = 5 answers + 0 dropped" in console.file.getvalue()


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pairtune", "data", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_inspect_prints_verdict_example_and_figure(tmp_path, tiny_model):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row(n)) + "\n" for n in range(3)) + "{}\n")
    done = run("inspect", path, "--model", tiny_model, "--figures", tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    for part in (
        "TRL standard",
        "4 rows = 3 pairs + 1 dropped",
        "row 4",
        "<|im_start|>user",
        "verdict: ok with warnings",
    ):
        assert part in done.stdout
    assert (tmp_path / "figures" / "lengths.png").is_file()
    record = Inspection.model_validate_json(run("inspect", path, "--model", tiny_model, "--limit", 2, "--json").stdout)
    assert (record.rows_in, record.example.chosen) == (2, "yes 0<|im_end|>\n")


def test_inspect_of_what_cannot_be_used_exits_with_2(tmp_path, tiny_model):
    (tmp_path / "empty.jsonl").write_text("")
    done = run("inspect", tmp_path / "empty.jsonl", "--model", tiny_model)
    assert (done.returncode, "verdict: not usable" in done.stdout, done.stderr) == (2, True, "")
    for arguments, message in (
        ([tmp_path / "missing.jsonl"], "missing.jsonl: no such file or folder"),
        (
            [tmp_path / "empty.jsonl", "--column", "answer=x"],
            "--column answer=x: should be PART=NAME, where PART is prompt",
        ),
        ([tmp_path / "empty.jsonl", "--model", "missing.gguf"], "--model missing.gguf: no such file"),
    ):
        done = run("inspect", *arguments)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
        assert message in done.stderr


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_convert_writes_what_trl_reads_and_pairtune_reads_back(tmp_path, name):
    source = tmp_path / "a.csv"
    source.write_text("question,good,bad\nWhy?,because,no\nWho?,,no\nHow?,so,no\n")
    out = tmp_path / name
    columns = [f"--column={part}" for part in ("prompt=question", "chosen=good", "rejected=bad")]
    done = run("convert", source, out, *columns, "--on-bad-row", "skip")
    assert (done.returncode, done.stdout) == (0, f"{out}: 2 pairs from 3 rows, 1 empty chosen\n")
    rows = pq.read_table(out).to_pylist() if name.endswith("parquet") else list(map(json.loads, out.open()))
    assert rows[1] == {
        "prompt": [{"role": "user", "content": "How?"}],
        "chosen": [{"role": "assistant", "content": "so"}],
        "rejected": [{"role": "assistant", "content": "no"}],
        "origin": f"{source}:3",
    }
    assert is_conversational(Dataset.from_list(rows)[0])
    record = inspect_source(reading(out), byte_tokenizer(), 100)
    assert (record.format, record.kept) == ("TRL conversational", 2)


def test_convert_writes_the_whole_file_or_none(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps(row(1)) + "\n{broken\n")
    before = set(tmp_path.iterdir())
    for out, message in (
        ("out.jsonl", "a.jsonl: row 2: is not valid JSON"),
        ("out.txt", "should end in .jsonl or .parquet"),
        ("a.jsonl", "already exists"),
        ("no/out.jsonl", "there is no folder"),
    ):
        with pytest.raises(BadInput, match=message):
            convert_source(reading(source), tmp_path / out, "stop")
        assert set(tmp_path.iterdir()) == before
