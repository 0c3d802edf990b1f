"""The selection, on planted results."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import evaluation

from pairtune.config import TrialConfig
from pairtune.errors import RunFailed
from pairtune.files import saved_fingerprint
from pairtune.run.folder import Run
from pairtune.run.metrics import EXAMPLE_METRICS
from pairtune.run.records import TrialRecord
from pairtune.run.schema import to_json
from pairtune.sweep.select import against_base, install_best, select_best


def planted(beta, *epochs, lr=1e-5, status="finished", best=1, **more):
    rows = [
        evaluation(epoch=number, eval_loss=loss, accuracy=accuracy, margin=margin)
        for number, (loss, accuracy, margin) in enumerate(epochs, 1)
    ]
    config = TrialConfig(learning_rate=lr, beta=beta, **more)
    return TrialRecord(trial=config, status=status, epochs=rows, best_epoch=best if epochs else None)


RESULTS = [
    planted(0.1, (0.60, 0.7, 0.1), (0.50, 0.6, 0.2), best=2),
    planted(0.2, (0.55, 0.8, 0.3)),
    planted(0.3, (0.52, 0.5, 0.9)),
]


def noise(pairs, seed=0, **columns):
    """Per-example records: noise, except for the given columns."""
    records = np.random.default_rng(seed).normal(size=(pairs, len(EXAMPLE_METRICS)))
    records[:, EXAMPLE_METRICS.index("rewards/accuracies")] = records[:, 0] > 0
    for name, values in columns.items():
        records[:, EXAMPLE_METRICS.index(name.replace("_", "/"))] = values
    return records


def choose(results, rule="eval_loss", pairs=100, records=None):
    return select_best(results, records or {result.trial.name: noise(pairs) for result in results}, rule)


@pytest.mark.parametrize(("rule", "winner"), [("eval_loss", 0), ("accuracy", 1), ("margin", 2)])
def test_each_rule_finds_its_winner(rule, winner):
    selection = choose(RESULTS, rule)
    assert selection.winner == RESULTS[winner].trial.name
    assert selection.best_epoch == RESULTS[winner].best_epoch
    assert selection.ranking[0].name == selection.winner
    assert f"{selection.value:.4f}" in selection.why
    assert len(selection.ranking) == 3
    json.dumps(to_json(selection), allow_nan=False)


def test_answers_choose_where_they_are_asked_for():
    wins = {
        result.trial.name: scores for result, scores in zip(RESULTS, ([0.5] * 8, [1.0] * 8, [0.0] * 8), strict=True)
    }
    records = {result.trial.name: noise(100) for result in RESULTS}
    selection = select_best(RESULTS, records, "fewer_faults", wins)
    assert (selection.winner, selection.metric, selection.value) == (RESULTS[1].trial.name, "fewer_faults", 1.0)
    assert "highest fewer_faults (1.0000)" in selection.why
    assert "of 3 trials on 8 validation prompts" in selection.why
    assert "fewer_faults on 8 prompts" in selection.verdict
    (warning,) = selection.warnings
    assert "was chosen for having fewer faults" in warning
    level = select_best(RESULTS, records, "fewer_faults", dict.fromkeys(wins, [0.5] * 8))
    assert level.winner == RESULTS[0].trial.name  # the lowest loss of those that are level
    assert "no two trials can be told apart" in level.verdict


@pytest.mark.parametrize("status", ["failed", "pruned"])
def test_a_trial_that_did_not_finish_cannot_win(status):
    better = planted(0.4, (0.01, 1.0, 9.0), status=status)
    assert choose([better, *RESULTS]).winner == RESULTS[0].trial.name


def test_level_trials_keep_the_grids_order():
    level = [planted(0.1, (0.5, 0.5, 0.5)), planted(0.1, (0.5, 0.5, 0.5), lr=1e-4)]
    assert choose(level).winner == level[0].trial.name


@pytest.mark.parametrize(("rule", "what"), [("eval_loss", "losses"), ("margin", "margins")])
def test_a_ranking_of_betas_warns_with_the_ranking_by_accuracy_beside_it(rule, what):
    (warning,) = choose(RESULTS, rule).warnings
    assert f"so {what} of trials that differ in" in warning
    assert warning.index("beta-0.2 0.800") < warning.index("beta-0.1 0.600") < warning.index("beta-0.3 0.500")
    assert choose(RESULTS[:1], rule).warnings == []
    assert choose(RESULTS, "accuracy").warnings == []


def test_few_validation_pairs_warn():
    assert "only 5 validation pairs" in choose(RESULTS[:1], pairs=5).warnings[0]


LEVEL = [planted(0.1, (0.5, 0.5, 0.5), lr=rate) for rate in (1e-5, 1e-4, 1e-3)]


def test_identical_trials_cannot_be_told_apart():
    selection = choose(LEVEL)
    assert not selection.settled
    assert selection.verdict.startswith("no two trials can be told apart by eval_loss on 100 pairs")
    assert "no number of pairs would settle it" in selection.verdict
    assert all(entry.p_corrected == 1 for entry in selection.comparisons)


def test_one_truly_better_trial_is_found():
    hard = np.random.default_rng(9).normal(0.6, 0.3, 200)  # how hard a pair is for every trial
    records = {r.trial.name: noise(200, loss=hard + noise(200, n)[:, 0] / 10) for n, r in enumerate(LEVEL)}
    records[LEVEL[0].trial.name][:, 0] -= 0.05
    selection = choose(LEVEL, records=records)
    assert selection.settled
    assert "differs from every other trial in eval_loss on 200 pairs" in selection.verdict
    for entry in selection.comparisons:
        assert entry.interval[0] < -0.05 < entry.interval[1] < 0
        assert entry.pairs_needed < 200


def test_a_difference_that_more_pairs_would_show_says_how_many():
    shift = np.where(np.arange(60) % 2, 1.1, -0.9)  # mean 0.1, standard deviation 1.008
    records = {r.trial.name: noise(60, loss=0.0) for r in LEVEL}
    for result in LEVEL[1:]:
        records[result.trial.name][:, 0] = shift
    selection = choose(LEVEL, records=records)
    # Three trials make three comparisons: z(1 - 0.05/6) = 2.394, z(0.8) = 0.842; ((3.236) * 1.008 / 0.1)^2 = 1065.
    assert selection.comparisons[0].pairs_needed == pytest.approx(1065, abs=5)
    assert "about 1,06" in selection.verdict
    assert "validation pairs would settle it between the first two" in selection.verdict


def test_trials_of_different_betas_are_compared_by_accuracy():
    right = np.arange(300) % 10 < 7
    records = {r.trial.name: noise(300, n, rewards_accuracies=right) for n, r in enumerate(RESULTS)}
    records[RESULTS[2].trial.name] = noise(300, 5, rewards_accuracies=~right)
    selection = choose(RESULTS, records=records)
    by_name = {entry.name: entry for entry in selection.comparisons}
    assert {entry.metric for entry in by_name.values()} == {"eval_rewards/accuracies"}
    assert by_name[RESULTS[2].trial.name].differs
    assert not by_name[RESULTS[1].trial.name].differs
    assert f"cannot be told apart from {RESULTS[1].trial.name} by eval_rewards/accuracies" in selection.verdict


def test_the_test_against_the_base_wants_margins_above_zero():
    better, worse = noise(100, rewards_margins=noise(100)[:, 0] + 1), noise(100, rewards_margins=noise(100)[:, 0] - 1)
    assert against_base(better).better
    assert not against_base(worse).better
    assert not against_base(noise(100, rewards_margins=np.where(np.arange(100) % 2, 1.0, -1.0))).better


def test_best_is_the_winners_and_a_changed_file_is_found(tmp_path):
    run = Run(tmp_path / "run")
    winner = RESULTS[0]
    best = run.paths.trial(winner.trial.name).best
    best.mkdir(parents=True)
    (best / "adapter_model.safetensors").write_bytes(b"weights")
    winner.best_fingerprint = saved_fingerprint(best)
    selection = choose(RESULTS)
    install_best(run, RESULTS, selection)
    assert (run.paths.best / "adapter_model.safetensors").read_bytes() == b"weights"
    assert json.loads(run.paths.selection.read_text())["best_fingerprint"] == winner.best_fingerprint

    (best / "adapter_model.safetensors").write_bytes(b"another epoch's weights")
    run.paths.selection.unlink()
    with pytest.raises(RunFailed, match="the weights are not those of lr-1e-05-beta-0.1, epoch 2"):
        install_best(run, RESULTS, selection)
    assert not run.paths.selection.exists()


@pytest.mark.parametrize(
    ("name", "values", "loss"),
    [
        ("sft_weight", (0.0, 0.5), "sigmoid"),
        ("label_smoothing", (0.0, 0.2), "sigmoid"),
        ("simpo_gamma", (0.5, 1.5), "simpo"),
        ("discopop_tau", (0.05, 0.3), "discopop"),
    ],
)
def test_losses_of_other_scales_are_not_compared(name, values, loss):
    """One model has different losses under two loss settings, and is still one model."""
    results = [planted(0.1, (value, 0.6, 0.2), loss=loss, varied=(name,), **{name: value}) for value in values]
    records = {result.trial.name: noise(60, loss=noise(60)[:, 0] + number) for number, result in enumerate(results)}
    selection = choose(results, records=records)
    (comparison,) = selection.comparisons
    assert (comparison.metric, comparison.differs) == ("eval_rewards/accuracies", False)
    assert "not on one scale" in selection.warnings[0]
    assert choose(results, "margin", records=records).comparisons[0].metric == "eval_rewards/margins"
