"""Losses by hand: all numbers below were calculated on paper from the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch

from pairtune.engine.losses import LOSSES, LossSettings, PairLogps, pair_loss

LN_2 = math.log(2)

# One pair: the policy moved the chosen answer up by ln 2 (ratio ln 2) and the rejected one down by ln 2; the chosen has
# 2 tokens and the rejected 4. With beta 1 the margin is ln 4, so sigmoid(margin) = 4/5.
PAIR = PairLogps(
    chosen=torch.tensor([-2.0 + LN_2], dtype=torch.float64),
    rejected=torch.tensor([-4.0 - LN_2], dtype=torch.float64),
    ref_chosen=torch.tensor([-2.0], dtype=torch.float64),
    ref_rejected=torch.tensor([-4.0], dtype=torch.float64),
    chosen_tokens=torch.tensor([2]),
    rejected_tokens=torch.tensor([4]),
)
# Ratios per token: ln 2 / 2 and -ln 2 / 4; their difference is 3/4 ln 2.
PER_TOKEN = 0.75 * LN_2
MEAN_CHOSEN, MEAN_REJECTED = (-2 + LN_2) / 2, (-4 - LN_2) / 4


def value(name, **settings):
    return pair_loss(name, PAIR, LossSettings(**{"beta": 1.0, **settings})).item()


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("sigmoid", {}, math.log(5 / 4)),
        ("sigmoid", {"label_smoothing": 0.25}, 0.75 * math.log(5 / 4) + 0.25 * math.log(5)),
        ("robust", {"label_smoothing": 0.25}, (0.75 * math.log(5 / 4) - 0.25 * math.log(5)) / 0.5),
        ("robust", {}, math.log(5 / 4)),
        ("hinge", {}, 0.0),
        ("hinge", {"beta": 0.5}, 1 - LN_2),
        ("ipo", {}, (PER_TOKEN - 0.5) ** 2),
        ("ipo", {"beta": 0.25}, (PER_TOKEN - 2) ** 2),
        ("sigmoid_norm", {}, math.log(1 + 2**-0.75)),
        # q = 4/5 for the chosen, 1/5 for the rejected, against 3/4 and 1/4.
        ("exo_pair", {"label_smoothing": 0.25}, 0.8 * math.log(0.8 / 0.75) + 0.2 * math.log(0.2 / 0.25)),
        # sigmoid(ln 2) = 2/3, sigmoid(-ln 2) = 1/3.
        ("nca_pair", {}, -math.log(2 / 3) - 0.5 * math.log(1 / 3) - 0.5 * math.log(2 / 3)),
        ("sppo_hard", {}, 2 * (LN_2 - 0.5) ** 2),
        ("apo_zero", {}, 1 - 2 / 3 + 1 / 3),
        ("apo_down", {}, 2 / 3 + 1 - 4 / 5),
        # sigmoid(ln 4 / 2) = 2/3 of the exponential part exp(-ln 4) = 1/4.
        ("discopop", {"discopop_tau": 2.0}, math.log(5 / 4) / 3 + 0.25 * 2 / 3),
        ("simpo", {"beta": 2.0, "simpo_gamma": 0.5}, math.log1p(math.exp(-2 * (MEAN_CHOSEN - MEAN_REJECTED - 0.5)))),
        (
            "orpo",
            {"beta": 0.5},
            -MEAN_CHOSEN
            + 0.5
            * math.log1p(
                (math.exp(MEAN_REJECTED) / (1 - math.exp(MEAN_REJECTED)))
                / (math.exp(MEAN_CHOSEN) / (1 - math.exp(MEAN_CHOSEN)))
            ),
        ),
        ("sigmoid", {"sft_weight": 0.5}, math.log(5 / 4) - 0.5 * MEAN_CHOSEN),
    ],
)
def test_one_pair_by_hand(name, settings, expected):
    assert value(name, **settings) == pytest.approx(expected, abs=1e-12)


def test_every_loss_is_tested():
    cases = {case[0] for case in test_one_pair_by_hand.pytestmark[0].args[1]}
    assert cases == set(LOSSES)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_batch_is_its_pairs_and_each_trial_has_its_own_beta(name):
    generator = torch.Generator().manual_seed(0)
    logps = [-torch.rand(2, 3, generator=generator) * 9 - 1 for _ in range(2)]
    references = [-torch.rand(3, generator=generator) * 9 - 1 for _ in range(2)]
    tokens = [torch.tensor([3, 1, 7]), torch.tensor([2, 9, 4])]
    betas = torch.tensor([[0.1], [0.5]])
    together = pair_loss(name, PairLogps(*logps, *references, *tokens), LossSettings(betas, label_smoothing=0.1))
    assert together.shape == (2, 3)
    for trial in range(2):
        for at in range(3):
            one = PairLogps(*(x[trial, at] for x in logps), *(x[at] for x in references), *(x[at] for x in tokens))
            alone = pair_loss(name, one, LossSettings(betas[trial].item(), label_smoothing=0.1))
            assert alone.item() == pytest.approx(together[trial, at].item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_are_those_of_finite_differences(name):
    start = torch.tensor([-3.0, -5.0], dtype=torch.float64, requires_grad=True)
    rest = [torch.tensor(x, dtype=torch.float64) for x in (-3.5, -4.0)]

    def loss(logps):
        pairs = PairLogps(logps[0], logps[1], *rest, torch.tensor(3), torch.tensor(5))
        return pair_loss(name, pairs, LossSettings(0.3, label_smoothing=0.1, sft_weight=0.2))

    assert torch.autograd.gradcheck(loss, start)
