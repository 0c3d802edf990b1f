"""What a run would cost: the arithmetic by hand, and the command."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import byte_tokenizer, pairtune, write_pairs
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from pairtune.config import RunConfig
from pairtune.cost import LayerSpeed, Speed, Times, estimate
from pairtune.engine import speed
from pairtune.engine.compact import CompactOptimizer
from pairtune.engine.memory import shape_of
from pairtune.engine.optimize import TrialOptimizer
from pairtune.engine.speed import measure_speed
from pairtune.footprint import ModelShape, PairLengths, fit, peak_memory, remedies, training_memory
from pairtune.models.load import blank_model
from pairtune.models.resolve import ModelSource, resolve_model
from pairtune.report.render_plan import does_not_fit, time_range
from pairtune.run.folder import Run

SHAPE = ModelShape(
    parameters=1_000_000,
    layers=4,
    hidden=64,
    inner=256,
    heads=4,
    queries=64,
    keys=32,
    adapter_weights=5_000,
    vocabulary=1_000,
)
TIMES = Times(
    method="lora",
    forward=LayerSpeed(first=8e-6, further=1e-5),
    training=LayerSpeed(first=3e-5, further=4e-5),
    beside=LayerSpeed(first=2e-5, further=3e-5),
    update=LayerSpeed(first=1e-3, further=5e-4),
    head_forward=2e-5,
    head_training=5e-5,
)
SPEED = Speed(dtype="float32", memory_free=8e9, times=TIMES)
LENGTHS = PairLengths(prompt=60, chosen=20, rejected=20, longest=200)


def settings(**values):
    return RunConfig(**{"data": ["x"], "learning_rate": [1e-4], "beta": [0.1], "epochs": 2, "samples": 0, **values})


def cost(pairs=None, **values):
    return estimate(settings(**values), pairs or {"train": 100, "validation": 10}, LENGTHS, SHAPE, SPEED)


def test_time_by_hand():
    found = cost()
    forward = 100 * (8e-6 + 3 * 1e-5) + 40 * 2e-5  # tokens times layers, answers' tokens times the head
    training = 100 * (3e-5 + 3 * 4e-5) + 40 * 5e-5 + (1e-3 + 3 * 5e-4) / 2  # an update for two pairs
    # 100 and 10 pairs for the reference, 10 for KL, 8 for rounding; twice the 5.12 pairs of a row, of both splits.
    seconds = 200 * training + 20 * forward + (128 + 2 * 2 * 5.12) * forward + 20
    assert found.seconds == pytest.approx((seconds / 1.2, seconds * 1.2))
    assert (found.trials, found.steps) == (1, 100)
    assert found.step_seconds == pytest.approx(2 * training)
    assert found.evaluation_seconds == pytest.approx(10 * forward)


def test_trials_side_by_side_cost_less_than_one_after_another():
    alone, among_four = 3e-5 + 3 * 4e-5, 2e-5 + 3 * 3e-5
    assert TIMES.per_token(4, 1) == pytest.approx(alone)
    assert TIMES.per_token(4, 4) == pytest.approx(among_four)
    assert among_four < TIMES.per_token(4, 2) < alone
    one, four = cost(), cost(learning_rate=[1e-4, 2e-4], beta=[0.1, 0.2])
    assert (four.trials, four.steps, four.fit.side_by_side) == (4, 4 * one.steps, 4)
    assert four.fit.memory["adapters and optimizer"] == 4 * one.fit.memory["adapters and optimizer"]
    assert one.fit.memory["adapters and optimizer"] == 16 * 5_000 * 16


def test_a_sampled_search_counts_the_trials_that_it_will_run():
    found = cost(search="random", trial_count=20, learning_rate=[1e-4, 2e-4])
    assert (found.trials, found.steps) == (20, 20 * cost().steps)


def test_trials_side_by_side_are_not_believed_to_be_slower_than_alone():
    """They share the base's products; what a disturbed measurement says would double the time."""
    disturbed = TIMES.model_copy(update={"beside": LayerSpeed(first=6e-5, further=8e-5)})
    assert disturbed.per_token(4, 4) == pytest.approx(TIMES.training.seconds(4))
    assert TIMES.per_token(4, 4) == pytest.approx(TIMES.beside.seconds(4))


