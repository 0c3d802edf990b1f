"""The README's first command: the bundled model, in bfloat16, through the command line, to the end."""

from __future__ import annotations

import pytest
from conftest import pairtune

from pairtune.run.folder import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two rates side by side on a few bundled pairs."""
    out = tmp_path_factory.mktemp("first") / "run"
    flags = (
        "--model smollm2-135m --data bundled:concise --limit 8 --eval-limit 4 --epochs 1 --lr 3e-5 --lr 1e-5 --beta 0.1"
    )
    done = pairtune("tune", *flags.split(), "--dtype", "bfloat16", "--samples", 0, "--out", out)
    assert done.returncode == 0, done.stderr
    return Run(out)


def test_the_bundled_model_trains_to_the_end(run):
    assert run.paths.complete.is_file()
    assert [trial.status for trial in run.trials] == ["finished", "finished"]
    for trial in run.trials:
        first = trial.log.steps[0]
        assert first.loss == pytest.approx(0.6931471806, abs=1e-6)
        assert first.margin == pytest.approx(0, abs=1e-6)


def test_what_was_chosen_and_how_much_is_rounding_are_on_record(run):
    choices = run.choices
    assert choices.dtype == "bfloat16"
    assert choices.side_by_side >= 2
    assert choices.threads == 1
    assert choices.kernels["bfloat16"].exact
    rounding = run.sweep.rounding
    assert rounding.between_rows == 0
    assert 0.01 < rounding.from_float32 < 5


def test_the_run_says_that_rounding_is_as_large_as_what_was_learned(run):
    """Eight pairs at the assignment's rates move a margin by hundredths of a nat; bfloat16 moves it by tenths."""
    warnings = " ".join(run.selection.warnings)
    assert "rounding in bfloat16 moves a pair's margin by" in warnings
    assert "--eval-dtype float32" in warnings
    report = run.paths.report_text.read_text()
    assert "Rounding in bfloat16 on this machine changes a pair's log-prob margin, before beta, by" in report
    assert "and by nothing between batch rows" in report
