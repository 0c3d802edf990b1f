"""On a CUDA GPU: `make test-gpu`. The same results as on the CPU, and what only a GPU has: flash attention, graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import Lines, make_pair, small_run
from test_lockstep import assert_same, trial
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

from pairtune.data.table import PairTable, TokenIds
from pairtune.engine import native
from pairtune.engine import row_layout as layouts
from pairtune.engine.lora import LoraSettings, add_adapters
from pairtune.engine.packing import pack_pairs
from pairtune.engine.policy import Policy
from pairtune.engine.row_graphs import RowGraphs
from pairtune.engine.row_layout import row_layout
from pairtune.engine.trial import BaseOutputs, TrialInputs, load_start
from pairtune.models.load import weights_fingerprint
from pairtune.run.folder import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "mistral": MistralConfig(**SMALL, sliding_window=9),
    "gemma2": Gemma2Config(**SMALL, head_dim=16, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
}


def some_pairs(count, longest=40):
    generator = torch.Generator().manual_seed(count)

    def draw(least):
        length = int(torch.randint(least, longest, (), generator=generator))
        return torch.randint(0, 300, (length,), generator=generator).tolist()

    return [TokenIds(draw(1), draw(1), draw(1)) for _ in range(count)]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("trials", [1, 3])
@pytest.mark.parametrize("segments", [[(20, 9, 0), (1, 0, 5), (30, 0, 0), (4, 60, 70)], [(3, 1, 1)] * 40])
def test_flash_attention_is_attention_with_a_mask(segments, trials, window, monkeypatch):
    padding = 13
    tokens = sum(map(sum, segments)) + padding
    torch.manual_seed(0)
    inputs = [torch.randn(trials, tokens, heads, 64, device=GPU, dtype=torch.bfloat16) for heads in (6, 2, 2)]
    factors = torch.randn(trials, tokens, 6, 64, device=GPU)
    factors[:, tokens - padding :] = 0
    results, whole = [], row_layout(segments, padding)
    for flash in (True, False):
        layout = whole.with_tensors([each.to(GPU) for each in whole.tensors()])
        leaves = [each.clone().float().to(each.dtype if flash else torch.float32).requires_grad_() for each in inputs]
        assert layouts._flash_runs(leaves[0], leaves[2], None) == flash
        mixed = layout.attend(*leaves, 0.125, window, None)
        (mixed * factors).sum().backward()
        results.append([mixed[:, : tokens - padding], *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all()
        assert (one.float() - other).norm() <= 0.01 * other.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_the_cpus(family):
    pairs, found = some_pairs(5), []
    for device in (CPU, GPU):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(FAMILIES[family]).float()
        adapted = add_adapters(model, LoraSettings(rank=4), [0, 1])
        for number, layer in enumerate(adapted.values()):
            torch.manual_seed(number)
            layer.lora_b.data.normal_(std=0.1)
        policy = Policy(model.to(device), adapted, 2)
        answers = policy.answer_logps(pack_pairs(pairs, device), keep_states=True)
        weights = torch.arange(answers.logps.numel(), device=device).view_as(answers.logps).cos()
        (answers.logps * weights).sum().backward()
        factors = [factor.grad for layer in adapted.values() for factor in layer.factors]
        found.append([each.cpu() for each in (answers.logps, answers.logits, answers.states, *factors)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)


@pytest.fixture
def inputs(tiny_base):
    pairs = [make_pair(number, rejected="No {0}" * (number % 3 + 1)) for number in range(12)]
    base = replace(tiny_base, device=GPU)
    tables = [PairTable.of(each, base.tokenizer) for each in (pairs[:10], pairs[10:])]
    return TrialInputs(base, weights_fingerprint(load_start(trial(), base)), *tables, "eval_loss")


@pytest.fixture
def train(inputs, tmp_path):
    def train(name, *trials, device=GPU):
        lines, run = Lines(), Run(tmp_path / name)
        own = replace(inputs, base=replace(inputs.base, device=device), base_outputs=BaseOutputs())
        results = native.run_trials(list(trials), own, run, lines)
        train.notices = lines.notices
        return {result.trial.name: result for result in results}, lines.of, run

    return train


@pytest.fixture
def replays(monkeypatch):
    """The number of rows that were computed through graphs."""
    counted, own = [], RowGraphs.states

    def states(self, pack):
        found = own(self, pack)
        counted.append(found is not None)
        return found

    monkeypatch.setattr(RowGraphs, "states", states)
    return counted


@pytest.mark.parametrize("changes", [{}, {"checkpointing": "on"}, {"row_tokens": 64}, {"batch_size": 3}])
def test_training_through_graphs_is_training_on_the_cpu(train, replays, changes):
    trials = [trial(epochs=4, **changes), trial(epochs=3, beta=0.5, **changes)]
    there, here = train("there", *trials), train("here", *trials, device=CPU)
    assert all(replays)
    assert len(replays) >= 8
    for each in trials:
        assert_same(there, here, each.name, tolerance=2e-3)


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.3}, {"method": "full"}])
def test_what_has_no_graphs_trains_as_well(train, replays, changes):
    _, lines, _ = train("there", trial(epochs=2, **changes))
    assert not any(replays)
    losses = [line["loss"] for line in lines[trial(epochs=2, **changes).name] if "eval_loss" not in line]
    assert losses[-1] < losses[0]


def test_memory_that_runs_out_shortens_the_rows(train, monkeypatch):
    """The GPU's allocator itself refuses, while rows are recorded."""
    config = trial(epochs=2, batch_size=8)
    plain, own = train("plain", config), Policy._states_of_row

    def large(self, ids, *rest):
        if torch.is_grad_enabled() and ids.shape[1] > 128:
            torch.empty(1 << 42, device=GPU)
        return own(self, ids, *rest)

    monkeypatch.setattr(Policy, "_states_of_row", large)
    short = train("short", config)
    assert "rows of 128 tokens" in train.notices[-1]
    assert_same(short, plain, config.name, tolerance=1e-3)


def test_a_run_on_the_gpu_from_the_command_line_and_a_second_one(tiny_model, tmp_path):
    """The second run finds the first one's reference log-probs, which must be this model's to the last bit."""
    for name in ("one", "two"):
        run = small_run(tiny_model, tmp_path / name, dtype="bfloat16", learning_rate=[3e-3, 1e-3], epochs=[2])
        assert torch.cuda.get_device_name() in run.paths.environment.read_text()
        assert all(result.status == "finished" for result in run.sweep.trials)
