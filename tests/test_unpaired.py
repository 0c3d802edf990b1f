"""Single answers: KTO, BCO and APO-zero as TRL computes them, and everything around them that knows of pairs."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from statistics import NormalDist

import numpy as np
import pytest
import torch
from conftest import Lines, byte_tokenizer, make_pair, train_one
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from trl import KTOConfig, KTOTrainer

from pairtune.config import UNPAIRED, TrialConfig
from pairtune.data.table import PairTable
from pairtune.engine import native, trl
from pairtune.engine.lora import draw_starts
from pairtune.engine.losses import LabelledLogps, LossSettings, kl_estimate, unpaired_loss
from pairtune.engine.policy import Policy
from pairtune.engine.trial import BaseOutputs, TrialInputs, epoch_order, load_start
from pairtune.errors import Interrupted
from pairtune.models.load import load_model, weights_fingerprint
from pairtune.run.examples import contributions
from pairtune.run.folder import Run
from pairtune.statistics import bootstrap_intervals, longer_wins, within_groups

CLOSE = 1e-4  # of TRL
SAME = 1e-5  # of ourselves, another way


def trial(**changes):
    settings = {"learning_rate": 3e-3, "beta": 0.1, "epochs": 2, "dtype": "float32", "lora_rank": 4, "loss": "kto"}
    return TrialConfig(**settings | {"batch_size": 3, **changes})


def answers(numbers, unequal=True):
    """Single answers to different prompts; every third one is undesirable, or every second."""
    halves = [make_pair(number, rejected="No {0}" * (number % 3 + 1)).halves() for number in numbers]
    return [both[number % (3 if unequal else 2) == 0] for number, both in enumerate(halves)]


@pytest.fixture
def inputs(tiny_base):
    tables = (PairTable.of(each, tiny_base.tokenizer) for each in (answers(range(11)), answers(range(20, 25))))
    return TrialInputs(tiny_base, weights_fingerprint(load_start(trial(), tiny_base)), *tables, "eval_loss")


@pytest.fixture
def trajectory(tmp_path):
    def trajectory(config, inputs):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        result, lines, _ = train_one(native, config, replace(inputs, base_outputs=BaseOutputs()), folder)
        assert result.status == "finished", result.reason
        return lines

    return trajectory


class Oracle(KTOTrainer):
    """TRL's own trainer, on the same ids, from the same adapters, in the same order."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        factors = [weights for name, weights in self.model.named_parameters() if ".lora_A." in name]
        for weights, start in zip(factors, draw_starts(factors, self.args.seed), strict=True):
            weights.data.copy_(start)

    def _get_train_sampler(self, dataset=None):
        return trl._EpochOrder(len(self.train_dataset), self.args.seed)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def as_trls(table):
    rows = table.tokens(range(len(table)))
    return Dataset.from_dict(
        {
            "prompt_ids": [row.prompt for row in rows],
            "completion_ids": [row.chosen for row in rows],
            "KL_completion_ids": [row.rejected for row in rows],
            "label": table.desirable.tolist(),
        }
    )


def trls(config, inputs, folder):
    """The log of TRL's KTOTrainer."""
    trainer = Oracle(
        model=load_model(inputs.base.source, torch.float32, inputs.base.device),
        args=KTOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=len(inputs.validation),  # its KL estimate is one of the whole batch
            num_train_epochs=config.epochs,
            learning_rate=config.learning_rate,
            beta=config.beta,
            loss_type=config.loss,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
            max_length=None,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            report_to=[],
        ),
        train_dataset=as_trls(inputs.train),
        eval_dataset=as_trls(inputs.validation),
        processing_class=inputs.base.tokenizer,
        peft_config=LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear"),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line or "eval_loss" in line]


SHOWN = (
    "loss",
    "grad_norm",
    "learning_rate",
    *(f"{what}/{kind}" for what in ("rewards", "logps") for kind in ("chosen", "rejected")),
)


@pytest.mark.parametrize(
    "changes", [{}, {"loss": "apo_zero_unpaired"}, {"desirable_weight": 0.5, "undesirable_weight": 1.7}]
)
def test_the_trajectory_is_trls(inputs, trajectory, tmp_path, changes):
    config = trial(**changes)
    ours, theirs = trajectory(config, inputs), trls(config, inputs, tmp_path / "trl")
    assert len(ours) == len(theirs) == 2 * (math.ceil(11 / 3) + 1)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        evaluation = "eval_loss" in other
        names = [f"eval_{name}" for name in SHOWN if "grad" not in name and "rate" not in name] if evaluation else SHOWN
        for name in names:
            assert (name in one) == (name in other), (number, name)  # batches of one kind have no metrics of the other
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), abs=CLOSE, rel=CLOSE), (number, name)
        start = "eval_" if evaluation else ""
        for name, theirs_is in (("rewards/margins", "rewards/margins"), ("kl_estimate", "kl")):
            assert one.get(start + name, 0) == pytest.approx(other.get(start + theirs_is, 0), abs=CLOSE, rel=CLOSE), (
                name
            )