def test_memory_by_hand():
    """400 tokens in a row, of two pairs of 200: 120 of the prompt and 40 of each answer."""
    trial = settings(batch_size=2).trials()[0]
    parts = training_memory(SHAPE, trial, 4, LENGTHS, width=1)
    assert parts["weights"] == 4e6
    scores = 4 * 400 * (120 * 120 + 2 * 40 * 160) / 200
    kept = 400 * (2 * 64 + 2 * 64 + 2 * 32 + 2 * 256 + 7 * 16) + scores
    passing = 400 * (6 * 256 + 4 * 64 + 3 * 64) + 2 * scores
    head = 400 * 1_000 * 8
    training = (4 * kept + passing) * 4 + head
    evaluating = 4096 * (4 * 256 + 6 * 64) * 4 + head
    assert parts["activations"] == pytest.approx(1.05 * max(training, evaluating))
    checkpointed = training_memory(SHAPE, trial, 4, LENGTHS, width=4, checkpointing=True)
    all_kept = training_memory(SHAPE, trial, 4, LENGTHS, width=4)
    fewer = 4 * 3 * (kept - 400 * 64) - 4 * 400 * 64  # three layers' activations, but the inputs of all four
    assert all_kept["activations"] - checkpointed["activations"] == pytest.approx(1.05 * 4 * fewer)


def test_memory_of_a_row_that_is_filled_up_by_hand():
    """512 tokens: two pairs of 200, and one of 112, whose tokens attend to 112 / 200 as many."""
    long = SHAPE.model_copy(update={"layers": 40})  # so that training takes more than evaluation
    parts = training_memory(long, settings(batch_size=4).trials()[0], 4, LENGTHS, width=1)
    scores = 4 * (400 + 112 * 112 / 200) * (120 * 120 + 2 * 40 * 160) / 200
    kept = 512 * (2 * 64 + 2 * 64 + 2 * 32 + 2 * 256 + 7 * 16) + scores
    passing = 512 * (6 * 256 + 4 * 64 + 3 * 64) + 2 * scores
    assert parts["activations"] == pytest.approx(1.05 * ((40 * kept + passing) * 4 + 512 * 1_000 * 8))


def test_memory_of_divided_weights_by_hand():
    """Four processes in bfloat16; 600,000 of a million weights are in four layers, and 64,000 in the embedding."""
    shape = SHAPE.model_copy(update={"in_layers": 600_000, "processes": 4})
    config = settings(method="full", learning_rate=[1e-5])
    parts = training_memory(shape, config.trials()[0], 2, LENGTHS, width=1)
    assert parts["weights"] == 4 * 250_000 + 2 * (400_000 + 2 * 150_000 + 64_000)
    own, gathered = 12 * 250_000, 2 * (400_000 + 150_000) + 4 * 400_000 + 4 * 64_000
    assert parts["gradients and optimizer"] == own + gathered
    alone = training_memory(SHAPE, config.trials()[0], 2, LENGTHS, width=1)
    assert parts["activations"] == alone["activations"]
    kept = {"width": 1, "row_tokens": 512, "checkpointing": False}
    large = shape.model_copy(update={"parameters": 10**9, "in_layers": 10**9 - 64_000, "layers": 100})
    assert peak_memory(config, large, 2, LENGTHS, **kept)["checkpoint"] == 12 * 10**9
    on_cards = large.model_copy(update={"accelerator": True, "processes": 64})
    assert peak_memory(config, on_cards, 2, LENGTHS, **kept)["weights"] == 4 * 10**9 / 64 + 2 * 10**9


def test_more_gpus_are_a_remedy_for_all_weights():
    large = SHAPE.model_copy(update={"parameters": 10**9, "in_layers": 9 * 10**8, "accelerator": True})
    config = settings(method="full", learning_rate=[1e-5])
    assert not fit(config, LENGTHS, large, "bfloat16", 12e9).fits
    found = remedies(config, LENGTHS, large, "bfloat16", 12e9)
    assert "2 such GPUs (torchrun --nproc-per-node 2)" in found
    assert not any("GPUs" in each for each in remedies(settings(), LENGTHS, large, "bfloat16", 12e9))
    on_two = large.model_copy(update={"processes": 2})
    assert fit(config, LENGTHS, on_two, "bfloat16", 12e9).fits


def test_memory_is_that_of_the_largest_trial():
    varied, largest = settings(lora_rank=[4, 64, 16], batch_size=[1, 2]), settings(lora_rank=64, batch_size=2)
    short = LENGTHS.model_copy(update={"longest": 100})  # two of a batch share a row
    kept = {"width": 1, "row_tokens": 512, "checkpointing": False}
    assert peak_memory(varied, SHAPE, 4, short, **kept) == peak_memory(largest, SHAPE, 4, short, **kept)


