"""The test split is evaluated once, after the selection, and saved weights reproduce their recorded metrics."""

from __future__ import annotations

import json

import pytest
from conftest import Lines, make_pair

from pairtune.config import TrialConfig
from pairtune.data.table import PairTable
from pairtune.engine import native
from pairtune.engine.saved_weights import SavedWeights, evaluate_weights
from pairtune.engine.summaries import examples_of, mean_metrics
from pairtune.engine.trial import TrialInputs, load_start
from pairtune.errors import RunFailed
from pairtune.models.load import weights_fingerprint
from pairtune.run.examples import Examples
from pairtune.run.folder import Run
from pairtune.run.metrics import EXAMPLE_METRICS
from pairtune.sweep.final import evaluate_test
from pairtune.sweep.regressions import MOST, find_regressions
from pairtune.sweep.select import best_examples, install_best, select_best


@pytest.fixture(params=["lora", "full"])
def finished(request, tiny_base, tmp_path):
    """A run with one trial, before the selection."""
    config = TrialConfig(learning_rate=1e-3, beta=0.1, epochs=2, method=request.param, dtype="float32")
    pairs = [make_pair(number, rejected="No {0}" * (number % 3 + 1)) for number in range(12)]
    train, held, test = (PairTable.of(each, tiny_base.tokenizer) for each in (pairs[:6], pairs[6:9], pairs[9:]))
    start = weights_fingerprint(load_start(config, tiny_base))
    run = Run(tmp_path)
    results = native.run_trials([config], TrialInputs(tiny_base, start, train, held, "eval_loss"), run, Lines())
    return run, results, held, test, tiny_base


def records_of(run, results):
    return {name: examples.metrics for name, examples in best_examples(run, results).items()}


def choose(run, results):
    selection = select_best(results, records_of(run, results), "eval_loss")
    install_best(run, results, selection)
    return selection


def test_saved_weights_give_the_numbers_that_they_were_kept_for(finished, tmp_path):
    run, (result,), held, _, base = finished
    weights = run.paths.trial(result.trial.name).best
    records = evaluate_weights(SavedWeights.of(result.trial, weights), base, held, tmp_path / "held.safetensors")
    for name, value in mean_metrics(examples_of(held, records)).items():
        assert value == pytest.approx(result.best.metric(name), abs=1e-6), name


def test_the_test_pairs_are_looked_at_once_and_after_the_choice(finished):
    run, results, _, test, base = finished
    selection = select_best(results, records_of(run, results), "eval_loss")
    trial = results[0].trial
    with pytest.raises(RunFailed, match="no choice is on record"):
        evaluate_test(trial, selection, test, base, run)
    assert not run.paths.test.exists()
    selection = choose(run, results)
    evaluate_test(trial, selection, test, base, run)
    written = json.loads(run.paths.test.read_text())
    assert (written["pairs"], written["trial"]) == (3, trial.name)
    losses = Examples.read(run.paths.test_examples).metric("loss")
    assert written["metrics"]["eval_loss"] == pytest.approx(losses.mean())
    with pytest.raises(RunFailed, match="have already been used"):
        evaluate_test(trial, selection, test, base, run)


def test_weights_that_were_not_chosen_are_not_tested(finished):
    run, results, _, test, base = finished
    selection = choose(run, results)
    weights = next(run.paths.best.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(RunFailed, match="the weights are not those that were chosen"):
        evaluate_test(results[0].trial, selection, test, base, run)


def test_the_pairs_on_which_tuning_hurt_are_kept_with_their_texts(tiny_base):
    pairs = PairTable.of([make_pair(number) for number in range(20)], tiny_base.tokenizer)
    margins = [0.5, -0.1, 0.0, -2.0, *(-0.5 - number / 100 for number in range(16))]
    records = [{**dict.fromkeys(EXAMPLE_METRICS, 0.0), "rewards/margins": margin} for margin in margins]
    found = find_regressions("test", pairs, examples_of(pairs, records))
    assert (found.count, found.of, len(found.pairs)) == (18, 20, MOST)
    worst = found.pairs[0]
    assert (worst.origin, worst.margin, worst.chosen) == ("test:3", -2.0, "Yes, 3 of them.")
    assert [each.margin for each in found.pairs] == sorted(margins)[:MOST]
