"""One trial with each engine: pristine start, exact per-example numbers, and the best epoch's weights on disk."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import evaluation, make_pair, train_one

from pairtune.config import TrialConfig
from pairtune.data.preference import PreferencePair
from pairtune.data.table import PairTable
from pairtune.engine import native, trl
from pairtune.engine.summaries import EXAMPLE_METRICS, mean_metrics, score
from pairtune.engine.trial import BaseOutputs, TrialInputs, load_start
from pairtune.errors import RunFailed
from pairtune.files import saved_fingerprint
from pairtune.models.load import load_model, load_tuned, weights_fingerprint
from pairtune.run.examples import Examples

TRAIN = [make_pair(number) for number in range(5)]
HELD = [make_pair(number, rejected="No." * (number % 3 + 1) + "{}") for number in range(20, 23)]


def trial(**changes):
    settings = {"learning_rate": 5e-3, "beta": 0.1, "epochs": 2, "dtype": "float32", "lora_rank": 4, **changes}
    return TrialConfig(**settings)


@pytest.fixture
def inputs(tiny_base):
    start = weights_fingerprint(load_start(trial(), tiny_base))
    train, held = (PairTable.of(pairs, tiny_base.tokenizer) for pairs in (TRAIN, HELD))
    return TrialInputs(tiny_base, start, train, held, "eval_loss")


@pytest.fixture(params=[native, trl], ids=["pairtune", "trl"])
def engine(request):
    return request.param


@pytest.fixture
def run(engine):
    return partial(train_one, engine)


def sequence_logps(model, tokenizer, pair: PreferencePair) -> tuple[float, float]:
    """Log-probs of chosen and rejected, summed over the answer's tokens, computed one sequence at a time."""
    values = []
    prompt = tokenizer.apply_chat_template(list(pair.prompt), add_generation_prompt=True, return_dict=True)["input_ids"]
    for answer in (pair.chosen, pair.rejected):
        turns = [*pair.prompt, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        values.append(sum(logps[place - 1, ids[place]].item() for place in range(len(prompt), len(ids))))
    return values[0], values[1]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_first_step_is_the_base_model_itself(run, inputs, tmp_path, method):
    result, lines, _ = run(trial(method=method, learning_rate=1e-3), inputs, tmp_path)
    first = lines[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["rewards/margins"], first["rewards/chosen"], first["rewards/rejected"]) == (0, 0, 0)
    assert result.base_fingerprint == inputs.base_fingerprint
    assert [line["step"] for line in lines if "eval_loss" not in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shared_reference_is_the_base_to_the_last_bit(run, inputs, tmp_path, dtype):
    """With a negligible learning rate, every pair of every epoch has margin 0, in any order."""
    base = replace(inputs.base, dtype=getattr(torch, dtype))
    start = weights_fingerprint(load_start(trial(), base))
    inputs = replace(inputs, base=base, base_fingerprint=start, base_outputs=BaseOutputs())
    for beta in (0.1, 0.5):  # the second trial reads what the first has computed
        _, lines, _ = run(trial(learning_rate=1e-30, beta=beta), inputs, tmp_path / str(beta))
        assert [line.get("rewards/margins", line.get("eval_rewards/margins")) for line in lines] == [0] * 8


def test_two_trials_in_a_row_are_the_same_trial(run, inputs, tmp_path):
    first, first_lines, _ = run(trial(), inputs, tmp_path / "a")
    second, second_lines, _ = run(trial(), inputs, tmp_path / "b")
    assert first_lines == second_lines
    assert first.best_fingerprint == second.best_fingerprint


def test_a_trial_that_inherits_trained_weights_stops_the_run(run, inputs, tmp_path, monkeypatch):
    """The assignment's fault: one model object for all trials."""
    shared = load_model(inputs.base.source, torch.float32)
    monkeypatch.setattr("pairtune.engine.trial.load_start", lambda *_, **more: shared)
    run(trial(method="full"), inputs, tmp_path / "a")
    with pytest.raises(RunFailed, match="its starting weights .* are not the base model's"):
        run(trial(method="full", beta=0.2), inputs, tmp_path / "b")


def test_a_trial_that_inherits_an_adapter_stops_the_run(run, inputs, tmp_path, monkeypatch):
    shared = load_model(inputs.base.source, torch.float32)
    monkeypatch.setattr("pairtune.engine.trial.load_start", lambda *_, **more: shared)
    run(trial(), inputs, tmp_path / "a")
    with pytest.raises(RunFailed, match="its starting weights"):
        run(trial(beta=0.2), inputs, tmp_path / "b")


def test_a_policy_that_is_not_the_reference_at_the_start_stops_the_run(engine, run, inputs, tmp_path, monkeypatch):
    """B starts as noise."""
    if engine is trl:
        lora = trl._lora

        def wrong(config):
            adapter = lora(config)
            adapter.init_lora_weights = False
            return adapter

        monkeypatch.setattr(trl, "_lora", wrong)
    else:
        add_adapters = native.add_adapters

        def wrong(*arguments):
            adapted = add_adapters(*arguments)
            for layer in adapted.values():
                torch.nn.init.normal_(layer.lora_b)
            return adapted

        monkeypatch.setattr(native, "add_adapters", wrong)
    with pytest.raises(RunFailed, match="an adapter is not zero before|policy and reference are not the same model"):
        run(trial(), inputs, tmp_path)


def test_trl_uses_one_gpu_of_several(inputs, tmp_path, monkeypatch):
    """Otherwise transformers would split each pass among them through DataParallel."""

    class OnFour(trl.DPOConfig):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 4

    monkeypatch.setattr(trl, "DPOConfig", OnFour)
    config = TrialConfig(learning_rate=1e-3, beta=0.1, dtype="float32")
    assert OnFour(output_dir=str(tmp_path), use_cpu=True, bf16=False).n_gpu == 4
    assert trl._arguments(config, inputs, tmp_path).n_gpu == 1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_saved_is_the_epoch_that_the_table_names(run, inputs, tmp_path, method):
    """Validation answers are swapped, so that training makes them worse: the last epoch is not the best."""
    swapped = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in HELD]
    config = trial(method=method, learning_rate=2e-3 if method == "lora" else 2e-4, epochs=3, beta=1.0)
    result, _, folder = run(config, replace(inputs, validation=PairTable.of(swapped, inputs.base.tokenizer)), tmp_path)
    losses = {row.epoch: row.eval_loss for row in result.epochs}
    assert losses[1] < losses[2] < losses[3]
    assert result.best_epoch == 1
    assert result.best_fingerprint == saved_fingerprint(folder.best)

    tuned, base = load_tuned(folder.best, inputs.base), load_model(inputs.base.source, torch.float32)
    recomputed = []
    for pair in swapped:
        chosen, rejected = sequence_logps(tuned, inputs.base.tokenizer, pair)
        reference_chosen, reference_rejected = sequence_logps(base, inputs.base.tokenizer, pair)
        margin = config.beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
        recomputed.append(math.log1p(math.exp(-margin)))
    assert math.fsum(recomputed) / len(recomputed) == pytest.approx(losses[result.best_epoch], abs=2e-4)


def test_every_evaluation_is_on_disk_per_example_and_its_means_are_the_tables(run, inputs, tmp_path):
    result, lines, folder = run(trial(), inputs, tmp_path)
    for row in result.epochs:
        records = pq.read_table(folder.examples(row.epoch)).to_pylist()
        assert [record["origin"] for record in records] == [pair.origin for pair in HELD]
        for record in records:
            assert record["rewards/margins"] == pytest.approx(
                record["rewards/chosen"] - record["rewards/rejected"], abs=1e-5
            )
            assert record["loss"] == pytest.approx(math.log1p(math.exp(-record["rewards/margins"])), abs=1e-5)
        means = mean_metrics(Examples.read(folder.examples(row.epoch)))
        assert {name: row.metric(name) for name in means} == means
        for name in EXAMPLE_METRICS:
            assert means[f"eval_{name}"] == math.fsum(record[name] for record in records) / len(records)
    assert [line for line in lines if "eval_loss" in line] == [row.metrics() for row in result.epochs]


def test_the_training_loss_of_an_epoch_is_the_mean_over_pairs_not_over_batches(run, inputs, tmp_path):
    result, lines, _ = run(trial(), inputs, tmp_path)  # 5 pairs in batches of 2: the last batch has one
    steps = [line["loss"] for line in lines if "eval_loss" not in line]
    assert result.epochs[0].loss == pytest.approx((2 * steps[0] + 2 * steps[1] + steps[2]) / 5, abs=1e-12)
    alone = next(line for line in lines if line["step"] == 3)
    assert alone["loss"] == pytest.approx(math.log1p(math.exp(-alone["rewards/margins"])), abs=1e-6)
    assert result.epochs[1].loss == pytest.approx((2 * steps[3] + 2 * steps[4] + steps[5]) / 5, abs=1e-12)


def test_trial_json_names_everything(run, inputs, tmp_path):
    result, _, folder = run(trial(), inputs, tmp_path)
    record = json.loads(folder.record.read_text())
    assert record["config"]["learning_rate"] == 5e-3
    assert record["status"] == "finished"
    assert record["metrics"] == result.best.metrics() == record["epochs"][record["best_epoch"] - 1]
    assert record["train_pairs_per_second"] > 0
    assert record["train_seconds"] > 0
    assert record["peak_memory_mb"] > 0


def test_a_loss_that_is_no_number_fails_the_trial_with_its_step(run, inputs, tmp_path):
    result, _, folder = run(trial(method="full", learning_rate=1e25), inputs, tmp_path)
    assert result.status == "failed"
    assert re.search(r"the loss became (nan|inf).* at step 2", result.reason)
    assert json.loads(folder.record.read_text())["status"] == "failed"


def test_a_first_step_without_a_gradient_fails_the_trial(inputs, tmp_path, monkeypatch):
    flat = "pairtune.engine.scoring.pair_loss"
    monkeypatch.setattr(flat, lambda name, pairs, settings: pairs.chosen * 0 + math.log(2))
    result = train_one(native, trial(), inputs, tmp_path)[0]
    assert result.status == "failed"
    assert "the gradient of step 1 is 0 (pairs test:" in result.reason


def test_later_steps_without_a_gradient_are_counted(run, inputs, tmp_path):
    """A hinge loss is satisfied by every pair after a few steps."""
    result, _, folder = run(trial(loss="hinge", beta=5.0, learning_rate=0.05, epochs=6), inputs, tmp_path)
    record = json.loads(folder.record.read_text())
    assert record["steps_without_gradient"] == result.steps_without_gradient > 0


def test_a_trial_that_breaks_down_keeps_its_last_weights_and_names_the_pairs(inputs, tmp_path):
    result, _, folder = train_one(native, trial(learning_rate=1e25), inputs, tmp_path)
    assert re.search(r"at step 2 \(pairs test:\d, test:\d\)", result.reason)
    assert (folder.root / "failed" / "adapter_model.safetensors").is_file()


def test_means_and_scores_by_hand():
    records = [dict.fromkeys(EXAMPLE_METRICS, value) for value in (1.0, 2.0, 6.0)]
    examples = Examples.of(pa.array(["a", "b", "c"]), [0, 1, 2], {}, records)
    assert mean_metrics(examples) == {f"eval_{name}": 3.0 for name in EXAMPLE_METRICS}
    metrics = evaluation(eval_loss=0.5, accuracy=0.75, margin=2.0)
    assert [score(metrics, rule) for rule in ("eval_loss", "accuracy", "margin")] == [-0.5, 0.75, 2.0]