def test_bco_is_trls_bco_pair(tiny_base, trajectory, tmp_path, monkeypatch):
    """On both answers of each pair in turn; TRL adds the two losses, of which ours is the mean."""
    pairs = [make_pair(number, rejected="No {0}" * (number % 3 + 1)) for number in range(9)]
    start = weights_fingerprint(load_start(trial(), tiny_base))
    tables = [PairTable.of(each, tiny_base.tokenizer) for each in (pairs[:7], pairs[7:])]
    halves = [
        PairTable.of([half for pair in each for half in pair.halves()], tiny_base.tokenizer)
        for each in (pairs[:7], pairs[7:])
    ]
    config = trial(loss="hinge", batch_size=2, max_grad_norm=1e6)
    monkeypatch.setattr(trl, "_arguments", partial(bco_arguments, trl._arguments))
    theirs = train_one(trl, config, TrialInputs(tiny_base, start, *tables, "eval_loss"), tmp_path / "trl")[1]
    monkeypatch.setattr(
        native, "epoch_order", lambda n, *at: [2 * row + half for row in epoch_order(n // 2, *at) for half in (0, 1)]
    )
    ours = trajectory(
        trial(loss="bco", batch_size=4, max_grad_norm=1e6), TrialInputs(tiny_base, start, *halves, "eval_loss")
    )
    for one, other in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "eval_loss"):
            assert 2 * one.get(name, 0) == pytest.approx(other.get(name, 0), abs=CLOSE, rel=CLOSE), name
        for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "eval_rewards/margins"):
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), abs=CLOSE, rel=CLOSE), name


def bco_arguments(made, *args):
    found = made(*args)
    found.loss_type = ["bco_pair"]
    return found


def test_worked_by_hand():
    """Two desirable answers and an undesirable one; log-ratios 2, -1, 1; beta 0.5; KL estimate 1."""
    batch = LabelledLogps(
        torch.tensor([-8.0, -6.0, -4.0]), torch.tensor([-10.0, -5.0, -5.0]), torch.tensor([True, True, False]), 1.0
    )
    settings = LossSettings(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    # sigmoid(0.5 * (2 - 1)) = 0.6225; sigmoid(0.5 * (-1 - 1)) = 0.2689; sigmoid(0.5 * (1 - 1)) = 0.5
    expected = [2 * (1 - 0.6225), 2 * (1 - 0.2689), 3 * 0.5]
    assert unpaired_loss("kto", batch, settings).tolist() == pytest.approx(expected, abs=1e-4)
    # sigmoid(1) = 0.7311; sigmoid(-0.5) = 0.3775; of the undesirable one sigmoid(-0.5) too
    expected = [-2 * math.log(0.7311), -2 * math.log(0.3775), -3 * math.log(0.3775)]
    assert unpaired_loss("bco", batch, settings).tolist() == pytest.approx(expected, abs=1e-3)
    expected = [2 * (1 - 0.73106), 2 * (1 - 0.37754), 3 * (1 - 0.37754)]
    assert unpaired_loss("apo_zero_unpaired", batch, settings).tolist() == pytest.approx(expected, abs=1e-4)


def test_the_kl_estimate_is_a_mean_not_below_zero_and_has_no_gradient():
    ratios = torch.tensor([[0.5, -0.1, 0.2], [-3.0, 1.0, 0.5]], requires_grad=True)
    estimate = kl_estimate(ratios)
    assert estimate.tolist() == pytest.approx([0.2, 0.0])
    assert not estimate.requires_grad


# --- the same trajectory, however it is computed


@pytest.mark.parametrize("loss", UNPAIRED)
@pytest.mark.parametrize("how", ["an answer a pass", "padded", "unshared"])
def test_however_rows_are_packed(inputs, trajectory, monkeypatch, loss, how):
    config = trial(loss=loss)
    expected = trajectory(config, inputs)
    if how == "an answer a pass":
        monkeypatch.setattr(native, "TRAIN_TOKENS", 1)
    elif how == "padded":
        monkeypatch.setattr("pairtune.engine.policy.PACKED_FAMILIES", frozenset())
    else:
        monkeypatch.setattr(native, "Policy", partial(Policy, share_prompts=False))
    assert_same(trajectory(config, inputs), expected)


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=SAME, rel=SAME), name


def test_trials_side_by_side_are_the_trials_one_by_one(inputs, tmp_path):
    trials = [trial(beta=0.1), trial(beta=0.4), trial(loss="bco", varied=("loss",)), trial(learning_rate=1e-3)]
    lines, run = Lines(), Run(tmp_path / "together")
    native.run_trials(trials, inputs, run, lines)
    for each in trials:
        alone = Lines()
        native.run_trials([each], replace(inputs, base_outputs=BaseOutputs()), Run(tmp_path / each.name), alone)
        assert_same(lines.of[each.name], alone.of[each.name])


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(inputs, tmp_path):
    def steps_until(count):
        return lambda: len(lines.of.get(config.name, [])) >= count

    config, lines = trial(), Lines()
    native.run_trials([config], inputs, Run(tmp_path / "whole"), lines)
    expected = lines.of[config.name]
    lines, run = Lines(), Run(tmp_path / "stopped")
    with pytest.raises(Interrupted):
        native.run_trials([config], replace(inputs, stopping=steps_until(3)), run, lines)
    native.run_trials([config], inputs, run, lines)
    assert lines.of[config.name] == expected


