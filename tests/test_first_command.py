"""The README's first command: the bundled model through the command line, to the end.

In bfloat16, where most faults of kernels show; in float32 where this machine emulates bfloat16, which takes a quarter
of an hour (`make machines` trains in bfloat16 all the same).
"""

from __future__ import annotations

import os

import pytest
import torch
from conftest import pairtune

from pairtune.models.load import measure_dtypes
from pairtune.run.folder import Run

_EMULATED = 2  # times the seconds of a float32 product


@pytest.fixture(scope="module")
def dtype():
    seconds = measure_dtypes(torch.device("cpu"))
    emulated = seconds["bfloat16"] > _EMULATED * seconds["float32"]
    return "float32" if emulated and not os.environ.get("PAIRTUNE_MACHINES") else "bfloat16"


@pytest.fixture(scope="module")
def run(dtype, tmp_path_factory):
    """Two rates side by side on a few bundled pairs."""
    out = tmp_path_factory.mktemp("first") / "run"
    flags = (
        "--model smollm2-135m --data bundled:concise --limit 8 --eval-limit 4 --epochs 1 --lr 3e-5 --lr 1e-5 --beta 0.1"
    )
    done = pairtune("tune", *flags.split(), "--dtype", dtype, "--samples", 0, "--out", out)
    assert done.returncode == 0, done.stderr
    return Run(out)


def test_the_bundled_model_trains_to_the_end(run):
    assert run.paths.complete.is_file()
    assert [trial.status for trial in run.trials] == ["finished", "finished"]
    for trial in run.trials:
        first = trial.log.steps[0]
        assert first.loss == pytest.approx(0.6931471806, abs=1e-6)
        assert first.margin == pytest.approx(0, abs=1e-6)


def test_what_was_chosen_and_how_much_is_rounding_are_on_record(run, dtype):
    choices = run.choices
    assert choices.dtype == dtype
    assert choices.side_by_side >= 2
    assert choices.threads == 1
    assert choices.kernels[dtype].exact
    rounding = run.sweep.rounding
    assert rounding.between_rows == 0
    assert rounding.from_float32 == 0 if dtype == "float32" else 0.01 < rounding.from_float32 < 5


def test_the_run_says_that_rounding_is_as_large_as_what_was_learned(run, dtype):
    """Eight pairs at the assignment's rates move a margin by hundredths of a nat; bfloat16 moves it by tenths."""
    if dtype == "float32":
        pytest.skip("this machine emulates bfloat16, so the run was made in float32; see make machines")
    warnings = " ".join(run.selection.warnings)
    assert "rounding in bfloat16 moves a pair's margin by" in warnings
    assert "--eval-dtype float32" in warnings
    report = run.paths.report_text.read_text()
    assert "Rounding in bfloat16 on this machine changes a pair's log-prob margin, before beta, by" in report
    assert "and by nothing between batch rows" in report
