"""Full training with 8-bit moments and split masters: the arithmetic of bitsandbytes and of float32 masters."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from conftest import Lines, make_pair, pairtune, small_run, train_one, write_pairs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pairtune.config import RunConfig, TrialConfig
from pairtune.data.table import PairTable
from pairtune.engine import compact, native
from pairtune.engine.compact import CompactOptimizer, CompactWeights
from pairtune.engine.optimize import FullWeights, TrialOptimizer
from pairtune.engine.trial import TrialInputs, load_start
from pairtune.errors import BadInput
from pairtune.footprint import ModelShape, PairLengths, training_memory
from pairtune.models.load import LoadedBase, weights_fingerprint
from pairtune.resolve_config import resolve

RATE, STEPS = 1e-2, 6


def trial(**changes) -> TrialConfig:
    settings = {"learning_rate": RATE, "beta": 0.1, "method": "full", "optimizer": "adamw-8bit", "max_grad_norm": 1e9}
    return TrialConfig(**{**settings, **changes})


def layers() -> nn.Module:
    """A matrix whose numbers do not fill its last block, a smaller one, and a bias."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(101, 97), nn.Linear(97, 5))


def give_gradients(model: nn.Module, step: int) -> None:
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + number)
        grad = torch.randn(parameter.shape, generator=generator) * 0.01 + 0.004
        parameter.grad = grad.to(parameter.dtype)


def train(model: nn.Module, dtype: torch.dtype, **changes) -> CompactOptimizer:
    weights = CompactWeights(model, dtype)
    model.to(dtype)
    optimizer = CompactOptimizer(trial(**changes), weights, STEPS)
    for step in range(STEPS):
        give_gradients(model, step)
        weights.collect_gradients()
        optimizer.clip()
        optimizer.update()
    return optimizer


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1), st.lists(st.integers(0, 2**15 - 1)))
def test_a_split_master_is_a_cast_and_what_it_loses(numbers: list[float], halves: list[int]):
    ties = (torch.tensor(halves, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    masters = torch.cat([torch.tensor(numbers, dtype=torch.float32), ties, -ties])
    masters = masters[masters.isfinite() & masters.bfloat16().isfinite()]
    rounded, rest = torch.empty_like(masters, dtype=torch.bfloat16), torch.empty_like(masters, dtype=torch.int16)
    compact._split(masters, rounded, rest)
    assert torch.equal(rounded.view(torch.int16), masters.bfloat16().view(torch.int16))
    apart = compact._joined(rounded, rest).view(torch.int32) - masters.view(torch.int32)
    tie = masters.view(torch.int32) & 0x1FFFF == 0x8000
    assert torch.equal(apart, -tie.to(torch.int32))


def test_updates_are_those_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch):
    """Whatever is updated at once; its small tensors have float32 moments as well."""
    monkeypatch.setattr(compact, "_AT_ONCE", 1024)
    ours, theirs = layers(), layers()
    train(ours, torch.float32)
    optimizer = AdamW8bit(theirs.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        give_gradients(theirs, step)
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-6)
    assert torch.equal(ours[0].weight, theirs[0].weight)


def test_updates_are_near_those_of_float32_moments():
    ours, exact = layers(), layers()
    train(ours, torch.float32)
    masters = FullWeights(exact, torch.float32)
    optimizer = TrialOptimizer(trial(optimizer="adamw"), masters.tensors, STEPS)
    before = layers()
    for step in range(STEPS):
        give_gradients(exact, step)
        masters.collect_gradients()
        optimizer.clip()
        optimizer.update()
    for start, mine, other in zip(before.parameters(), ours.parameters(), exact.parameters(), strict=True):
        moved, apart = (other - start).abs().mean(), (mine - other).abs().mean()
        assert apart < 0.02 * moved
    assert torch.allclose(ours[1].weight, exact[1].weight, rtol=0, atol=1e-6), "small tensors have float32 moments"


def test_small_updates_are_not_lost_in_bfloat16():
    """A step of 1e-5 is far below bfloat16's 4e-3 around 1; the masters add them up."""
    model = nn.Linear(64, 64, bias=False)
    nn.init.ones_(model.weight)
    weights = CompactWeights(model, torch.bfloat16)
    model.to(torch.bfloat16)
    optimizer = CompactOptimizer(trial(learning_rate=1e-5), weights, 10**9)
    for _ in range(400):
        model.weight.grad = torch.ones_like(model.weight)
        weights.collect_gradients()
        optimizer.clip()
        optimizer.update()
    (rest,) = weights.rests
    assert rest is not None
    masters = compact._joined(model.weight.data.view(-1), rest.view(-1))
    assert masters.mean().item() == pytest.approx(1 - 400 * 1e-5, abs=2e-5)
    assert model.weight.float().mean().item() == pytest.approx(1 - 400 * 1e-5, abs=2e-3)


def test_in_bfloat16_the_weights_are_a_cast_of_the_masters():
    """The masters follow the float32 run, but for its gradients, which are rounded."""
    ours, exact = layers(), layers()
    optimizer = train(ours, torch.bfloat16)
    train(exact, torch.float32)
    for mine, rest, other in zip(ours.parameters(), optimizer.compact.rests, exact.parameters(), strict=True):
        assert rest is not None
        masters = compact._joined(mine.data.view(-1), rest.view(-1)).view(other.shape)
        assert torch.equal(masters.bfloat16(), mine)
        assert (masters - other).abs().max() < RATE * STEPS * 0.05


def test_clipping_is_torchs():
    ours, theirs = layers(), layers()
    weights = CompactWeights(ours, torch.float32)
    optimizer = CompactOptimizer(trial(max_grad_norm=0.1), weights, STEPS)
    give_gradients(ours, 0)
    give_gradients(theirs, 0)
    weights.collect_gradients()
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1).item()
    assert optimizer.clip() == pytest.approx(expected, rel=1e-6)
    for parameter, mine in zip(theirs.parameters(), weights.grads, strict=True):
        assert mine is not None
        assert torch.allclose(mine * optimizer._clipping, parameter.grad, rtol=1e-5)


