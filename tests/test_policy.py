"""The engine's view of a model: its head, its buffers, its layers, whatever its family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import Lines, byte_tokenizer, make_pair
from peft import AutoPeftModelForCausalLM
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    FalconConfig,
    FalconH1Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    MptConfig,
    Olmo2Config,
)

from pairtune.config import TrialConfig
from pairtune.data.table import PairTable, TokenIds
from pairtune.engine import native
from pairtune.engine.lora import LoraSettings, add_adapters
from pairtune.engine.optimize import FullWeights
from pairtune.engine.policy import Policy
from pairtune.engine.products import linear_layers
from pairtune.engine.trial import TrialInputs, load_start, peak_memory_mb, reset_peak_memory
from pairtune.errors import BadInput
from pairtune.models.load import LoadedBase, load_tokenizer, weights_fingerprint
from pairtune.models.resolve import resolve_model
from pairtune.run.folder import Run

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
PAIR = TokenIds([5, 6, 7, 8], [9, 10, 11], [12, 13])


def made(config, **more):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **more).eval()


@pytest.mark.parametrize(
    "config",
    [
        ModernBertDecoderConfig(
            **SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        ),
        FalconH1Config(
            **SMALL,
            num_key_value_heads=2,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_d_state=8,
            lm_head_multiplier=0.5,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_a_head_that_is_more_than_a_product_is_refused(config):
    """A transform, a multiplier, a scale: log-probs without them would be another model's."""
    with pytest.raises(BadInput, match=r"are not hidden states times output embedding; use --engine trl"):
        Policy(made(config))


def test_berts_head_is_refused():
    torch.manual_seed(3)
    with pytest.raises(BadInput, match="use --engine trl"):
        Policy(BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)).eval())


def test_a_scale_that_is_not_set_is_none():
    """MPT's `logit_scale` is None: its logits are the product, and its log-probs ours."""
    model = made(MptConfig(vocab_size=259, d_model=32, n_heads=4, n_layers=2, max_seq_len=512, logit_scale=None))
    policy = Policy(model)
    (pack,) = policy.rows([PAIR], 4096)
    ours = policy.answer_logps(pack).logps[0]
    logits = model(input_ids=torch.tensor([[*PAIR.prompt, *PAIR.chosen]])).logits[0].float().log_softmax(-1)
    chosen = sum(logits[len(PAIR.prompt) - 1 + at, token] for at, token in enumerate(PAIR.chosen))
    torch.testing.assert_close(ours[0], chosen, atol=1e-4, rtol=1e-5)


