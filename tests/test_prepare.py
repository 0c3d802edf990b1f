"""A run's data: limits, splits, mixes, lengths, the cache, and row counts that add up."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from conftest import byte_tokenizer, shared_file
from hypothesis import given
from hypothesis import strategies as st

from pairtune.config import RunConfig
from pairtune.data import prepare
from pairtune.data.preference import RowCount
from pairtune.data.prepare import prepare_data
from pairtune.data.splits import prompt_key
from pairtune.errors import BadInput
from pairtune.files import user_cache

TOKENIZER = byte_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(number, **changes):
    return {"prompt": f"Question {number}?", "chosen": f"yes {number}", "rejected": "no", **changes}


def prepared(**settings):
    return prepare_data(RunConfig(**settings), TOKENIZER)


def balanced(record):
    return all(
        source.rows_in + source.further == source.kept + sum(source.dropped.values()) for source in record.sources
    )


def keys(pairs):
    return {prompt_key(pair.prompt) for pair in pairs}


def test_limit_and_sanity_check_read_that_many_rows(tmp_path):
    train, held = write(tmp_path / "t.jsonl", map(row, range(20))), write(tmp_path / "e.jsonl", map(row, range(50, 70)))
    for settings, expected in (({"limit": 7}, 7), ({"sanity_check": True}, 5), ({}, 20)):
        data = prepared(data=train, eval_data=held, **settings)
        assert (len(data.train), len(data.validation), len(data.test)) == (expected, expected, 0)


def test_the_sanity_check_takes_pairs_with_different_prompts(tmp_path):
    """The first rows may be many answers to one question, of which no split could be held out."""
    rows = [row(0, chosen=f"yes {number}") for number in range(30)] + [row(number) for number in range(1, 20)]
    data = prepared(data=write(tmp_path / "t.jsonl", rows), sanity_check=True)
    assert (len(data.train), len(data.validation), len(data.test)) == (3, 1, 1)
    assert data.record.sources[0].dropped == {"related to an earlier prompt": 29}
    assert balanced(data.record)


def test_without_evaluation_data_prompts_are_held_out_with_all_their_pairs(tmp_path):
    rows = [row(number // 2, chosen=f"yes {number}") for number in range(60)]
    data = prepared(data=write(tmp_path / "t.jsonl", rows))
    assert (len(data.train), len(data.validation), len(data.test)) == (48, 6, 6)
    assert len(keys(data.train)) + len(keys(data.validation)) + len(keys(data.test)) == 30
    assert [(source.split, source.rows_in) for source in data.record.sources] == [
        ("train", 48),
        ("validation", 6),
        ("test", 6),
    ]
    assert len(prepared(data=str(tmp_path / "t.jsonl"), test_share=0).test) == 0


def test_a_given_test_set_stays_apart_from_what_is_drawn(tmp_path):
    train, test = write(tmp_path / "t.jsonl", map(row, range(30))), write(tmp_path / "x.jsonl", map(row, range(25, 35)))
    data = prepared(data=train, test_data=test)
    assert (len(data.train), len(data.validation), len(data.test)) == (27, 3, 5)
    assert data.record.sources[-1].dropped == {"prompt is in another split": 5}


def test_a_validation_prompt_that_is_trained_on_is_dropped_and_counted(tmp_path):
    train = write(tmp_path / "t.jsonl", map(row, range(5)))
    held = write(tmp_path / "e.jsonl", [row(9), row(2, prompt="  question   2? ")])
    assert prepared(data=train, eval_data=held).record.sources[1].model_dump() == {
        "source": held,
        "split": "validation",
        "rows_in": 2,
        "further": 0,
        "kept": 1,
        "dropped": {"prompt is in another split": 1},
        "shortened": 0,
    }


def test_pairs_over_the_length_are_dropped_and_shortened_prompts_are_counted(tmp_path):
    told = [
        {"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(["old" * 30, "yes", "new?"])
    ]
    answers = [{"role": "assistant", "content": text} for text in ("yes", "no")]
    turns = {"prompt": told, "chosen": answers[0:1], "rejected": answers[1:2]}
    plain = {"prompt": told[2:], "chosen": answers[0:1], "rejected": answers[1:2]}
    long = {**plain, "rejected": [{"role": "assistant", "content": "n" * 200}]}
    held = [{**plain, "prompt": [{"role": "user", "content": f"And {n}?"}]} for n in range(2)]
    data = prepared(
        data=write(tmp_path / "t.jsonl", [turns, long, plain]),
        eval_data=write(tmp_path / "e.jsonl", held),
        max_length=128,
    )
    assert [pair.prompt for pair in data.train] == [(told[2],)] * 2
    assert data.record.sources[0].dropped == {"longer than 128 tokens": 1}
    assert data.record.sources[0].shortened == 1


def test_a_bad_row_stops_with_file_row_and_field_or_is_skipped_and_counted(tmp_path):
    bad = row(1)
    del bad["chosen"]
    train = write(tmp_path / "t.jsonl", [row(0), bad, row(2, chosen=" "), row(3), row(4)])
    with (tmp_path / "t.jsonl").open("a") as file:
        file.write("{broken\n")
    held = write(tmp_path / "e.jsonl", [row(9)])
    with pytest.raises(BadInput, match=r"t\.jsonl: row 2: field chosen is missing.*--on-bad-row skip"):
        prepared(data=train, eval_data=held)
    data = prepared(data=train, eval_data=held, on_bad_row="skip")
    assert data.record.sources[0].model_dump() == {
        "source": train,
        "split": "train",
        "rows_in": 6,
        "further": 0,
        "kept": 3,
        "dropped": {"no chosen": 1, "empty chosen": 1, "not valid JSON": 1},
        "shortened": 0,
    }


def test_ties_are_counted_and_are_no_reason_to_stop(tmp_path):
    turns = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "a"}] for n in range(4)]
    rows = [
        {
            "conversation_a": talk,
            "conversation_b": [talk[0], {"role": "assistant", "content": "b"}],
            "winner": "tie" if n == 1 else "model_b",
        }
        for n, talk in enumerate(turns)
    ]
    record = prepared(data=write(tmp_path / "t.jsonl", rows), test_share=0).record
    assert record.sources[0].dropped == {"tie": 1}
    assert record.formats == {str(tmp_path / "t.jsonl"): "arena"}
    assert balanced(record)


def test_weights_set_the_mix_and_what_they_leave_out_is_counted(tmp_path):
    sources = [
        {"source": write(tmp_path / f"{name}.jsonl", [row(f"{name}{n}") for n in range(20)]), "weight": weight}
        for name, weight in (("a", 3), ("b", 1))
    ]
    held = write(tmp_path / "e.jsonl", [row(9)])
    data = prepared(data=sources, eval_data=held)
    names = Counter(pair.origin.rsplit("/", 1)[1][0] for pair in data.train)
    assert names == {"a": 20, "b": 7}
    assert data.record.sources[1].dropped == {"left out by weight": 13}
    assert balanced(data.record)
    assert len(prepared(data=[source["source"] for source in sources], eval_data=held).train) == 40


def test_columns_of_a_source_go_before_those_of_the_run(tmp_path):
    other = [{"q": f"Ask {n}", "good": "yes", "bad": "no"} for n in range(3)]
    mine = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    held = write(tmp_path / "e.jsonl", [row(9)])
    data = prepared(data={"source": write(tmp_path / "t.jsonl", other), "columns": mine}, eval_data=held)
    assert [pair.chosen for pair in data.train] == ["yes"] * 3
    with pytest.raises(BadInput, match="q, good, bad"):
        prepared(data=str(tmp_path / "t.jsonl"), eval_data=held)


def test_nothing_left_is_said_with_the_reasons(tmp_path):
    train = write(tmp_path / "t.jsonl", [row(0)])
    with pytest.raises(BadInput, match=r"no pair is left for validation \(1 prompt is in another split\)"):
        prepared(data=train, eval_data=train)
    with pytest.raises(BadInput, match=r"t\.jsonl: no pair is left for validation"):
        prepared(data=train)
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(BadInput, match=r"empty\.jsonl: no pair is left for train \(it is empty\)"):
        prepared(data=empty, eval_data=train)


def test_prompts_under_one_long_system_message_are_split_by_their_questions(tmp_path):
    rules = " ".join(f"Rule {number}: never speak of topic {number * 7} before noon." for number in range(60))
    rows = [row(number, system=rules) for number in range(30)]
    train, held = write(tmp_path / "t.jsonl", rows[:20]), write(tmp_path / "e.jsonl", rows[20:])
    data = prepared(data=train, max_length=8192)
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 2, 2)
    given = prepared(data=train, eval_data=held, max_length=8192)
    assert (len(given.train), len(given.validation)) == (20, 10)


def test_one_question_under_every_document_cannot_be_split_and_the_reason_is_said(tmp_path):
    rows = [row(0, system=f"Document {number}: {'word ' * number}") for number in range(20)]
    with pytest.raises(
        BadInput, match=r"no pair is left for validation \(apart from system messages, all prompts are related\)"
    ):
        prepared(data=write(tmp_path / "t.jsonl", rows))


def test_the_bundled_splits_share_no_conversation():
    data = prepared(data="bundled:concise")
    assert (len(data.train), len(data.validation), len(data.test)) == (253, 111, 74)
    parts = [keys(pairs) for pairs in (data.train, data.validation, data.test)]
    assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert not any(source.dropped for source in data.record.sources)


def test_books_that_do_not_balance_are_a_fault():
    count = RowCount("s", "train", rows_in=3, kept=1, dropped=Counter({"empty": 1}))
    with pytest.raises(AssertionError, match="3 rows in and 0 further pairs, 1 kept"):
        count.account()


def test_a_second_preparation_is_read_from_the_cache_until_anything_changes(tmp_path, monkeypatch):
    settings = {"data": write(tmp_path / "t.jsonl", map(row, range(12))), "eval_data": write(tmp_path / "e", [])}
    settings["eval_data"] = write(tmp_path / "e.jsonl", [row(20)])
    first, second = prepared(**settings), prepared(**settings)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert second.record == first.record
    assert second.train.ids() == first.train.ids()
    for changes in ({"limit": 5}, {"max_length": 100}, {"seed": 1}, {"on_bad_row": "skip"}):
        assert not prepared(**settings, **changes).from_cache
    for changes in ({"learning_rate": [0.1]}, {"epochs": 9}, {"out": tmp_path / "x"}):
        assert prepared(**settings, **changes).from_cache
    write(tmp_path / "t.jsonl", map(row, range(13)))
    assert len(prepared(**settings).train) == 13


def test_a_preparation_that_fails_leaves_no_cache(tmp_path):
    before = set((user_cache() / "data").glob("*"))
    with pytest.raises(BadInput):
        prepared(data=write(tmp_path / "t.jsonl", [row(0), {}]))
    assert set((user_cache() / "data").glob("*")) == before


def test_the_example_shows_prompt_and_answers_with_their_ends(tmp_path):
    train, held = write(tmp_path / "t.jsonl", [row(1)]), write(tmp_path / "e.jsonl", [row(9)])
    assert prepared(data=train, eval_data=held).record.example.model_dump() == {
        "origin": f"{train}:1",
        "prompt": "<|im_start|>user\nQuestion 1?<|im_end|>\n<|im_start|>assistant\n",
        "chosen": "yes 1<|im_end|>\n",
        "rejected": "no<|im_end|>\n",
    }


def test_the_fingerprint_of_a_split_is_of_content_and_order(tmp_path):
    def train_fingerprint(rows, name="t.jsonl"):
        held = write(tmp_path / "e.jsonl", [row(9)])
        return prepared(data=write(tmp_path / name, rows), eval_data=held).record.splits["train"].fingerprint

    first = train_fingerprint([row(1), row(2)])
    assert train_fingerprint([row(1), row(2)], "u.jsonl") == first
    assert train_fingerprint([row(2), row(1)]) != first
    assert train_fingerprint([row(1), row(2, rejected="nay")]) != first


lines = st.lists(
    st.sampled_from(
        [
            *[json.dumps(row(number)) for number in range(6)],
            json.dumps(row(2, chosen="")),
            json.dumps(row(3, rejected="yes 3")),
            json.dumps(row(4, prompt=5)),
            json.dumps(row(5, chosen="y" * 400)),
            json.dumps({"conversation_a": [], "conversation_b": [], "winner": "tie"}),
            json.dumps({"instruction": "a", "chosen": "b", "rejected": "c"}),
            "{}",
            "7",
            "null",
            "{broken",
            '"\\ud800"',
            "",
        ]
    ),
    max_size=14,
)


@given(lines, st.booleans())
def test_rows_in_are_kept_or_dropped_by_reason(tmp_path_factory, rows, own_splits):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "t.jsonl").write_text("\n".join(rows))
    held = {} if own_splits else {"eval_data": write(folder / "e.jsonl", [row(99)])}
    config = RunConfig(data=str(folder / "t.jsonl"), on_bad_row="skip", max_length=100, **held)
    try:
        data = prepare_data(config, TOKENIZER)
    except BadInput as error:
        assert "no pair is left" in str(error)
        return
    assert balanced(data.record)
    counts = [source for source in data.record.sources if source.source == str(folder / "t.jsonl")]
    assert sum(count.rows_in for count in counts) == sum(bool(line) for line in rows)
    kept = sum(count.kept for count in counts)
    assert kept == len(data.train) + (len(data.validation) + len(data.test) if own_splits else 0)


@pytest.mark.parametrize("name", ["rm_static_train.jsonl.gz"])
def test_real_pairs_share_no_conversation_between_given_splits(name):
    data = prepared(
        data=str(shared_file(name)),
        eval_data=str(shared_file("rm_static_test.jsonl.gz")),
        on_bad_row="skip",
        max_length=4096,
    )
    assert balanced(data.record)
    train, held = data.record.sources
    assert (train.rows_in, held.rows_in) == (1696, 300)
    begun = {
        tuple((turn["role"], turn["content"]) for turn in pair.prompt[:end])
        for pair in data.train
        for end in range(1, len(pair.prompt) + 1, 2)
    }
    assert held.dropped["conversation is in another split"] > 0
    assert not begun & {tuple((turn["role"], turn["content"]) for turn in pair.prompt) for pair in data.validation}


def test_the_cache_names_the_format_it_was_written_in(tmp_path, monkeypatch):
    settings = {
        "data": write(tmp_path / "t.jsonl", map(row, range(3))),
        "eval_data": write(tmp_path / "e.jsonl", [row(9)]),
    }
    prepared(**settings)
    monkeypatch.setattr(prepare, "_CACHE_FORMAT", "of another version")
    assert not prepared(**settings).from_cache
