"""Edit lists: marks that follow their pairs, and never touch another one."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from conftest import small_run, write_pairs
from hypothesis import given
from hypothesis import strategies as st

from pairtune.config import Reading, SourceConfig
from pairtune.data.edits import pair_hash, row_of
from pairtune.data.preference import LeftOut, PreferencePair
from pairtune.data.source_reader import SourceReader
from pairtune.errors import BadInput


def read(source, wanted="pairs") -> tuple[list, Counter]:
    reader = SourceReader.open(SourceConfig(source=str(source)), "--data", Reading(wanted=wanted), None)
    return [result for _, result in reader.parsed()], reader.parser.notes


def edits_for(source, marks: dict[int, str], name="mine.edits.json"):
    pairs, _ = read(source)
    found = [
        {
            "row": row_of(pairs[at]),
            "pair": pair_hash(pairs[at]),
            "action": action,
            "marked": "2026-01-01T00:00:00+00:00",
        }
        for at, action in marks.items()
    ]
    file = source.parent / name
    file.write_text(json.dumps({"source": str(source), "edits": found}))
    return file


@given(st.dictionaries(st.integers(0, 7), st.sampled_from(["drop", "swap"])))
def test_every_mark_is_applied_to_its_pair_alone(tmp_path_factory, marks):
    source = write_pairs(tmp_path_factory.mktemp("edits") / "pairs.jsonl", range(8))
    before, (after, notes) = read(source)[0], read(edits_for(source, marks))
    assert len(after) == len(before)
    for at, (old, new) in enumerate(zip(before, after, strict=True)):
        action = marks.get(at)
        if action == "drop":
            assert isinstance(new, LeftOut)
        elif action == "swap":
            assert (new.chosen, new.rejected, new.origin) == (old.rejected, old.chosen, old.origin)
        else:
            assert new == old
    assert sum(notes.values()) == list(marks.values()).count("swap")


def test_marks_of_pairs_that_have_changed_are_counted_and_not_applied(tmp_path):
    source = write_pairs(tmp_path / "pairs.jsonl", range(4))
    edits = edits_for(source, {0: "drop", 1: "swap"})
    source.write_text(source.read_text().replace("Yes, 0 of them.", "Yes, none of them."))
    after, notes = read(edits)
    assert all(isinstance(each, PreferencePair) for each in after)
    assert notes == {"edits that match no pair any more": 1, "pairs whose answers were swapped, as marked": 1}


def test_marks_of_pairs_and_of_their_single_answers_hold_for_an_unpaired_loss(tmp_path):
    source = write_pairs(tmp_path / "pairs.jsonl", range(4))
    edits = edits_for(source, {1: "drop"})
    halves, _ = read(source, "single answers")
    listed = json.loads(edits.read_text())
    last = {
        "row": row_of(halves[5]),
        "pair": pair_hash(halves[5]),
        "action": "swap",
        "marked": listed["edits"][0]["marked"],
    }
    edits.write_text(json.dumps(listed | {"edits": [*listed["edits"], last]}))
    results, notes = read(edits, "single answers")
    kept = [each for each in results if isinstance(each, PreferencePair)]
    assert kept[:3] + kept[4:] == halves[:2] + halves[4:5] + halves[6:]
    assert (kept[3].chosen, kept[3].rejected, kept[3].origin) == (halves[5].rejected, "", halves[5].origin)
    assert isinstance(results[2], LeftOut)
    assert notes == {"pairs whose answers were swapped, as marked": 1}


def test_a_run_counts_what_was_marked_and_names_the_list(tiny_model, tmp_path):
    edits = edits_for(write_pairs(tmp_path / "pairs.jsonl", range(8)), {2: "drop", 3: "swap"})
    run = small_run(tiny_model, tmp_path, data=[str(edits)], samples=0)
    (account,) = [each for each in run.data.sources if each.split == "train"]
    assert (account.source, account.rows_in, account.kept) == (str(edits), 8, 7)
    assert account.dropped == {"marked as wrong": 1}
    assert run.data.notes == {str(edits): {"pairs whose answers were swapped, as marked": 1}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not valid JSON"),
        ("[]", "it is not an edit list"),
        ('{"source": "x", "edits": [{"row": "1", "pair": "y", "action": "burn"}]}', "edits.0.action"),
        ('{"source": "missing.jsonl", "edits": []}', "no such file"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(tmp_path, content, message):
    file = tmp_path / "bad.edits.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadInput, match=message):
        SourceReader.open(SourceConfig(source=str(file)), "--data", Reading(), None)
