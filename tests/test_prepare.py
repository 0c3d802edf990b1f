"""The data of a run: limits, splits by prompt, lengths, and books that balance."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from conftest import byte_tokenizer, make_pair
from hypothesis import given
from hypothesis import strategies as st

from pairtune.config import RunConfig
from pairtune.data.pairs import RowCount
from pairtune.data.prepare import pairs_fingerprint, prepare_data, prompt_key, split_by_prompt, token_lengths
from pairtune.errors import BadInput

TOKENIZER = byte_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(number, **changes):
    return {"prompt": f"Question {number}?", "chosen": f"yes {number}", "rejected": "no", **changes}


def balanced(data):
    return all(source["rows_in"] == source["kept"] + sum(source["dropped"].values()) for source in data["sources"])


def test_limit_and_sanity_check_read_that_many_rows(tmp_path):
    train, held = write(tmp_path / "t.jsonl", map(row, range(20))), write(tmp_path / "e.jsonl", map(row, range(50, 70)))
    for settings, expected in (({"limit": 7}, 7), ({"sanity_check": True}, 5), ({}, 20)):
        data = prepare_data(RunConfig(data=train, eval_data=held, **settings), TOKENIZER)
        assert (len(data.train), len(data.validation), len(data.test)) == (expected, expected, 0)


def test_without_evaluation_data_a_tenth_of_the_prompts_is_held_out_with_all_their_pairs(tmp_path):
    rows = [row(number // 2, chosen=f"yes {number}") for number in range(60)]
    data = prepare_data(RunConfig(data=write(tmp_path / "t.jsonl", rows)), TOKENIZER)
    assert (len(data.train), len(data.validation)) == (54, 6)
    assert not {prompt_key(pair) for pair in data.train} & {prompt_key(pair) for pair in data.validation}
    assert [source["rows_in"] for source in data.as_dict()["sources"]] == [54, 6]


def test_a_validation_prompt_that_is_trained_on_is_dropped_and_counted(tmp_path):
    train = write(tmp_path / "t.jsonl", map(row, range(5)))
    held = write(tmp_path / "e.jsonl", [row(9), row(2, prompt="  question   2? ")])
    data = prepare_data(RunConfig(data=train, eval_data=held), TOKENIZER).as_dict()
    assert data["sources"][1] == {
        "source": held,
        "split": "validation",
        "rows_in": 2,
        "kept": 1,
        "dropped": {"prompt is in another split": 1},
    }


def test_pairs_over_the_length_are_dropped_and_counted_never_cut(tmp_path):
    train = write(tmp_path / "t.jsonl", [*map(row, range(4)), row(5, rejected="n" * 200)])
    held = write(tmp_path / "e.jsonl", [row(9)])
    data = prepare_data(RunConfig(data=train, eval_data=held, max_length=128), TOKENIZER)
    assert [pair.rejected for pair in data.train] == ["no"] * 4
    assert data.counts[0].dropped == {"longer than 128 tokens": 1}
    assert balanced(data.as_dict())


def test_token_lengths_count_the_whole_conversation():
    pair = make_pair(3, chosen="ab", rejected="abcd")
    rendered = "<|im_start|>user\nAre there 3 apples?<|im_end|>\n<|im_start|>assistant\nab<|im_end|>\n"
    expected = len(TOKENIZER(rendered)["input_ids"])
    assert token_lengths(pair, TOKENIZER) == (expected, expected + 2)


def test_a_bad_row_stops_with_file_row_and_field_or_is_skipped_and_counted(tmp_path):
    bad = row(1)
    del bad["chosen"]
    train = write(tmp_path / "t.jsonl", [row(0), bad, row(2, chosen=" "), row(3), row(4)])
    held = write(tmp_path / "e.jsonl", [row(9)])
    with pytest.raises(BadInput, match=r"t\.jsonl: row 2: field chosen is missing"):
        prepare_data(RunConfig(data=train, eval_data=held), TOKENIZER)
    data = prepare_data(RunConfig(data=train, eval_data=held, on_bad_row="skip"), TOKENIZER)
    assert data.counts[0].as_dict() == {
        "source": train,
        "split": "train",
        "rows_in": 5,
        "kept": 3,
        "dropped": {"no chosen": 1, "empty chosen": 1},
    }


def test_nothing_left_is_said_with_the_reasons(tmp_path):
    train = write(tmp_path / "t.jsonl", [row(0)])
    with pytest.raises(BadInput, match=r"no pair is left for validation \(1 prompt is in another split\)"):
        prepare_data(RunConfig(data=train, eval_data=train), TOKENIZER)
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(BadInput, match=r"empty\.jsonl: no pair is left for train \(it is empty\)"):
        prepare_data(RunConfig(data=empty, eval_data=train), TOKENIZER)


def test_the_bundled_splits_share_no_prompt():
    data = prepare_data(RunConfig(data="bundled:concise"), TOKENIZER)
    keys = [{prompt_key(pair) for pair in pairs} for pairs in (data.train, data.validation, data.test)]
    assert all(keys) and not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    assert not any(source["dropped"] for source in data.as_dict()["sources"])


def test_books_that_do_not_balance_are_a_fault():
    count = RowCount("s", "train", rows_in=3, kept=1, dropped=Counter({"empty": 1}))
    with pytest.raises(AssertionError, match="3 rows in, 1 kept"):
        count.as_dict()


@given(st.lists(st.integers(0, 12), min_size=1, max_size=40), st.integers(0, 5))
def test_a_split_parts_prompts_and_loses_nothing(numbers, seed):
    pairs = [make_pair(number) for number in numbers]
    train, held = split_by_prompt(pairs, 0.25, seed)
    assert held
    assert Counter(pair.origin for pair in [*train, *held]) == Counter(pair.origin for pair in pairs)
    assert not {prompt_key(pair) for pair in train} & {prompt_key(pair) for pair in held}
    assert split_by_prompt(pairs, 0.25, seed) == (train, held)


lines = st.lists(
    st.sampled_from([row(0), row(1), row(2, chosen=""), row(3, rejected="yes 3"), {}, 7, None, row(4, prompt=5)]),
    max_size=12,
)


@given(lines)
def test_rows_in_are_kept_or_dropped_by_reason(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    held = write(folder / "e.jsonl", [row(99)])
    config = RunConfig(data=write(folder / "t.jsonl", rows), eval_data=held, on_bad_row="skip")
    try:
        data = prepare_data(config, TOKENIZER)
    except BadInput:
        assert not any(isinstance(line, dict) and line.get("prompt") in ("Question 0?", "Question 1?") for line in rows)
        return
    assert balanced(data.as_dict())
    assert data.counts[0].rows_in == len(rows)
    assert data.counts[0].kept == len(data.train)


def test_the_fingerprint_is_of_content_and_order():
    pairs = [make_pair(1), make_pair(2)]
    assert pairs_fingerprint(pairs) == pairs_fingerprint([make_pair(1), make_pair(2)])
    assert pairs_fingerprint(pairs) != pairs_fingerprint(pairs[::-1])
    assert pairs_fingerprint(pairs) != pairs_fingerprint([make_pair(1), make_pair(2, rejected="other")])