def test_gradients_of_several_rows_are_added_in_float32():
    model = nn.Linear(64, 64, bias=False)
    weights = CompactWeights(model, torch.bfloat16)
    model.to(torch.bfloat16)
    for part in [1.0] + [1 / 512] * 256:
        model.weight.grad = torch.full_like(model.weight, part)
        weights.collect_gradients()
    (total,) = weights.grads
    assert total is not None
    assert total.dtype == torch.float32
    assert torch.equal(total, torch.full_like(total, 1.5))
    weights.forget_gradients()
    assert weights.grads == [None]


def inputs_of(base: LoadedBase, tiny_base: LoadedBase) -> TrialInputs:
    pairs = [make_pair(number, rejected="No {0}" * (number % 3 + 1)) for number in range(7)]
    tables = [PairTable.of(each, tiny_base.tokenizer) for each in (pairs[:5], pairs[5:])]
    return TrialInputs(base, weights_fingerprint(load_start(trial(), base)), *tables, "eval_loss", checkpoint_steps=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trial_follows_the_one_with_float32_moments(tiny_base: LoadedBase, tmp_path: Path, dtype: str):
    base = replace(tiny_base, dtype=getattr(torch, dtype))
    lines = {}
    for optimizer in ("adamw", "adamw-8bit"):
        config = trial(learning_rate=1e-3, epochs=2, dtype=dtype, optimizer=optimizer)
        result, lines[optimizer], _ = train_one(native, config, inputs_of(base, tiny_base), tmp_path / optimizer)
        assert result.status == "finished", result.reason
    for mine, exact in zip(lines["adamw-8bit"], lines["adamw"], strict=True):
        for name in ("loss", "eval_loss"):
            if name in exact:
                assert mine[name] == pytest.approx(exact[name], abs=0.01)
    assert lines["adamw-8bit"][-1]["eval_loss"] != lines["adamw-8bit"][0]["loss"]


def test_the_state_goes_on_to_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    for dtype in (torch.float32, torch.bfloat16):
        model = layers()
        optimizer = train(model, dtype)
        kept = {name: tensor.clone() for name, tensor in optimizer.state().items()}
        again = copy.deepcopy(layers())
        weights = CompactWeights(again, dtype)
        again.to(dtype)
        other = CompactOptimizer(trial(), weights, STEPS)
        other.restore(STEPS, kept)
        assert all(torch.equal(tensor, kept[name]) for name, tensor in other.state().items())
        assert other.learning_rate == optimizer.learning_rate == 0


def test_the_assignments_model_fits_a_card_of_six_gigabytes():
    """Qwen2-0.5B, two pairs whose answers have 1,024 tokens with their prompts, in bfloat16 on an accelerator."""
    shape = ModelShape(
        parameters=494_032_768,
        layers=24,
        hidden=896,
        inner=4864,
        heads=14,
        queries=896,
        keys=128,
        adapter_weights=750_000,
        vocabulary=151_936,
        accelerator=True,
    )

    def memory(optimizer: str) -> float:
        config, lengths = trial(optimizer=optimizer, batch_size=2), PairLengths.full(1024)
        parts = training_memory(shape, config, 2, lengths, width=1, row_tokens=8192, checkpointing=True)
        return sum(parts.values())

    # 16 bytes of masters, moments and sums of gradients, and 2 of a row's, against 2 + 2 + 2 and scales.
    assert (memory("adamw") - memory("adamw-8bit")) / shape.parameters == pytest.approx(18 - 6 - 8 / 256, abs=0.01)
    assert memory("adamw-8bit") < 6 * 2**30 < memory("adamw")


def test_it_is_for_all_weights(tiny_model: Path, tmp_path: Path):
    data = str(write_pairs(tmp_path / "pairs.jsonl", range(8)))
    with pytest.raises(BadInput, match="--optimizer: is for --method full"):
        resolve(None, {"data": [data], "optimizer": "adamw-8bit"})
    with pytest.raises(BadInput, match="--engine: has AdamW with float32 moments"):
        resolve(None, {"data": [data], "optimizer": "adamw-8bit", "method": "full", "engine": "trl"})
    config: RunConfig = resolve(None, {"data": [data], "optimizer": ["adamw", "adamw-8bit"], "method": "full"}).config
    assert [each.optimizer for each in config.trials()][:2] == ["adamw", "adamw-8bit"]


def test_a_whole_run_and_its_evaluation(tiny_model: Path, tmp_path: Path):
    run = small_run(tiny_model, tmp_path, method="full", optimizer="adamw-8bit", learning_rate=[1e-3])
    assert run.selection is not None
    held = write_pairs(tmp_path / "other.jsonl", range(60, 66))
    done = pairtune("eval", run.root, "--data", held, "--samples", "0")
    assert done.returncode == 0, done.stderr


def test_lines_are_logged_as_always(tiny_base: LoadedBase, tmp_path: Path):
    lines = Lines()
    from pairtune.run.folder import Run

    native.run_trials([trial(learning_rate=1e-3, epochs=1)], inputs_of(tiny_base, tiny_base), Run(tmp_path), lines)
    (logged,) = lines.of.values()
    assert logged[0]["learning_rate"] == pytest.approx(1e-3)
    assert logged[0]["grad_norm"] > 0
