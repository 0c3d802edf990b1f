"""Trials side by side equal the trials one by one: the same steps, the same best epochs, the same adapters."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import Lines, make_pair
from safetensors.torch import load_file

from pairtune.config import TrialConfig
from pairtune.data.table import PairTable
from pairtune.engine import native
from pairtune.engine.trial import TrialInputs, load_start
from pairtune.models.load import weights_fingerprint
from pairtune.run.folder import Run

SAME = 1e-5
SHOWN = ("loss", "grad_norm", "learning_rate", "rewards/margins", "eval_loss", "eval_logps/chosen", "step", "epoch")


def trial(**changes):
    settings = {"learning_rate": 3e-3, "beta": 0.1, "epochs": 2, "dtype": "float32", "lora_rank": 4, **changes}
    return TrialConfig(**settings)


@pytest.fixture
def inputs(tiny_base):
    pairs = [make_pair(number, rejected="No {0}" * (number % 3 + 1)) for number in range(9)]
    tables = [PairTable.of(each, tiny_base.tokenizer) for each in (pairs[:7], pairs[7:])]
    return TrialInputs(tiny_base, weights_fingerprint(load_start(trial(), tiny_base)), *tables, "eval_loss")


@pytest.fixture
def train(inputs, tmp_path):
    def train(name, *trials, **changes):
        lines, run = Lines(), Run(tmp_path / name)
        results = native.run_trials(list(trials), replace(inputs, **changes), run, lines)
        return {result.trial.name: result for result in results}, lines.of, run

    return train


def assert_same(run, other, name, tolerance=SAME):
    (results, lines, folder), (other_results, other_lines, other_folder) = run, other
    assert len(lines[name]) == len(other_lines[name])
    for line, expected in zip(lines[name], other_lines[name], strict=True):
        assert line.keys() == expected.keys()
        for key in SHOWN:
            assert line.get(key, 0) == pytest.approx(expected.get(key, 0), abs=tolerance, rel=tolerance), (name, key)
    assert results[name].best_epoch == other_results[name].best_epoch
    assert results[name].status == other_results[name].status
    one, two = (load_file(f.paths.trial(name).best / "adapter_model.safetensors") for f in (folder, other_folder))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, two[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [2, 3])
def test_four_trials_side_by_side_are_four_trials(train, batch_size):
    trials = [
        trial(batch_size=batch_size, learning_rate=rate, beta=beta) for rate in (3e-3, 1e-3) for beta in (0.1, 0.5)
    ]
    together = train("together", *trials)
    for number, each in enumerate(trials):
        assert_same(together, train(str(number), each), each.name)


def test_trials_of_different_losses_epochs_and_clipping_run_side_by_side(train):
    trials = [
        trial(epochs=1),
        trial(epochs=3, loss="ipo", beta=0.2, max_grad_norm=0.01),
        trial(epochs=2, loss="sigmoid_norm", beta=0.3, label_smoothing=0.1),
        trial(epochs=3, loss="simpo", beta=2.0, sft_weight=0.5),
    ]
    together = train("together", *trials)
    assert [len(together[1][each.name]) for each in trials] == [5, 15, 10, 15]
    for number, each in enumerate(trials):
        assert_same(together, train(str(number), each), each.name)


def test_dropout_is_the_same_side_by_side(train):
    trials = [trial(lora_dropout=0.3), trial(lora_dropout=0.3, beta=0.2), trial(lora_dropout=0.3, beta=0.4)]
    together = train("together", *trials)
    for number, each in enumerate(trials):
        assert_same(together, train(str(number), each), each.name)
    assert train("without", trial())[1][trial().name][2]["loss"] != together[1][trial().name][2]["loss"]


def test_a_trial_that_fails_leaves_the_others_alone(train):
    trials = [trial(beta=0.2), trial(learning_rate=1e25), trial(beta=0.4)]
    together = train("together", *trials)
    results = together[0]
    assert [results[each.name].status for each in trials] == ["finished", "failed", "finished"]
    assert "at step 2" in results[trials[1].name].reason
    for number, each in enumerate((trials[0], trials[2])):
        assert_same(together, train(str(number), each), each.name)


def test_a_trial_stops_when_its_patience_is_over(train, inputs):
    """Validation answers are swapped, so that every epoch is worse than the previous one."""
    swapped = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in inputs.validation]
    worse = PairTable.of(swapped, inputs.base.tokenizer)
    trials = [trial(epochs=6, patience=2, beta=1.0), trial(epochs=4, beta=1.0, learning_rate=2e-3)]
    results, lines, _ = train("together", *trials, validation=worse)
    patient, other = (results[each.name] for each in trials)
    assert [row.epoch for row in patient.epochs] == [1, 2, 3]
    assert (patient.best_epoch, patient.status) == (1, "finished")
    assert len(other.epochs) == 4
    alone = train("alone", trials[1], validation=worse)
    assert_same((results, lines, _), alone, trials[1].name)


def test_the_result_says_with_how_many_others_time_was_shared(train):
    results, *_ = train("together", trial(), trial(beta=0.2))
    assert {result.side_by_side for result in results.values()} == {2}
    assert all(math.isclose(result.train_pairs, 14) for result in results.values())


def test_less_memory_makes_narrower_groups(inputs, monkeypatch):
    widths = []
    for megabytes in (0, 4, 8, 64_000):
        monkeypatch.setattr("pairtune.engine.memory.free_bytes", lambda device, free=megabytes << 20: free)
        widths.append(native.width(trial(), inputs, None))
    assert widths == sorted(widths)
    assert (widths[0], widths[-1]) == (1, 4)
    assert native.width(trial(), inputs, 3) == 3
    assert native.width(trial(method="full"), inputs, 3) == 1
