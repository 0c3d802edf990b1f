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
from pairtune.engine.policy import Policy
from pairtune.engine.trial import BaseOutputs, TrialInputs, load_start
from pairtune.errors import RunFailed
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
        train.notices = lines.notices
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
    one, two = (load_file(next(f.paths.trial(name).best.glob("*.safetensors"))) for f in (folder, other_folder))
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


def test_shorter_rows_change_nothing_but_rounding(train):
    """Pairs of a batch share a row of 512 tokens, or have one each."""
    each = trial(batch_size=3)
    for row_tokens in (16, 100):
        short = train(f"rows-{row_tokens}", trial(batch_size=3, row_tokens=row_tokens))
        assert_same(train(f"long-{row_tokens}", each), short, each.name)


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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_that_memory_does_not_suffice_for_is_repeated_with_shorter_rows(train, monkeypatch, method, error):
    """Memory runs out at the second row of a step, when the gradients of the first are there."""
    trials = [trial(batch_size=3, method=method), trial(batch_size=3, method=method, beta=0.4)]
    trials = trials[: 1 if method == "full" else 2]
    plenty = train("plenty", *trials)
    forward, seen = Policy.answer_logps, []

    def scarce(policy, pack, **more):
        tokens = pack.input_ids.numel()
        if torch.is_grad_enabled():
            seen.append(tokens)
            if tokens > 70 or len(seen) == 5:  # a row of two pairs or more; and the second row of the fourth try
                raise error
        elif policy.trials == len(trials) and len(seen) > 5 and tokens > 70:
            raise error  # in an evaluation
        return forward(policy, pack, **more)

    monkeypatch.setattr(Policy, "answer_logps", scarce)
    tight = train("tight", *trials)
    for each in trials:
        assert_same(plenty, tight, each.name)
    assert max(seen[5:]) <= 70 < max(seen)
    notices = train.notices
    assert any(notice.startswith("memory ran out at step 1: the step is repeated") for notice in notices)
    assert any("memory ran out in the evaluation" in notice for notice in notices)


def test_reference_log_probs_are_computed_in_shorter_rows_where_memory_runs_out(train, monkeypatch, tmp_path):
    plenty, forward, refused = train("plenty", trial()), Policy.answer_logps, []

    def scarce(policy, pack, **more):
        if not policy.adapted and pack.input_ids.numel() > 150:  # three pairs or more
            refused.append(pack.pairs)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(policy, pack, **more)

    monkeypatch.setenv("PAIRTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pairtune.engine.reference._WITNESS_TOKENS", 64)
    monkeypatch.setattr(Policy, "answer_logps", scarce)
    assert_same(plenty, train("tight", trial(), base_outputs=BaseOutputs()), trial().name)
    assert refused
    assert any("the reference log-probs of the train pairs are computed with rows of" in each for each in train.notices)


def test_where_not_even_one_pair_fits_a_line_says_what_to_do(train, monkeypatch):
    def never(policy, pack, **more):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(policy, pack, **more)

    forward = Policy.answer_logps
    monkeypatch.setattr(Policy, "answer_logps", never)
    with pytest.raises(RunFailed, match="memory ran out with one pair at a time; lower --max-length"):
        train("never", trial())


def test_other_errors_are_not_taken_for_a_lack_of_memory(train, monkeypatch):
    def broken(policy, pack, **more):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Policy, "answer_logps", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        train("broken", trial())