def test_more_trials_share_an_accelerator():
    grid = settings(learning_rate=[n * 1e-5 for n in range(1, 13)])
    assert fit(grid, LENGTHS, SHAPE, "float32", 1e12).side_by_side == 4
    card = SHAPE.model_copy(update={"accelerator": True})
    assert fit(grid, LENGTHS, card, "float32", 1e12).side_by_side == 8


def test_full_training_keeps_gradients_and_moments_of_every_weight():
    own = cost(method="full")
    head = 4 * 1_000 * 64
    assert own.fit.memory["gradients and optimizer"] == 8e6 + 4e6 + 4e6 + head
    assert own.seconds > cost().seconds
    narrow = SPEED.model_copy(update={"dtype": "bfloat16"})
    found = estimate(settings(method="full"), {"train": 10}, LENGTHS, SHAPE, narrow)
    assert found.fit.memory["gradients and optimizer"] == 8e6 + 4e6 + 4e6 + 2e6 + head  # with float32 masters


def test_what_is_given_up_to_fit_comes_in_order():
    """Trials side by side first, then tokens of a row, checkpointing, and at last the dtype."""
    grid = {"learning_rate": [1e-4, 2e-4], "beta": [0.1, 0.2], "batch_size": 8}
    config, large = settings(**grid), SHAPE.model_copy(update={"layers": 40})
    seen, limit = [], 1e12
    while (found := fit(config, LENGTHS, large, "float32", limit)).fits:
        seen.append((found.side_by_side, found.row_tokens, found.checkpointing, found.dtype))
        limit = found.bytes - 1
    assert seen[:4] == [(width, 512, False, "float32") for width in (4, 3, 2, 1)]
    assert (1, 200, False, "float32") in seen
    assert [each[2] for each in seen] == sorted(each[2] for each in seen if each[3] == "float32") + [
        each[2] for each in seen if each[3] == "bfloat16"
    ]
    assert seen[-1] == (1, 200, True, "bfloat16")
    assert found.bytes > limit
    asked = settings(**grid, side_by_side=2, dtype="float32", checkpointing="off", row_tokens=300)
    kept = fit(asked, LENGTHS, large, "float32", 1.0)
    assert (kept.side_by_side, kept.row_tokens, kept.checkpointing, kept.dtype) == (2, 300, False, "float32")


def test_what_does_not_fit_is_said_with_what_would():
    tight = SPEED.model_copy(update={"memory_free": 1e6})
    found = estimate(settings(), {"train": 10, "validation": 2}, LENGTHS, SHAPE, tight)
    assert (found.fit.fits, found.fit.side_by_side, found.remedies) == (False, 1, ())
    assert "choose a smaller model" in does_not_fit(found.fit, found.limit, found.remedies)
    deep, long = SHAPE.model_copy(update={"layers": 400}), LENGTHS.model_copy(update={"longest": 2000})
    least = fit(settings(), LENGTHS, deep, "float32", 0.0).bytes
    limited = settings(memory=f"{least / 2**20:.0f}MB")
    found = estimate(limited, {"train": 10}, long, deep, SPEED)
    assert not found.fit.fits
    (shorter,) = found.remedies
    longest = int(shorter.split()[4])
    assert 150 < longest < 250
    assert f"what would fit: pairs of up to {longest} tokens (lower --max-length)" in does_not_fit(
        found.fit, found.limit, found.remedies
    )


@pytest.mark.parametrize(
    ("values", "share", "told"),
    [
        ({"method": "full"}, 0.7, ("--optimizer adamw-8bit", "--method lora")),
        ({"method": "full"}, 0.3, ("--method lora",)),
        ({}, 0.5, ("--model NAME@nf4, a base in 4 bits",)),
        (
            {"method": "full", "optimizer": "adamw-8bit"},
            0.12,
            ("--model NAME@nf4, a base in 4 bits, with --method lora",),
        ),
        ({"method": "full", "optimizer": ["adamw", "adamw-8bit"]}, 0.3, ("--method lora",)),
    ],
)
def test_what_else_would_fit(values, share, told):
    """Of a model with 100 million weights, 95 of them in linear layers, and pairs too short to matter."""
    large = SHAPE.model_copy(update={"parameters": 100_000_000, "linear": 95_000_000})
    short = LENGTHS.model_copy(update={"longest": 16})
    bare = peak_memory(settings(), SHAPE, 2, short, width=1, row_tokens=16, checkpointing=True)
    program = sum(bare.values())
    needed = fit(settings(**values), short, large, "bfloat16", 0.0).bytes - program
    assert remedies(settings(**values), short, large, "bfloat16", program + share * needed) == told


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6 << 30), ("6 gib", 6 << 30), ("900M", 900 << 20), ("1.5g", 3 << 29), ("1000000000", 10**9)],
)
def test_sizes(text, size):
    assert settings(memory=text).memory_bytes == size


