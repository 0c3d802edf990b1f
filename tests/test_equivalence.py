"""Equivalent ways to train are one trajectory: loss and gradient norm of every step, point by point.

TRL's DPOTrainer is the oracle. Both engines start from the same adapters, see the same pairs in the same order, and are
compared in float32, where what differs is a mistake and not rounding.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import make_pair, shared_file, train_one

from pairtune.config import Reading, SourceConfig, TrialConfig
from pairtune.data.source_reader import SourceReader
from pairtune.data.table import PairTable
from pairtune.data.tokens import PairTokenizer, TokenizedPair
from pairtune.engine import native, trl
from pairtune.engine.losses import LOSSES
from pairtune.engine.packed_attention import packed_attention
from pairtune.engine.policy import Policy
from pairtune.engine.trial import BaseOutputs, TrialInputs, load_start
from pairtune.models.load import weights_fingerprint

CLOSE = 1e-4  # of TRL
SAME = 1e-5  # of ourselves, another way


def trial(**changes):
    settings = {"learning_rate": 3e-3, "beta": 0.1, "epochs": 1, "dtype": "float32", "lora_rank": 4, **changes}
    return TrialConfig(**settings)


def inputs_of(base, pairs, held, **changes):
    start = weights_fingerprint(load_start(trial(**changes), base))
    return TrialInputs(base, start, *(PairTable.of(each, base.tokenizer) for each in (pairs, held)), "eval_loss")


@pytest.fixture
def made(tiny_base):
    pairs = [make_pair(number, rejected="No {0}" * (number % 3 + 1)) for number in range(8)]
    return partial(inputs_of, tiny_base, pairs[:7], pairs[7:])


@pytest.fixture
def real(tiny_base):
    """60 short pairs from rm-static: 30 steps."""
    reader = SourceReader.open(
        SourceConfig(source=str(shared_file("rm_static_train.jsonl.gz"))), "--data", Reading(), 1500
    )
    encoder = PairTokenizer(tiny_base.tokenizer, 400)
    short = [
        result.pair
        for batch in reader.encoded(encoder.encode)
        for _, result in batch
        if isinstance(result, TokenizedPair) and not result.turns_cut
    ]
    assert len(short) > 62
    return partial(inputs_of, tiny_base, short[:60], short[60:62])


@pytest.fixture
def trajectory(tmp_path):
    def trajectory(engine, config, inputs):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        result, lines, _ = train_one(engine, config, replace(inputs, base_outputs=BaseOutputs()), folder)
        assert result.status == "finished", result.reason
        return lines

    return trajectory


def assert_equal(one, other, tolerance):
    """Compare point by point, and check that there is no systematic drift."""
    assert len(one) == len(other)
    for name in ("loss", "grad_norm", "learning_rate", "rewards/margins", "logps/chosen", "logits/rejected"):
        pairs = [(a[name], b[name]) for a, b in zip(one, other, strict=True) if name in a and "eval_loss" not in a]
        assert pairs
        for step, (a, b) in enumerate(pairs, 1):
            assert a == pytest.approx(b, abs=tolerance, rel=tolerance), (name, step)
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_logits/chosen"):
        for a, b in zip(one, other, strict=True):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), abs=tolerance, rel=tolerance), name


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "apo_zero", "sigmoid_norm"])
def test_thirty_steps_on_real_pairs_are_trls(real, trajectory, loss, method):
    config = trial(loss=loss, method=method, learning_rate=1e-3 if method == "lora" else 1e-4)
    inputs = real(method=method)
    ours, theirs = (trajectory(engine, config, inputs) for engine in (native, trl))
    assert len([line for line in ours if "eval_loss" not in line]) == 30
    assert_equal(ours, theirs, CLOSE)


@pytest.mark.parametrize("loss", sorted(LOSSES.keys() - {"simpo", "orpo"}))
def test_every_loss_that_trl_has_is_trls(made, trajectory, loss):
    """With non-default loss settings where a loss has some, and with rsLoRA's scale."""
    smoothing = {"robust": 0.1, "exo_pair": 0.01}.get(loss, 0.0)
    config = trial(loss=loss, epochs=2, label_smoothing=smoothing, discopop_tau=0.3, rslora=True, learning_rate=1e-3)
    inputs = made()
    assert_equal(trajectory(native, config, inputs), trajectory(trl, config, inputs), CLOSE)


def test_adapters_on_some_layers_are_trls(made, trajectory):
    config = trial(lora_targets=("q_proj", "down_proj"))
    inputs = made()
    ours = trajectory(native, config, inputs)
    assert_equal(ours, trajectory(trl, config, inputs), CLOSE)
    assert ours[-1]["loss"] != trajectory(native, trial(), inputs)[-1]["loss"]


def test_packing_accumulation_and_plain_rows_are_one_trajectory(made, trajectory, monkeypatch):
    config = trial(epochs=2, batch_size=4)
    expected = trajectory(native, config, made())
    monkeypatch.setattr(native, "TRAIN_TOKENS", 1)  # a pair a pass, gradients accumulated
    assert_equal(trajectory(native, config, made()), expected, SAME)
    monkeypatch.undo()


def test_unshared_rows_are_the_same_trajectory(made, trajectory, monkeypatch):
    expected = trajectory(native, trial(), made())
    monkeypatch.setattr(native, "Policy", partial(Policy, share_prompts=False))
    assert_equal(trajectory(native, trial(), made()), expected, SAME)


def test_padded_rows_are_the_same_trajectory(made, trajectory, monkeypatch):
    """The path of models whose attention does not support segments."""
    expected = trajectory(native, trial(), made())
    monkeypatch.setattr("pairtune.engine.policy.PACKED_FAMILIES", frozenset())
    assert_equal(trajectory(native, trial(), made()), expected, SAME)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_checkpointed_activations_are_the_same_trajectory(made, trajectory, method, monkeypatch):
    lines, calls = {}, {}
    for mode in ("off", "on"):
        counted: list[int] = []

        def counting(*arguments, counted=counted, **more):
            counted.append(1)
            return packed_attention(*arguments, **more)

        monkeypatch.setattr("pairtune.engine.layers.packed_attention", counting)
        lines[mode] = trajectory(native, trial(method=method, checkpointing=mode), made(method=method))
        calls[mode] = len(counted)
    assert_equal(lines["on"], lines["off"], SAME)
    assert calls["on"] > calls["off"] > 0, "layers are computed again in the backward pass"


def test_the_same_seed_gives_the_same_bits(made, trajectory):
    assert trajectory(native, trial(), made()) == trajectory(native, trial(), made())


def test_bfloat16_stays_near_float32(made, trajectory, tiny_base):
    expected = trajectory(native, trial(epochs=2), made())
    base = type(tiny_base)(tiny_base.source, tiny_base.tokenizer, torch.bfloat16, tiny_base.device)
    table = made()
    start = weights_fingerprint(load_start(trial(), base))
    inputs = TrialInputs(base, start, table.train, table.validation, "eval_loss")
    rounded = trajectory(native, trial(epochs=2, dtype="bfloat16"), inputs)
    assert rounded[0]["loss"] == pytest.approx(expected[0]["loss"], abs=1e-6)
    assert rounded[-1]["eval_loss"] == pytest.approx(expected[-1]["eval_loss"], abs=0.02)
