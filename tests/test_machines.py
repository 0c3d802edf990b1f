"""Batch invariance on every machine: with other machines' kernels, a pair's numbers are still its own."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import Lines, make_pair, shared_file
from machines import KERNELS, Machine
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    Qwen2Config,
)

from pairtune.config import Reading, SourceConfig, TrialConfig
from pairtune.data.source_reader import SourceReader
from pairtune.data.table import PairTable, TokenIds
from pairtune.data.tokens import PairTokenizer, TokenizedPair
from pairtune.engine import native
from pairtune.engine.activations import silu, silu_gradient
from pairtune.engine.kernels import Kernels
from pairtune.engine.lora import LoraSettings, add_adapters
from pairtune.engine.policy import Policy
from pairtune.engine.rounding import allowed_margin
from pairtune.engine.trial import BaseOutputs, TrialInputs, load_start
from pairtune.errors import Interrupted, RunFailed
from pairtune.files import user_cache
from pairtune.models.load import open_base, weights_fingerprint
from pairtune.run.folder import Run
from pairtune.run.records import MachineChoices

ADAPTER = "adapter_model.safetensors"
CPU = torch.device("cpu")
# `make machines` takes all of them through everything; here, a few go through what takes long.
ALL = bool(os.environ.get("PAIRTUNE_MACHINES"))
HERE = "here"  # this machine's own kernels
MENDED = [HERE, *sorted(KERNELS.keys() - {"hopeless"})]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture
def own_machine(tmp_path, monkeypatch):
    """A separate cache: probes of this machine do not hold for another one."""
    models, cache = user_cache() / "models", tmp_path / "cache"
    cache.mkdir()
    (cache / "models").symlink_to(models)
    monkeypatch.setenv("PAIRTUNE_CACHE", str(cache))


def simulated(name):
    if name == HERE:
        yield name
        return
    with Machine(KERNELS[name]) as running:
        yield name
    assert running.products


@pytest.fixture
def machine(request, own_machine):
    yield from simulated(request.param)


@pytest.fixture(params=sorted(DTYPES))
def dtype(request):
    return DTYPES[request.param]


def on(machines, few=None):
    """Parametrize a test by machine and dtype; slow tests run on these few, unless all are requested."""
    both = list(product(machines, sorted(DTYPES)))
    return pytest.mark.parametrize(("machine", "dtype"), both if ALL or few is None else few, indirect=True)


# What takes long: a stepped, an irregular, a place-dependent and a small-product kernel.
FEW = [("steps", "bfloat16"), ("every", "float32"), ("edges", "bfloat16"), ("few", "float32")]
HOPELESS = [("hopeless", "bfloat16"), ("hopeless", "float32")]
FEWER = [FEW[0], FEW[1]]


def ids(*lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return TokenIds(*(torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths))


# Of one token, of a few, of some hundreds, and longer than the dense attention takes.
PAIRS = [
    ids(*lengths, seed=n) for n, lengths in enumerate([(3, 1, 1), (40, 9, 17), (5, 60, 2), (90, 70, 45), (20, 8, 8)])
]

SMALL = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gpt2": GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=512),
    "gpt_neox": GPTNeoXConfig(**{name: value for name, value in SMALL.items() if name != "num_key_value_heads"}),
    "olmo2": Olmo2Config(**SMALL),
}


def family(name, dtype):
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(FAMILIES[name], dtype=dtype).eval()


def adapted(model, trials, kernels):
    layers = add_adapters(model, LoraSettings(rank=4), list(range(trials)))
    for name, layer in layers.items():
        generator = torch.Generator().manual_seed(len(name))
        layer.lora_b.data = torch.randn(1, *layer.lora_b.shape[1:], generator=generator).expand_as(layer.lora_b) * 0.05
        layer.lora_a.data = layer.lora_a.data[:1].expand_as(layer.lora_a).clone()
    return Policy(model, layers, trials, kernels)


def numbers(policy, pairs, max_tokens):
    """A pair's log-probs, logits and hidden states, [pairs, numbers].

    Of a difference in the last bits, a sum of log-probs alone would often show nothing: it has fewer of them.
    """
    with torch.no_grad():
        rows = [policy.answer_logps(pack, keep_states=True) for pack in policy.rows(pairs, max_tokens)]
    each = ([row.logps[-1].view(-1, 2), row.logits[-1].view(-1, 2), row.states[-1].flatten(1)] for row in rows)
    return torch.cat([torch.cat(parts, dim=1) for parts in each])


@on(MENDED)
@pytest.mark.parametrize("name", FAMILIES if ALL else ["llama", "gemma2", "gpt2"])
def test_a_pairs_bits_are_its_own(machine, dtype, name):
    """Alone or with others, in short and long rows, in any order, beside other trials, packed or padded."""
    model = family(name, dtype)
    kernels = Kernels(model, CPU)
    policy = adapted(model, 1, kernels)
    alone = torch.cat([numbers(policy, [pair], 4096) for pair in PAIRS])
    for max_tokens in (256, 1024, 4096):
        assert torch.equal(numbers(policy, PAIRS, max_tokens), alone), max_tokens
    assert torch.equal(numbers(policy, PAIRS[::-1], 4096).flip(0), alone)
    beside = adapted(family(name, dtype), 3, kernels)
    assert torch.equal(numbers(beside, PAIRS, 1024), alone)


def test_without_tiles_they_are_not(own_machine, dtype):
    """The test above can fail."""
    with Machine(KERNELS["steps"]):
        policy = adapted(family("llama", dtype), 1, None)
        alone = torch.cat([numbers(policy, [pair], 4096) for pair in PAIRS])
        assert not torch.equal(numbers(policy, PAIRS, 4096), alone)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1536, 1000])
@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_an_activations_bits_are_its_own(threads, dtype, size, count):
    """However many rows there are, and however many threads share them."""
    threads(count)
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(409, size, generator=generator).to(dtype) for _ in range(2))
    together = silu(x), silu_gradient(grad.clone(), x, silu(x))
    for rows in (slice(0, 41), slice(41, 200), slice(200, 409)):
        some = x[rows].clone()
        alone = silu(some), silu_gradient(grad[rows].clone(), some, silu(some))
        assert all(torch.equal(own, among[rows]) for own, among in zip(alone, together, strict=True))
    exact = x.double().requires_grad_()
    (expected := torch.nn.functional.silu(exact)).backward(grad.double())
    near = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.02}
    torch.testing.assert_close(together[0].double(), expected.detach(), **near)
    torch.testing.assert_close(together[1].double(), exact.grad, **near)


@on(MENDED)
def test_what_is_chosen_for_each_machine(machine, dtype):
    products = Kernels(family("llama", dtype), CPU).products(dtype)
    assert products.exact
    if machine != HERE:
        assert products.tile == (None if machine == "few" else 128), products
        assert (products.least > 1) == (machine == "few")
        assert products.by_trial == (machine != "few")


def test_where_nothing_helps_that_is_known(own_machine, dtype):
    with Machine(KERNELS["hopeless"]):
        assert not Kernels(family("llama", dtype), CPU).products(dtype).exact


def trial(**changes):
    settings = {"learning_rate": 3e-3, "beta": 0.1, "epochs": 2, "lora_rank": 4, **changes}
    return TrialConfig(**settings)


@pytest.fixture
def inputs(tiny_base, dtype):
    """Answers of one token and of many; in the training split two pairs share a row and others do not."""
    words = ["Y", "Yes, {}.", "Yes. " * 20 + "{}", "{}? Of course, there are exactly that many.", "Why not {}?"]
    pairs = [make_pair(n, chosen=words[n % 5], rejected="No {0}" * (n % 3 + 1) if n % 4 else "N") for n in range(11)]
    base = replace(tiny_base, dtype=dtype)
    tables = [PairTable.of(each, base.tokenizer) for each in (pairs[:7], pairs[7:])]
    return TrialInputs(base, weights_fingerprint(load_start(trial(), base)), *tables, "eval_loss")


def train(inputs, folder, *trials, **changes):
    lines, run = Lines(), Run(folder)
    results = native.run_trials(list(trials), replace(inputs, **changes), run, lines)
    assert [result.status for result in results] == ["finished"] * len(trials), [result.reason for result in results]
    return lines.of, run


def assert_same_bits(one, other, name):
    (lines, run), (other_lines, other_run) = one, other
    assert lines[name] == other_lines[name]
    weights, others = (
        load_file(each.paths.trial(name).best / "adapter_model.safetensors") for each in (run, other_run)
    )
    assert all(torch.equal(tensor, others[key]) for key, tensor in weights.items())


@on(MENDED, FEW)
@pytest.mark.parametrize(
    ("batch_size", "more"),
    [(1, {}), (3, {"lora_dropout": 0.3}), (2, {}), (4, {"lora_targets": ("q_proj",)})][: None if ALL else 2],
)
def test_a_trial_alone_and_among_four_ends_in_the_same_bits(machine, inputs, tmp_path, batch_size, more):
    trials = [
        trial(learning_rate=rate, beta=beta, batch_size=batch_size, **more)
        for rate in (3e-3, 1e-3)
        for beta in (0.1, 0.5)
    ]
    together = train(inputs, tmp_path / "four", *trials)
    assert together[0][trials[0].name][0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    for number in (0, 3):
        alone = train(inputs, tmp_path / str(number), trials[number], base_outputs=BaseOutputs())
        assert_same_bits(together, alone, trials[number].name)


@on(MENDED, FEWER)
def test_a_run_goes_on_to_the_same_bits(machine, inputs, tmp_path):
    trials = [trial(), trial(beta=0.3)]
    whole = train(inputs, tmp_path / "whole", *trials)
    asked = iter([False] * 5 + [True] * 99)
    run = tmp_path / "stopped"
    lines = Lines()
    with pytest.raises(Interrupted):
        native.run_trials(
            trials, replace(inputs, stopping=lambda: next(asked), base_outputs=BaseOutputs()), Run(run), lines
        )
    native.run_trials(trials, replace(inputs, base_outputs=BaseOutputs()), Run(run), lines)
    for each in trials:
        assert_same_bits(whole, (lines.of, Run(run)), each.name)


@on([*MENDED, "hopeless"], [*FEWER, *HOPELESS])
def test_sound_trials_train_on_every_machine(machine, inputs, tmp_path):
    lines, _ = train(inputs, tmp_path / "run", trial(), trial(beta=0.5))
    rounding = inputs.base_outputs.rounding
    assert rounding is not None
    assert (rounding.between_rows > 0) == (machine == "hopeless")
    assert abs(lines[trial().name][0]["rewards/margins"]) <= 0.1 * allowed_margin(rounding)


def faulty_adapter(monkeypatch, inputs):
    """An adapter that is already trained."""
    real = native.add_adapters

    def learned(*arguments):
        layers = real(*arguments)
        next(iter(layers.values())).lora_b.data[0, 0, 0] = 1e-6
        return layers

    monkeypatch.setattr(native, "add_adapters", learned)


def faulty_base(monkeypatch, inputs):
    """One weight in a thousand is off by 0.1 % or by one step, after the fingerprint check."""
    real = native.start_trials

    def other_weights(*arguments):
        model, results = real(*arguments)
        for weights in model.parameters():
            some = weights.data.view(-1)[::1000]
            off = some * 1.001 if some.dtype == torch.float32 else torch.nextafter(some, some + 1)
            weights.data.view(-1)[::1000] = off
        return model, results

    monkeypatch.setattr(native, "start_trials", other_weights)


def swapped_reference(monkeypatch, inputs):
    """Chosen and rejected answers are swapped in the stored reference."""
    inputs.base_outputs.logps["train"] = inputs.base_outputs.logps["train"].flip(1)


def mixed_up_reference(monkeypatch, inputs):
    """The reference of other pairs."""
    inputs.base_outputs.logps["validation"] = inputs.base_outputs.logps["validation"].roll(1, 0)


@on([*MENDED, "hopeless"], [*FEWER, HOPELESS[0]])
@pytest.mark.parametrize("plant", [faulty_adapter, faulty_base, swapped_reference, mixed_up_reference])
def test_true_faults_are_found_on_every_machine(machine, inputs, tmp_path, monkeypatch, plant):
    train(inputs, tmp_path / "sound", trial(epochs=1))
    plant(monkeypatch, inputs)
    with pytest.raises(RunFailed, match="not zero|not this base model's|not the same model"):
        train(inputs, tmp_path / "faulty", trial(epochs=1))


def test_the_guard_says_what_was_measured(inputs, tmp_path, own_machine, monkeypatch):
    """A first step off by more than rounding is refused, and the message has the figures."""
    with Machine(KERNELS["hopeless"]):
        train(inputs, tmp_path / "sound", trial(epochs=1))
        inputs.base_outputs.logps["train"] += torch.tensor([50.0, 0.0])
        monkeypatch.setattr(native, "check_reference", lambda *arguments: None)
        with pytest.raises(RunFailed, match=r"a pair's margin differs by [\d.]+ between rows .* is allowed"):
            train(inputs, tmp_path / "faulty", trial(epochs=1, batch_size=7))


def test_what_was_chosen_is_not_chosen_again(own_machine, dtype, monkeypatch, tmp_path):
    model = family("llama", dtype)
    name = str(dtype).removeprefix("torch.")
    with Machine(KERNELS["steps"]):
        before = Kernels(model, CPU)
        assert before.products(dtype).tile == 128
        stored = MachineChoices.model_validate_json(MachineChoices(kernels=before.record()).model_dump_json()).kernels
        monkeypatch.setattr("pairtune.engine.kernels._differing", None)  # trying again would fail
        monkeypatch.setenv("PAIRTUNE_CACHE", str(tmp_path / "another"))
        again = Kernels(model, CPU, stored)
        assert again.products(dtype) == before.products(dtype)
        assert again.record() == stored
    monkeypatch.undo()
    monkeypatch.setenv("PAIRTUNE_CACHE", str(tmp_path / "third"))
    elsewhere = Kernels(model, CPU, stored)  # the run was moved to this machine
    assert elsewhere.probe(dtype).bits != stored[name].bits


@pytest.fixture
def bundled(dtype):
    """The bundled model and 16 real pairs."""
    base = replace(open_base("smollm2-135m", "float32"), dtype=dtype)
    source = SourceConfig(source=str(shared_file("rm_static_train.jsonl.gz")))
    encoder = PairTokenizer(base.tokenizer, 1024)
    read = SourceReader.open(source, "--data", Reading(), 20).encoded(encoder.encode)
    pairs = [each.pair for batch in read for _, each in batch if isinstance(each, TokenizedPair)]
    tables = [PairTable.of(each, base.tokenizer) for each in (pairs[:16], pairs[16:17])]
    return TrialInputs(base, weights_fingerprint(load_start(trial(), base)), *tables, "eval_loss")


@pytest.mark.skipif(not ALL, reason="takes minutes: make machines")
@on([HERE, "steps", "every", "edges", "few"])
def test_the_assignments_grid_starts_at_ln_2(machine, bundled, tmp_path):
    """Four trials side by side, the real model, real pairs: the first losses are ln 2 to 1e-6 in both types."""
    trials = [trial(learning_rate=rate, beta=beta, lora_rank=16) for rate in (3e-5, 1e-5) for beta in (0.1, 0.2)]
    lines = Lines()
    first = replace(bundled, stopping=lambda: bool(lines.of.get(trials[-1].name)))
    with pytest.raises(Interrupted):
        native.run_trials(trials, first, Run(tmp_path / "run"), lines)
    for each in trials:
        assert lines.of[each.name][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert lines.of[each.name][0]["rewards/margins"] == 0
