"""The choice, on planted results."""

from __future__ import annotations

import json

import pytest

from pairtune.config import TrialConfig
from pairtune.engine.records import TrialResult
from pairtune.errors import RunFailed
from pairtune.models.save import saved_fingerprint
from pairtune.runs import RunFolder
from pairtune.sweep.select import install_best, select_best


def planted(beta, *epochs, lr=1e-5, status="finished", best=1):
    rows = [
        {"epoch": number, "eval_loss": loss, "eval_rewards/accuracies": accuracy, "eval_rewards/margins": margin}
        for number, (loss, accuracy, margin) in enumerate(epochs, 1)
    ]
    config = TrialConfig(learning_rate=lr, beta=beta)
    return TrialResult(config, status, "", rows, best_epoch=best if epochs else None)


RESULTS = [
    planted(0.1, (0.60, 0.7, 0.1), (0.50, 0.6, 0.2), best=2),
    planted(0.2, (0.55, 0.8, 0.3)),
    planted(0.3, (0.52, 0.5, 0.9)),
]


@pytest.mark.parametrize(("rule", "winner"), [("eval_loss", 0), ("accuracy", 1), ("margin", 2)])
def test_each_rule_finds_its_winner(rule, winner):
    selection = select_best(RESULTS, rule, 100)
    assert selection["winner"] == RESULTS[winner].trial.name
    assert selection["best_epoch"] == RESULTS[winner].best_epoch
    assert selection["ranking"][0]["name"] == selection["winner"]
    assert f"{selection['value']:.4f}" in selection["why"]
    assert len(selection["ranking"]) == 3


def test_a_failed_trial_cannot_win():
    best_but_failed = planted(0.4, (0.01, 1.0, 9.0), status="failed")
    assert select_best([best_but_failed, *RESULTS], "eval_loss", 100)["winner"] == RESULTS[0].trial.name


def test_level_trials_keep_the_grids_order():
    level = [planted(0.1, (0.5, 0.5, 0.5)), planted(0.1, (0.5, 0.5, 0.5), lr=1e-4)]
    assert select_best(level, "eval_loss", 100)["winner"] == level[0].trial.name


def test_a_ranking_of_betas_by_loss_warns_with_the_ranking_by_accuracy_beside_it():
    (warning,) = select_best(RESULTS, "eval_loss", 100)["warnings"]
    assert "beta is part of the loss" in warning
    assert warning.index("beta-0.2 0.800") < warning.index("beta-0.1 0.600") < warning.index("beta-0.3 0.500")
    assert select_best(RESULTS[:1], "eval_loss", 100)["warnings"] == []
    assert select_best(RESULTS, "accuracy", 100)["warnings"] == []


def test_few_validation_pairs_warn():
    assert "only 5 validation pairs" in select_best(RESULTS[:1], "eval_loss", 5)["warnings"][0]


def test_best_is_the_winners_and_a_changed_file_is_found(tmp_path):
    run = RunFolder(tmp_path / "run")
    winner = RESULTS[0]
    best = run.trial(winner.trial.name).best
    best.mkdir(parents=True)
    (best / "adapter_model.safetensors").write_bytes(b"weights")
    winner.best_fingerprint = saved_fingerprint(best)
    selection = select_best(RESULTS, "eval_loss", 100)
    install_best(run, RESULTS, selection)
    assert (run.best / "adapter_model.safetensors").read_bytes() == b"weights"
    assert json.loads(run.selection.read_text())["best_fingerprint"] == winner.best_fingerprint

    (best / "adapter_model.safetensors").write_bytes(b"another epoch's weights")
    run.selection.unlink()
    with pytest.raises(RunFailed, match="the weights are not those of lr-1e-05-beta-0.1, epoch 2"):
        install_best(run, RESULTS, selection)
    assert not run.selection.exists()
