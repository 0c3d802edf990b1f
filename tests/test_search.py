"""Search: grids, sampled trials and reported results, through Optuna itself."""

from __future__ import annotations

import math

import pytest
from conftest import evaluation

from pairtune.config import RunConfig
from pairtune.run.records import TrialRecord
from pairtune.sweep.groups import lockstep_key
from pairtune.sweep.search import open_search


def config(**changes):
    return RunConfig(data="pairs.jsonl", **{"learning_rate": [1e-5, 1e-3], "beta": [0.1, 0.5], **changes})


def result(trial, losses, status="finished"):
    rows = [evaluation(epoch=epoch, eval_loss=loss) for epoch, loss in enumerate(losses, 1)]
    best = min(rows, key=lambda row: row.eval_loss).epoch if rows else None
    return TrialRecord(trial=trial, status=status, epochs=rows, best_epoch=best)


def everything(search, loss=lambda trial: trial.learning_rate):
    trials = []
    while batch := search.ask():
        trials += batch
        search.tell([result(trial, [loss(trial)]) for trial in batch])
    return trials


def test_a_grid_is_every_combination_betas_outermost():
    trials = everything(open_search(config(lora_rank=[4, 8])))
    assert [(t.beta, t.learning_rate, t.lora_rank) for t in trials] == [
        (beta, rate, rank) for beta in (0.1, 0.5) for rate in (1e-5, 1e-3) for rank in (4, 8)
    ]
    assert len({trial.name for trial in trials}) == 8


def test_random_draws_lie_between_the_values_on_a_logarithmic_scale():
    trials = everything(open_search(config(search="random", trial_count=200, beta=[0.1], loss=["sigmoid", "ipo"])))
    assert len(trials) == 200
    rates = [math.log10(trial.learning_rate) for trial in trials]
    assert all(-5 <= rate <= -3 for rate in rates)
    # The mean of 200 uniform draws from [-5, -3] has a standard deviation of 0.041: five of them.
    assert sum(rates) / 200 == pytest.approx(-4, abs=0.21)
    assert {trial.beta for trial in trials} == {0.1}
    # Binomial(200, 1/2) lies within 65..135 with probability 1 - 4e-7.
    assert 65 <= sum(trial.loss == "ipo" for trial in trials) <= 135


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_the_same_seed_and_results_give_the_same_trials(search):
    """Resumed runs rely on this."""
    asked = config(search=search, trial_count=14)
    one, two = (everything(open_search(asked)) for _ in range(2))
    assert one == two
    assert one != everything(open_search(config(search=search, trial_count=14, seed=1)))


def test_tpe_learns_where_the_good_trials_are():
    """The loss grows with the rate: after its random start, TPE suggests lower rates than random search."""

    def middle(search):
        late = everything(open_search(config(search=search, trial_count=30, beta=[0.1])))[14:]
        return sum(math.log10(trial.learning_rate) for trial in late) / len(late)

    assert middle("tpe") < middle("random") - 0.3


def test_a_space_with_few_points_is_not_searched_twice():
    search = open_search(
        config(search="random", trial_count=50, learning_rate=[1e-5], beta=[0.1], rslora=[True, False])
    )
    assert sorted(trial.rslora for trial in everything(search)) == [False, True]
    assert search.count == 2


def test_pruning_lets_the_better_half_go_on():
    search = open_search(config(prune=True, epochs=4))
    one, two, three, four = search.ask()
    assert not search.hopeless(result(one, [0.5])), "nothing to compare it with"
    assert search.hopeless(result(two, [0.6]))
    assert not search.hopeless(result(three, [0.4]))
    assert search.hopeless(result(four, [0.7]))
    assert not search.hopeless(result(three, [0.4, 0.3]))
    search.tell(
        [
            result(one, [0.5, 0.5]),
            result(two, [0.6], "pruned"),
            result(three, [0.4, 0.3]),
            result(four, [0.7], "failed"),
        ]
    )


def test_nothing_is_hopeless_without_pruning():
    search = open_search(config(epochs=4))
    assert not any(search.hopeless(result(trial, [number])) for number, trial in enumerate(search.ask()))


def test_what_can_share_a_pass_runs_together_and_nothing_else():
    shared = lockstep_key(config().trials()[0])
    assert lockstep_key(config(loss="ipo", epochs=1, label_smoothing=0.1, patience=1).trials()[3]) == shared
    for change in ({"lora_rank": 4}, {"batch_size": 3}, {"seed": 1}, {"lora_alpha": 4}, {"lora_dropout": 0.1}):
        assert lockstep_key(config(**change).trials()[0]) != shared
    full = config(method="full").trials()
    assert lockstep_key(full[0]) != lockstep_key(full[1])