def base_of(folder, config, dtype=torch.float32):
    tokenizer = byte_tokenizer()
    made(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = resolve_model(str(folder))
    return LoadedBase(source, load_tokenizer(source), dtype, CPU)


def inputs_of(base, trial):
    pairs = [make_pair(number, rejected="No {0}" * (number % 3 + 1)) for number in range(6)]
    tables = [PairTable.of(each, base.tokenizer) for each in (pairs[:4], pairs[4:])]
    return TrialInputs(base, weights_fingerprint(load_start(trial, base)), *tables, "eval_loss")


def test_a_model_without_linear_layers_gets_no_adapters(tiny_base):
    model = load_start(trial(), tiny_base)
    for name, _ in list(linear_layers(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, torch.nn.Identity())
    with pytest.raises(BadInput, match=r"has no plain linear layers that could get adapters; use --method full"):
        add_adapters(model, LoraSettings(), [0])


def trial(**changes):
    return TrialConfig(**{"learning_rate": 3e-3, "beta": 0.1, "epochs": 1, "lora_rank": 4, **changes})


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=512),
        GPTNeoXConfig(**SMALL),
        Olmo2Config(**SMALL, num_key_value_heads=2),
        GraniteConfig(**SMALL, logits_scaling=4.0),
        CohereConfig(**SMALL, logit_scale=0.25),
        FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2),
        MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
    ],
    ids=lambda config: config.model_type,
)
def test_other_families_train_side_by_side(config, tmp_path):
    """The default grid has two betas; GPT-2's layers are Conv1D. PEFT loads the result."""
    base = base_of(tmp_path / "model", config)
    trials, lines, run = [trial(), trial(beta=0.2)], Lines(), Run(tmp_path / "run")
    results = native.run_trials(trials, inputs_of(base, trials[0]), run, lines)
    assert [result.status for result in results] == ["finished", "finished"]
    assert lines.of[trials[0].name][0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    tuned = AutoPeftModelForCausalLM.from_pretrained(run.paths.trial(trials[0].name).best, dtype=torch.float32)
    assert any(bool(weights.any()) for name, weights in tuned.named_parameters() if ".lora_B." in name)
    policy = Policy(load_start(trials[0], base))
    (pack,) = policy.rows([PAIR], 4096)
    before = policy.answer_logps(pack).logps[0, 0]
    logits = tuned(input_ids=torch.tensor([[*PAIR.prompt, *PAIR.chosen]])).logits[0].float().log_softmax(-1)
    after = sum(logits[len(PAIR.prompt) - 1 + at, token] for at, token in enumerate(PAIR.chosen))
    assert abs(after - before) > 1e-3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_buffers_are_never_cast(tiny_base, tmp_path, method):
    """Rotary frequencies in bfloat16 are up to 0.33 % off; test, chat and export have exact ones."""
    base, config = replace(tiny_base, dtype=torch.bfloat16), trial(method=method)
    lockstep = native._TrialGroup([config], inputs_of(base, config), Run(tmp_path), Lines())
    exact = dict(load_start(config, base).named_buffers())
    buffers = {name: buffer for name, buffer in lockstep.model.named_buffers() if "inv_freq" in name}
    assert buffers
    for name, buffer in buffers.items():
        assert torch.equal(buffer, exact[name])
    assert {each.dtype for name, each in lockstep.model.named_parameters() if "lora" not in name} == {torch.bfloat16}


def test_a_wider_type_for_a_while_leaves_every_bit(tiny_base):
    model = load_start(trial(), replace(tiny_base, dtype=torch.bfloat16))
    policy, before = Policy(model), weights_fingerprint(model)
    with policy.computing_in(torch.float32):
        assert model.dtype == torch.float32
        (pack,) = policy.rows([PAIR], 4096)
        wide = policy.answer_logps(pack).logps
    assert weights_fingerprint(model) == before
    narrow = policy.answer_logps(pack).logps
    assert not torch.equal(wide, narrow)
    torch.testing.assert_close(wide, narrow, atol=0.2, rtol=0.01)


def test_evaluations_in_float32_are_those_of_float32(tiny_base, tmp_path):
    """Trained in bfloat16, evaluated in float32: before training, every margin is 0 in both."""
    base = replace(tiny_base, dtype=torch.bfloat16)
    configs = [trial(learning_rate=1e-12, eval_dtype=each) for each in (None, "float32")]
    rows = []
    for number, config in enumerate(configs):
        lines = Lines()
        native.run_trials([config], inputs_of(base, config), Run(tmp_path / str(number)), lines)
        rows.append(lines.of[config.name][-1])
    assert rows[0]["eval_logps/chosen"] != rows[1]["eval_logps/chosen"]
    assert rows[1]["eval_logps/chosen"] == pytest.approx(rows[0]["eval_logps/chosen"], rel=0.01)
    assert rows[1]["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_gradients_of_full_training_add_up_in_float32():
    """1 plus 256 times 1/512, by hand: in bfloat16, whose next number after 1 is 1 1/128, the sum stays 1."""
    layer = nn.Linear(1, 1, bias=False)
    weights = FullWeights(layer, torch.bfloat16)
    layer.to(torch.bfloat16)
    for part in [1.0] + [1 / 512] * 256:
        layer.weight.grad = torch.full((1, 1), part, dtype=torch.bfloat16)
        weights.collect_gradients()
    (master,) = weights.summed
    assert master.grad.item() == 1.5
    assert layer.weight.grad is None


def test_a_later_peak_is_not_an_earlier_one():
    """Linux can reset the peak resident size."""
    block = torch.ones(64 << 20)
    before = peak_memory_mb(CPU)
    del block
    reset_peak_memory(CPU)
    after = peak_memory_mb(CPU)
    if after == before:
        pytest.skip("this system cannot measure the peak anew")
    assert after < before - 128
