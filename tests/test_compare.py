"""`pairtune compare`: better, worse, or not to be told, on the same footing."""

from __future__ import annotations

import json

import pytest
from conftest import pairtune, small_run, write_pairs

from pairtune.run.folder import Run


@pytest.fixture(scope="module")
def rounds(tiny_model, tmp_path_factory) -> dict[str, Run]:
    """Two rounds that learn the same preference, and one that learned nothing to speak of."""
    folder = tmp_path_factory.mktemp("rounds")
    many = write_pairs(folder / "many.jsonl", range(200, 260))
    more = {"data": [str(many)], "samples": 0, "learning_rate": [1e-2], "epochs": [2]}
    first = small_run(tiny_model, folder, **more, out=folder / "first")
    second = small_run(first.root, folder, **more, out=folder / "second")
    on_top = small_run(first.root, folder, **more, on_top="new", out=folder / "on-top")
    idle = small_run(tiny_model, folder, samples=0, learning_rate=[1e-9], out=folder / "idle")
    return {"first": first, "second": second, "on-top": on_top, "idle": idle}


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("held") / "held.jsonl", range(100, 140))


def compared(one, other, held, *more):
    told = pairtune("compare", one, other, "--data", held, "--json", *more)
    return told.returncode, json.loads(told.stdout) if told.stdout else told.stderr


@pytest.mark.parametrize("better", ["second", "on-top"])
def test_the_next_round_is_better_and_the_last_one_worse(rounds, held, better):
    first, second = rounds["first"].root, rounds[better].root
    code, found = compared(first, second, held)
    assert (code, found["outcome"]) == (0, "better")
    assert found["loss"]["other"] < found["loss"]["one"]
    assert found["loss"]["interval"][1] < 0
    assert (found["pairs"], found["needed"]) == (40, None)
    code, back = compared(second, first, held)
    assert (code, back["outcome"]) == (1, "worse")
    assert back["loss"]["difference"] == pytest.approx(-found["loss"]["difference"])


def test_a_model_cannot_be_told_from_itself_or_from_one_that_learned_nothing(rounds, held, tiny_model):
    code, found = compared(rounds["first"].root, rounds["first"].root, held)
    assert (code, found["outcome"], found["loss"]["difference"]) == (2, "cannot be told", 0)
    code, found = compared(tiny_model, rounds["idle"].root, held)
    assert (code, found["outcome"]) == (2, "cannot be told")
    assert found["loss"]["one"] == pytest.approx(0.6931, abs=1e-4)  # the base against itself: ln 2


def test_both_are_measured_against_the_base_that_they_go_back_to(rounds, held, tiny_model):
    _, found = compared(tiny_model, rounds["second"].root, held, "--beta", "0.5")
    assert (found["base"], found["beta"]) == (str(tiny_model), 0.5)
    assert found["outcome"] == "better"
    told = pairtune("compare", tiny_model, rounds["second"].root, "--data", held)
    assert told.returncode == 0
    assert "second is better than" in told.stdout.replace("\n", " ")


def test_different_bases_are_refused(rounds, held, bos_model):
    code, told = compared(bos_model, rounds["first"].root, held)
    assert code == 2
    assert "log-probs of different base models cannot be compared" in told
    assert "Traceback" not in told
