"""Rows computed whole, as on accelerators, on the CPU: the layout, attention through it, and training with it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import Lines, make_pair
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_lockstep import assert_same, trial

from pairtune.data.table import PairTable, TokenIds
from pairtune.engine import native, packing, reference, rounding
from pairtune.engine import policy as policies
from pairtune.engine.checkpoint import read_state
from pairtune.engine.packed_attention import packed_attention
from pairtune.engine.packing import Segment, pack_pairs
from pairtune.engine.policy import Policy
from pairtune.engine.rounding import measure_rounding
from pairtune.engine.row_layout import row_layout
from pairtune.engine.trial import BaseOutputs, TrialInputs, load_start
from pairtune.errors import Interrupted
from pairtune.models.load import weights_fingerprint
from pairtune.run.folder import Run

CPU = torch.device("cpu")
parts = st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))


@pytest.fixture
def whole_rows(monkeypatch):
    """Compute as on an accelerator."""

    def switch(on=True):
        for module in (packing, policies, reference, rounding):
            monkeypatch.setattr(module, "takes_whole_rows", lambda device: on)

    switch()
    return switch


@given(st.lists(parts, min_size=1, max_size=5), st.integers(0, 4), st.sampled_from([None, 1, 4]))
def test_sequences_and_mask_see_what_each_pair_sees_alone(segments, padding, window):
    """Both ways of attention, computed from their definitions, against the CPU's attention of the pairs."""
    layout, generator = row_layout(segments, padding), torch.Generator().manual_seed(0)
    tokens = sum(map(sum, segments)) + padding
    query, key, value = (torch.randn(1, tokens, 2, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    by_head = [each.transpose(1, 2)[:, :, : tokens - padding] for each in (query, key, value)]
    each = tuple(Segment(*part) for part in segments)
    expected, _ = packed_attention(None, *by_head, None, segments=each, sliding_window=window)
    whole = layout.attend(query, key, value, 8**-0.5, window, None)
    torch.testing.assert_close(whole[:, : tokens - padding], expected)

    taken = [each[0].index_select(0, layout.keys) for each in (key, value)]
    result = torch.full_like(query[0], torch.nan)
    starts = list(zip(layout.query_starts.tolist(), layout.key_starts.tolist(), strict=True))
    assert starts[-1] == (tokens, 2 * tokens)
    for (first, first_key), (end, end_key) in pairwise(starts):
        # As the flash kernels define it: the last query sees the last key.
        at = torch.arange(first, end)[:, None] - end + end_key
        distance = at - torch.arange(first_key, end_key)
        hidden = (distance < 0) | (distance >= (window or tokens + 1))
        keys, values = (each[first_key:end_key].transpose(0, 1) for each in taken)
        scores = query[0, first:end].transpose(0, 1) @ keys.mT * 8**-0.5
        result[first:end] = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)
    torch.testing.assert_close(result[None, : tokens - padding], expected)

    # A token's own key and its copy are where the layout says; so its gradient is the sum of both.
    assert layout.keys[layout.places].tolist() == list(range(tokens))
    counts = torch.ones(tokens) + layout.copied
    used = layout.key_starts[2 * len(segments) + 1].item()
    assert torch.equal(torch.bincount(layout.keys[:used], minlength=tokens).float(), counts)
    assert all(layout.keys[copy] == token for token, copy in enumerate(layout.copies.tolist()) if copy)


def test_a_row_is_padded_to_one_of_a_few_lengths(whole_rows):
    lengths = {packing._even_length(tokens) for tokens in range(1, 4097)}
    assert len(lengths) == 24
    assert all(tokens <= packing._even_length(tokens) <= max(tokens + 63, 1.25 * tokens) for tokens in range(1, 20_000))
    pack = pack_pairs([TokenIds([1, 2, 3], [4, 5], [6, 7, 8]), TokenIds([9], [10], [11])], CPU)
    assert (pack.input_ids.shape, pack.positions.shape, pack.padding) == ((1, 64), (1, 64), 64 - 7)
    assert pack.input_ids[0, :8].tolist() == [1, 2, 3, 4, 6, 7, 9, 0]
    assert pack.positions[0, :8].tolist() == [0, 1, 2, 3, 3, 4, 0, 0]


@pytest.fixture
def inputs(tiny_base):
    pairs = [make_pair(number, rejected="No {0}" * (number % 3 + 1)) for number in range(9)]
    tables = [PairTable.of(each, tiny_base.tokenizer) for each in (pairs[:7], pairs[7:])]
    return TrialInputs(tiny_base, weights_fingerprint(load_start(trial(), tiny_base)), *tables, "eval_loss")


@pytest.fixture
def train(inputs, tmp_path):
    def train(name, *trials):
        lines, run = Lines(), Run(tmp_path / name)
        results = native.run_trials(list(trials), replace(inputs, base_outputs=BaseOutputs()), run, lines)
        return {result.trial.name: result for result in results}, lines.of, run

    return train


@pytest.mark.parametrize("changes", [{}, {"checkpointing": "on"}, {"lora_dropout": 0.5}, {"method": "full"}])
def test_training_is_the_same_in_whole_rows(train, whole_rows, changes):
    trials = [trial(**changes, epochs=1), trial(**changes, beta=0.5)][: 1 if "method" in changes else 2]
    whole = train("whole", *trials)
    whole_rows(False)
    pairs = train("pairs", *trials)
    for each in trials:
        # Dropout draws the same for a pair, whatever row it is in.
        assert_same(whole, pairs, each.name)


def test_padded_rows_train_the_same_with_all_adapters_in_one_tensor(train, whole_rows, monkeypatch):
    monkeypatch.setattr(policies, "PACKED_FAMILIES", frozenset())
    trials = [trial(epochs=1), trial(beta=0.5)]
    whole = train("whole", *trials)
    whole_rows(False)
    for each in trials:
        assert_same(whole, train(each.name, each), each.name)


def test_a_run_goes_on_from_a_checkpoint_of_the_other_kind(inputs, train, whole_rows, tmp_path):
    """The checkpoint has the same tensors, whether the weights lie in one tensor or in many."""
    trials = [trial(beta=0.2), trial(beta=0.5)]
    straight, run, stops = train("straight", *trials), Run(tmp_path / "stopped"), iter([False] * 3 + [True] * 9)
    with pytest.raises(Interrupted):
        native.run_trials(trials, replace(inputs, stopping=lambda: next(stops)), run, Lines())
    assert read_state(run.paths.checkpoint).step > 0
    whole_rows(False)
    native.run_trials(trials, replace(inputs, base_outputs=BaseOutputs()), run, Lines())
    for each in trials:
        one, two = (
            load_file(folder.paths.trial(each.name).best / "adapter_model.safetensors") for folder in (run, straight[2])
        )
        for key, tensor in one.items():
            torch.testing.assert_close(tensor, two[key], atol=1e-5, rtol=1e-4)


def test_rounding_is_measured_among_many_pairs_and_is_never_below_float32s(inputs, whole_rows, monkeypatch):
    """Where nothing shows that products are exact, equal margins of a few pairs do not show it either."""
    policy, seen = Policy(load_start(trial(), inputs.base)), []
    own = Policy.answer_logps
    monkeypatch.setattr(Policy, "answer_logps", lambda self, pack: seen.append(pack.pairs) or own(self, pack))
    found = measure_rounding(policy, 2, inputs.train, "x")
    assert not policy.products.exact
    assert max(seen) == len(inputs.train)
    with torch.no_grad():
        largest = max(own(policy, pack).logps.abs().max() for pack in policy.rows(inputs.train.tokens(range(7)), 1))
    assert found.between_rows >= 2**-23 * largest.item() > 0