# --- mismatched answers


def test_mismatched_answers_are_those_of_the_prompt_before_in_turn(tiny_base):
    pairs = [make_pair(number) for number in (1, 1, 2, 3, 3)]
    table = PairTable.of([half for pair in pairs for half in pair.halves()], tiny_base.tokenizer)
    assert table.unpaired
    assert table.mismatched.tolist() == [6, 7, 8, 9, 0, 1, 4, 5, 4, 5]
    assert table.desirable.tolist() == [True, False] * 5
    one, other = table.tokens([6, 4])
    assert (one.rejected, one.prompt != other.prompt) == (other.chosen, True)
    assert not PairTable.of(pairs, tiny_base.tokenizer).unpaired


def test_of_different_prompts_it_is_trls_rotation(tiny_base):
    table = PairTable.of(answers(range(6)), tiny_base.tokenizer)
    assert table.mismatched.tolist() == [5, 0, 1, 2, 3, 4]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12))
def test_a_mismatched_answer_has_another_prompt_where_there_is_one(numbers):
    table = PairTable.of([make_pair(number).halves()[at % 2] for at, number in enumerate(numbers)], byte_tokenizer())
    prompts, mismatched = table.same_prompt, table.mismatched
    assert len(set(numbers)) == 1 or (prompts[mismatched] != prompts).all()
    whole = PairTable.of([half for number in range(9) for half in make_pair(number).halves()], byte_tokenizer())
    assert sorted(whole.mismatched) == list(range(18))  # both answers of every pair, once


def test_a_single_prompt_gets_its_own_answers(tiny_base):
    one, other = make_pair(1).halves()
    assert PairTable.of([one, other, one], tiny_base.tokenizer).mismatched.tolist() == [2, 0, 1]


def test_a_mismatched_answer_is_cut_to_the_maximum_length(tiny_base):
    long, short = make_pair(1, chosen="x" * 50).halves()[0], make_pair(2, chosen="y").halves()[0]
    whole = PairTable.of([long, short], tiny_base.tokenizer)
    prompt = len(whole.tokens([1])[0].prompt)
    table = PairTable(whole._table, None, prompt + 5)
    (tokens,) = table.tokens([1])
    assert tokens.rejected == whole.tokens([1])[0].rejected[:5]
    assert table.ids_fingerprint() != whole.ids_fingerprint()
    assert len(PairTable(whole._table, None, 3).tokens([1])[0].rejected) == 1


# --- statistics


numbers = st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3)), min_size=2, max_size=30)


@given(numbers)
def test_shares_within_groups_are_counted(rows):
    values, good, groups = (np.array(column) for column in zip(*rows, strict=True))
    found = within_groups(values.astype(float), good, groups)
    for at, share in enumerate(found):
        others = [values[i] for i in range(len(rows)) if groups[i] == groups[at] and good[i] != good[at]]
        sign = 1 if good[at] else -1
        right = [0.5 + 0.5 * np.sign(sign * (values[at] - other)) for other in others]
        assert np.isnan(share) if not right else share == pytest.approx(np.mean(right))


@given(numbers.filter(lambda rows: len({good for _, good, _ in rows}) == 2))
def test_the_mean_of_contributions_is_the_metric(rows):
    values, good, _ = (np.array(column) for column in zip(*rows, strict=True))
    values = values.astype(float)
    assert contributions(values, good, "sum").mean() == pytest.approx(values[good].mean() + values[~good].mean())
    one_kind = np.where(good, values, np.nan)
    assert contributions(one_kind, good, "known").mean() == pytest.approx(values[good].mean())
    shares = within_groups(values, good, np.zeros(len(values), int))
    area = contributions(shares, good, "mean").mean()
    assert area == pytest.approx(shares[good].mean())
    assert area == pytest.approx(shares[~good].mean())


def test_intervals_of_the_area_under_the_curve_hold_it():
    """200 samples from two normal distributions, 15 and 45 answers, whose area is known."""
    generator, held = np.random.default_rng(0), 0
    area = NormalDist().cdf(0.7 / math.sqrt(2))
    for _ in range(200):
        good = np.arange(60) < 15
        values = generator.normal(size=60) + 0.7 * good
        shares = within_groups(values, good, np.zeros(60, int))
        ((low, high),) = bootstrap_intervals(contributions(shares, good, "mean")[:, None])
        held += low <= area <= high
    assert 182 <= held <= 198  # of 190 expected


def test_how_often_the_longer_answer_is_the_desirable_one():
    chosen, rejected = np.array([5, 3, 0, 0]), np.array([0, 0, 4, 3])
    assert longer_wins(chosen, rejected).value == pytest.approx((1 + 1 + 0 + 0.5) / 4)
