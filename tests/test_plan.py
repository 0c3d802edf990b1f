"""What a run would cost: the arithmetic by hand, and the command."""

from __future__ import annotations

import json

import pytest
from conftest import byte_tokenizer, pairtune, write_pairs
from transformers import GPT2Config, GPT2LMHeadModel

from pairtune import plan
from pairtune.config import RunConfig
from pairtune.cost import ModelShape, PairLengths, Speed, estimate, lockstep_memory
from pairtune.engine.memory import shape_of
from pairtune.models.load import blank_model
from pairtune.models.resolve import resolve_model
from pairtune.plan import measure_speed
from pairtune.report.render_plan import time_range

SHAPE = ModelShape(parameters=1_000_000, layers=4, hidden=64, widest=256, adapter_weights=5_000, vocabulary=1_000)
SPEED = Speed(
    dtype="float32",
    bytes_per_number=4,
    layer_forward=1e-5,
    layer_training=3e-5,
    head_forward=2e-5,
    memory_free=8e9,
)
LENGTHS = PairLengths(prompt=60, chosen=20, rejected=20, longest=200)


def cost(pairs=None, **settings):
    config = RunConfig(**{"data": ["x"], "learning_rate": [1e-4], "beta": [0.1], "epochs": 2, "samples": 0, **settings})
    return estimate(config, pairs or {"train": 100, "validation": 10}, LENGTHS, SHAPE, SPEED)


def test_time_by_hand():
    found = cost()
    forward = 100 * 4 * 1e-5 + 40 * 2e-5  # tokens times layers, answers' tokens times the head
    training = (100 * 4 * 3e-5 + 3 * 40 * 2e-5) * 1.3
    seconds = 200 * training + 20 * forward * 1.3 + 110 * forward + 30
    assert found.seconds == pytest.approx((seconds / 1.4, seconds * 1.4))
    assert (found.trials, found.steps) == (1, 100)


def test_trials_side_by_side_cost_less_than_one_after_another():
    one, four = cost(), cost(learning_rate=[1e-4, 2e-4], beta=[0.1, 0.2])
    assert (four.trials, four.steps, four.side_by_side) == (4, 4 * one.steps, 4)
    assert 3 < (four.seconds[0] - 30 / 1.4) / (one.seconds[0] - 30 / 1.4) < 4
    assert four.memory["adapters and optimizer"] == 4 * one.memory["adapters and optimizer"] == 4 * 16 * 5_000 * 16


def test_a_sampled_search_counts_the_trials_that_it_will_run():
    found = cost(search="random", trial_count=20, learning_rate=[1e-4, 2e-4])
    assert (found.trials, found.steps) == (20, 20 * cost().steps)


def test_memory_by_hand():
    trial = RunConfig(data=["x"], batch_size=2).trials()[0]
    parts = lockstep_memory(SHAPE, trial, 4, 200, 1, checkpointing=False)
    assert parts["weights"] == 4e6
    assert parts["activations"] == 400 * 4 * (12 * 64 + 6 * 256) * 4
    assert lockstep_memory(SHAPE, trial, 4, 200, 1, checkpointing=True)["activations"] == 400 * 4 * 64 * 4


def test_full_training_keeps_gradients_and_moments_of_every_weight():
    assert cost(method="full").memory["gradients and optimizer"] == 16e6
    assert cost(method="full").seconds > cost().seconds


def test_what_does_not_fit_is_said():
    config = RunConfig(data=["x"])
    tight = SPEED.model_copy(update={"memory_free": 1e6})
    found = estimate(config, {"train": 10, "validation": 2}, LENGTHS, SHAPE, tight)
    assert (found.fits, found.side_by_side) == (False, 1)


def test_times_in_words():
    found = cost()
    assert time_range(found.model_copy(update={"seconds": (20.0, 60.0)})) == "about a minute"
    assert time_range(found.model_copy(update={"seconds": (110.0, 250.0)})) == "2 to 4 minutes"
    assert time_range(found.model_copy(update={"seconds": (3000.0, 7300.0)})) == "50 min 00 s to 2 h 01 min"


def test_families_without_packed_attention_are_measured_too(tmp_path):
    tokenizer = byte_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=3, n_head=4, n_positions=512)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    shape, speed = shape_of(blank_model(source)), measure_speed(source)
    assert (shape.layers, shape.hidden, shape.widest) == (3, 32, 128)
    assert speed is not None
    assert 0 < speed.layer_forward < speed.layer_training


def test_a_model_that_cannot_be_measured_has_no_time(tiny_model, monkeypatch):
    def unusual(source):
        raise KeyError("sliding_window_pattern")

    monkeypatch.setattr(plan, "_few_layers", unusual)
    assert measure_speed(resolve_model(str(tiny_model))) is None


def test_the_command_plans_without_starting(tiny_model, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", range(30))
    more = ("--data", data, "--model", tiny_model, "--out", tmp_path / "run", "--lr", "1e-4", "--beta", "0.1")
    done = pairtune("plan", *more, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["pairs"] == {"train": 24, "validation": 3, "test": 3}
    assert found["inspections"][0]["kept"] == 30
    assert len(found["inspections"][0]["examples"]) == 3
    assert found["cost"]["steps"] == 36
    assert 0 < found["speed"]["layer_forward"] < found["speed"]["layer_training"]
    assert not (tmp_path / "run").exists()
    shown = pairtune("plan", *more).stdout
    assert "1 trial, 1 side by side" in shown
    refused = pairtune("plan", "--data", tmp_path / "missing.jsonl")
    assert (refused.returncode, "no such file" in refused.stderr) == (2, True)
