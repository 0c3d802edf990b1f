"""KL from the base: against a plain implementation, and as evaluations record it."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_pair, train_one

from pairtune.config import TrialConfig
from pairtune.data.table import PairTable
from pairtune.engine import divergence, native
from pairtune.engine.logps import token_kl
from pairtune.engine.packing import pack_pairs
from pairtune.engine.policy import STATES
from pairtune.engine.trial import TrialInputs, load_start
from pairtune.models.load import load_model, load_tuned, weights_fingerprint


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_kl_is_the_kl_of_whole_distributions(monkeypatch, softcap):
    monkeypatch.setattr("pairtune.engine.logps.CHUNK_LOGITS", 16 * 50)  # several chunks
    ours, base = torch.randn(40, 8), torch.randn(40, 8)
    head, other, bias = torch.randn(50, 8), torch.randn(50, 8), torch.randn(50)
    logits = [ours @ head.T + bias, base @ other.T]
    if softcap:
        logits = [torch.tanh(each / softcap) * softcap for each in logits]
    p, q = (torch.distributions.Categorical(logits=each) for each in logits)
    found = token_kl((ours, head, bias), (base, other, None), softcap=softcap)
    torch.testing.assert_close(found, torch.distributions.kl_divergence(p, q), rtol=1e-4, atol=1e-5)


def test_places_are_spread_over_an_answer(tiny_base):
    (ids,) = PairTable.of([make_pair(1, chosen="x" * 39, rejected="yes")], tiny_base.tokenizer).tokens([0])
    pack = pack_pairs([ids], torch.device("cpu"))
    chosen, rejected = pack.spaced_indices(STATES).view(2, -1).tolist()
    assert chosen == [number * len(ids.chosen) // STATES for number in range(STATES)]
    assert min(rejected) == len(ids.chosen)
    assert max(rejected) < len(ids.chosen) + len(ids.rejected)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_evaluations_have_the_kl_of_their_first_pairs(tiny_base, tmp_path, monkeypatch, method):
    monkeypatch.setattr(divergence, "PAIRS", 2)
    monkeypatch.setattr(native, "PAIRS", 2)
    pairs = [make_pair(number, rejected="No {0}" * (number % 3 + 1)) for number in range(9)]
    train, held = (PairTable.of(each, tiny_base.tokenizer) for each in (pairs[:6], pairs[6:]))
    config = TrialConfig(learning_rate=3e-3, beta=0.1, epochs=2, method=method, dtype="float32")
    start = weights_fingerprint(load_start(config, tiny_base))
    result, _, folder = train_one(native, config, TrialInputs(tiny_base, start, train, held, "eval_loss"), tmp_path)
    table = pq.read_table(folder.examples(result.best_epoch))
    kls = table["kl"].to_pylist()
    assert kls[2] is None
    assert result.best.kl == pytest.approx(sum(kls[:2]) / 2)
    tuned, base = load_tuned(folder.best, tiny_base), load_model(tiny_base.source, torch.float32)
    for number in range(2):
        assert kls[number] == pytest.approx(plain_kl(tuned, base, held.tokens([number])[0]), rel=1e-3)


@torch.no_grad()
def plain_kl(tuned, base, ids):
    """The same positions, with a separate row per model and answer."""
    found = []
    for answer in (ids.chosen, ids.rejected):
        row = torch.tensor([ids.prompt + answer])
        p, q = (
            torch.distributions.Categorical(logits=model(row).logits[0, len(ids.prompt) - 1 : -1])
            for model in (tuned, base)
        )
        every = torch.distributions.kl_divergence(p, q)
        found.append(every[[number * len(answer) // STATES for number in range(STATES)]].mean())
    return float(sum(found) / 2)


def test_a_model_has_no_divergence_from_itself(tiny_base, tmp_path):
    pairs = PairTable.of([make_pair(number) for number in range(4)], tiny_base.tokenizer)
    config = TrialConfig(learning_rate=1e-12, beta=0.1, epochs=1, dtype="float32")
    start = weights_fingerprint(load_start(config, tiny_base))
    inputs = TrialInputs(tiny_base, start, pairs[:2], pairs[2:], "eval_loss")
    result, lines, _ = train_one(native, config, inputs, tmp_path)
    assert result.best.kl == pytest.approx(0, abs=1e-6)
    assert json.dumps(lines[-1]["eval_kl"])