@pytest.mark.parametrize("text", ["", "six", "6XB", "-1GB", "6GB6", "nan", "1MB", "0"])
def test_sizes_that_are_none_are_refused_in_one_line(text, tmp_path):
    done = pairtune("plan", "--data", "bundled:concise", "--memory", text)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --memory: ")
    assert done.stderr.count("\n") == 1


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
    shape = shape_of(blank_model(source), torch.device("cpu"))
    assert (shape.layers, shape.hidden, shape.inner, shape.packed, shape.fused) == (3, 32, 128, False, False)
    times = measure_speed(source, settings().trials()[0], LENGTHS, torch.float32).times
    assert times is not None
    assert 0 < times.forward.first < times.training.first
    assert times.head_forward < times.head_training


def test_a_model_without_attention_has_a_shape_too():
    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4))
    shape = shape_of(model, torch.device("cpu"))
    assert (shape.layers, shape.hidden, shape.heads, shape.packed, shape.fused) == (2, 32, 1, False, False)


def test_what_was_measured_is_read_again(tiny_model, monkeypatch, tmp_path):
    monkeypatch.setenv("PAIRTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(speed, "STARVED", 1.1)  # other tests may use the CPUs
    source, trial = resolve_model(str(tiny_model)), settings().trials()[0]
    first = measure_speed(source, trial, LENGTHS, torch.float32)
    near = LENGTHS.model_copy(update={"prompt": LENGTHS.prompt + 1})
    assert measure_speed(source, trial, near, torch.float32, known=True).times == first.times
    (file,) = (tmp_path / "speed").iterdir()
    file.write_text("{", encoding="utf-8")
    assert measure_speed(source, trial, LENGTHS, torch.float32, known=True).times != first.times  # measured afresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_full_training_is_measured_whatever_dtype_the_config_names(tiny_model, monkeypatch, tmp_path, optimizer, dtype):
    monkeypatch.setenv("PAIRTUNE_CACHE", str(tmp_path / "cache"))
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    source = ModelSource("narrow", tmp_path, "folder", str(tmp_path))
    trial = settings(method="full", optimizer=optimizer).trials()[0]
    used = set()
    for kind in (speed.TrialOptimizer, speed.CompactOptimizer):
        made = lambda *given, kind=kind: used.add(kind) or kind(*given)  # noqa: E731
        monkeypatch.setattr(speed, kind.__name__, made)
    assert measure_speed(source, trial, LENGTHS, dtype).times is not None
    assert used == {CompactOptimizer if optimizer == "adamw-8bit" else TrialOptimizer}


def test_a_model_of_which_a_few_layers_do_not_fit_is_planned_without_its_time(tiny_model, monkeypatch):
    monkeypatch.setattr(speed, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(speed, "_few_layers", None)  # not even tried
    found = measure_speed(resolve_model(str(tiny_model)), settings().trials()[0], LENGTHS, torch.float32)
    assert (found.times, found.memory_free) == (None, 1000)


def test_what_a_busy_machine_measured_is_not_kept(tiny_model, monkeypatch, tmp_path):
    monkeypatch.setenv("PAIRTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(speed, "STARVED", 0.0)
    found = measure_speed(resolve_model(str(tiny_model)), settings().trials()[0], LENGTHS, torch.float32)
    assert found.times is not None
    assert not (tmp_path / "speed").exists()


def test_a_model_that_cannot_be_measured_has_no_time(tiny_model, monkeypatch, tmp_path):
    def unusual(source, layers):
        raise KeyError("sliding_window_pattern")

    monkeypatch.setenv("PAIRTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(speed, "_few_layers", unusual)
    found = measure_speed(resolve_model(str(tiny_model)), settings().trials()[0], LENGTHS, torch.float32)
    assert found.times is None
    planned = estimate(settings(), {"train": 10}, LENGTHS, SHAPE, found)
    assert (planned.seconds, time_range(planned)) == (None, "cannot be told for this model and machine")
    assert planned.fit.fits


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
    times = found["speed"]["times"]
    assert 0 < times["forward"]["first"] < times["training"]["first"]
    assert not (tmp_path / "run").exists()
    shown = pairtune("plan", *more).stdout
    assert "1 trial, 1 side by side" in shown
    refused = pairtune("plan", "--data", tmp_path / "missing.jsonl")
    assert (refused.returncode, "no such file" in refused.stderr) == (2, True)


@pytest.mark.slow
def test_a_plan_for_several_processes(tiny_model, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", range(30))
    more = (
        "--data",
        data,
        "--model",
        tiny_model,
        "--lr",
        "1e-4",
        "--beta",
        "0.1",
        "--method",
        "full",
        "--samples",
        "0",
    )
    one, two = (json.loads(pairtune("plan", *more, "--processes", count, "--json").stdout)["cost"] for count in (1, 2))
    assert one["fit"]["memory"] != two["fit"]["memory"]
    assert (one["seconds"] is None, two["seconds"]) == (False, None)
    shown = pairtune("plan", *more, "--processes", 2).stdout
    assert "memory is that of each of 2 processes; time depends on what connects them" in shown
    refused = pairtune("plan", *more, "--processes", 2, "--eval-dtype", "float32", "--dtype", "bfloat16")
    assert refused.returncode == 2
    assert "--eval-dtype float32: with --method full" in refused.stderr


def test_a_config_alone_is_enough_for_a_plan(tiny_model, tmp_path):
    """Without weights, without a tokenizer, and without data; the file may be named instead of its folder."""
    folder = tmp_path / "only"
    folder.mkdir()
    shutil.copy(tiny_model / "config.json", folder)
    for name in (folder, folder / "config.json"):
        done = pairtune("plan", "--model", name, "--memory", "6GB", "--dtype", "float32")
        assert done.returncode == 0, done.stderr
        assert "for 1,000 pairs of 1,024 tokens" in done.stdout
        assert "of 6.0 GB; float32, rows of 512 tokens, checkpointing off" in done.stdout
    for file in tiny_model.glob("*token*"):
        shutil.copy(file, folder)
    data = write_pairs(tmp_path / "pairs.jsonl", range(30))
    done = pairtune("plan", "--model", folder, "--data", data)
    assert done.returncode == 0, done.stderr
    assert "about 24 train, 3 validation, 3 test pairs" in done.stdout.replace("about 3", "3")
    (folder / "config.json").write_text('{"model_type": "no-such-model"}', encoding="utf-8")
    refused = pairtune("plan", "--model", folder)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_a_run_is_made_to_fit(tiny_model, tmp_path):
    """A budget for one trial of a grid of four: they are trained one after the other, and the settings say why."""
    data = write_pairs(tmp_path / "pairs.jsonl", range(30))
    grid = ("--lr", "1e-4", "--lr", "1e-3", "--beta", "0.1", "--beta", "0.2", "--epochs", "1", "--samples", "0")
    more = ("--model", tiny_model, "--data", data, *grid)
    planned = json.loads(pairtune("plan", *more, "--json").stdout)
    config = RunConfig(data=[str(data)], learning_rate=[1e-4, 1e-3], beta=[0.1, 0.2], samples=0)
    shape, lengths = ModelShape(**planned["shape"]), PairLengths(**planned["lengths"])
    needs = [
        sum(peak_memory(config, shape, 4, lengths, width=width, row_tokens=512, checkpointing=False).values())
        for width in (1, 2)
    ]
    out = tmp_path / "run"
    done = pairtune("tune", *more, "--out", out, "--memory", f"{sum(needs) / 2 / 2**20:.3f}MB", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "expected: " in done.stderr
    run = Run.finished(out)
    assert run.settings.side_by_side == 1
    assert "side_by_side: 1  # to fit --memory" in (out / "config.yaml").read_text(encoding="utf-8")
    assert {trial.record.side_by_side for trial in run.trials} == {1}
    refused = pairtune("tune", *more, "--out", tmp_path / "other", "--memory", "300MB")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: --memory 300MB: the run takes about 0.5 GB, more than")
    assert not (tmp_path / "other").exists()
