"""Tensors on the wrong device, found without a GPU: real code on tensors with a device but no data.

Where PyTorch is built with CUDA they are fake CUDA tensors (`FakeTensorMode`). Its CPU build cannot index those, so
they lie on the meta device there, which refuses tensors of the CPU in the same way.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import make_pair
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

from pairtune.config import UNPAIRED, TrialConfig
from pairtune.data.table import PairTable
from pairtune.engine import policy as policies
from pairtune.engine.divergence import BaseStates
from pairtune.engine.lora import LoraSettings, add_adapters
from pairtune.engine.losses import Objective
from pairtune.engine.optimize import AdapterWeights, FullWeights, TrialOptimizer
from pairtune.engine.policy import STATES, Policy, cast_parameters
from pairtune.engine.processes import Processes
from pairtune.engine.scoring import Scorer, records_of

FAKE_CUDA = torch.backends.cuda.is_built()
DEVICE = torch.device("cuda" if FAKE_CUDA else "meta")
SMALL = {
    "vocab_size": 259,
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
}


@contextmanager
def elsewhere(monkeypatch):
    """Create everything on an absent device; reads of values give zeros of the right shape."""

    monkeypatch.setattr(torch.Tensor, "tolist", _nested)
    monkeypatch.setattr(torch.Tensor, "item", _nested)
    monkeypatch.setattr(policies, "check_head", lambda model: None)  # compares numbers
    seeded = torch.Generator()
    # A GPU has a generator of its own, and only a GPU.
    monkeypatch.setattr(torch, "Generator", lambda *_, **__: seeded)
    monkeypatch.setattr(torch, "rand", partial(_drawn, torch.rand))
    with FakeTensorMode(allow_non_fake_inputs=False) if FAKE_CUDA else nullcontext():
        yield


def _drawn(rand, *shape, generator, **how):
    return rand(*shape, **how)


def _nested(tensor):
    """Nested lists of zeros in the tensor's shape."""
    nested = 0.0
    for size in reversed(tensor.shape):
        nested = [nested] * size
    return nested


@pytest.fixture
def pairs(tiny_base):
    texts = [make_pair(number, rejected="No {0}" * (number % 3 + 1)) for number in range(4)]
    return PairTable.of(texts, tiny_base.tokenizer)


def trial(**changes):
    return TrialConfig(**{"learning_rate": 1e-3, "beta": 0.1, "lora_rank": 4, **changes})


def there(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)


def model_of(family, dtype):
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=dtype).eval()
    for module in model.modules():  # what `.to` does, but for its check that storage can be shared
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, torch.nn.Parameter(there(parameter)))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, there(buffer))
    model.tie_weights()
    return model


def scorer(policy, config, pairs, reference, trials=1, base=None):
    alone = Processes(torch.device("cpu"))
    return Scorer(policy, [Objective.of(config)] * trials, pairs, reference, alone, (1,), base)


def check_step(policy, config, pairs, weights, trials):
    """Forward, loss, backward, clipping, update: a step as in `native`, whose tensors have to stay on the device."""
    policy.train(True)
    reference = torch.zeros(len(pairs), 2, device=DEVICE)
    for scored in scorer(policy, config, pairs, reference, trials).batch([0, 2, 3], 512):
        losses = torch.stack([each.losses.sum() for each in scored])
        (losses.sum() / 3).backward()
        weights[0].collect_gradients()
        assert {each.losses.device.type for each in scored} == {DEVICE.type}
        assert all(len(mine) == len(scored[0].losses) for mine in records_of([[each] for each in scored]))
    for each in weights:
        each.take_gradients()
        optimizer = TrialOptimizer(config, each.tensors, 4)
        torch.nn.utils.clip_grad_norm_(each.tensors, 1.0)
        assert all(tensor.grad.device.type == DEVICE.type for tensor in each.tensors)
        assert optimizer.learning_rate == config.learning_rate
        each.updated()


@pytest.mark.parametrize("more", [{}, {"lora_dropout": 0.3}, {"loss": "ipo"}], ids=["plain", "dropout", "ipo"])
@pytest.mark.parametrize("trials", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_stays_on_the_device(monkeypatch, pairs, family, trials, more):
    with elsewhere(monkeypatch):
        model = model_of(family, torch.bfloat16)
        config = trial(**more)
        layers = add_adapters(model, LoraSettings(rank=4, dropout=config.lora_dropout), [0] * trials)
        policy = Policy(model, layers, trials)
        if trials == 2:
            policy.checkpoint_activations()
        check_step(policy, config, pairs, [AdapterWeights(layers, place) for place in range(trials)], trials)


@pytest.mark.parametrize("loss", UNPAIRED)
def test_a_step_on_single_answers_stays_on_the_device(monkeypatch, tiny_base, loss):
    halves = [half for number in range(2) for half in make_pair(number).halves()]
    with elsewhere(monkeypatch):
        model = model_of("llama", torch.bfloat16)
        layers = add_adapters(model, LoraSettings(rank=4), [0])
        table = PairTable.of(halves, tiny_base.tokenizer)
        check_step(Policy(model, layers), trial(loss=loss), table, [AdapterWeights(layers, 0)], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_training_stays_on_the_device(monkeypatch, pairs, dtype):
    with elsewhere(monkeypatch):
        model = model_of("llama", torch.float32)
        weights = FullWeights(model, dtype)
        cast_parameters(model, dtype)
        check_step(Policy(model), trial(method="full"), pairs, [weights], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluation_stays_on_the_device(monkeypatch, pairs, family):
    """With the KL divergence from the base, and temporarily in float32."""
    with elsewhere(monkeypatch), torch.no_grad():
        model = model_of(family, torch.bfloat16)
        policy = Policy(model)
        with policy.computing_in(torch.float32):
            head = model.get_output_embeddings()
            states = torch.zeros(len(pairs), 2 * STATES, head.in_features)
            base = BaseStates(states, head.weight, head.bias)
            reference = torch.zeros(len(pairs), 2, device=DEVICE)
            for (scored,) in scorer(policy, trial(), pairs, reference, base=base).batch([0, 1, 2, 3], 4096):
                assert scored.kl is not None
                assert scored.kl.device.type == DEVICE.type
                assert scored.chosen_logits.dtype == torch.float32
        assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["positions", "reference"])
def test_a_tensor_on_the_wrong_device_is_found(monkeypatch, pairs, part):
    """The tests above can fail: with positions or a reference left on the CPU."""
    with elsewhere(monkeypatch), torch.no_grad():
        policy = Policy(model_of("llama", torch.bfloat16))
        pack = next(policy.rows(pairs.tokens([0, 1]), 512))
        policy.answer_logps(pack)
        if part != "reference":
            left = torch.zeros(getattr(pack, part).shape, dtype=torch.long)
            with pytest.raises(RuntimeError, match=r"device|meta tensor"):
                policy.answer_logps(replace(pack, **{part: left}))
        else:
            with pytest.raises(RuntimeError, match=r"device|meta tensor"):
                list(scorer(policy, trial(), pairs, torch.zeros(len(pairs), 2)).batch([0, 1], 4096))
