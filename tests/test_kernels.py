"""The engine's parts against plain implementations: packing, attention, log-probs, adapters, references."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_pair
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save
from transformers import (
    ApertusConfig,
    ArceeConfig,
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Ernie4_5Config,
    Exaone4Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    HeliumConfig,
    HunYuanDenseV1Config,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from pairtune.data.table import PairTable, TokenIds
from pairtune.engine import layers, logps
from pairtune.engine import packed_attention as attention
from pairtune.engine.lora import (
    LoraLinear,
    LoraSettings,
    add_adapters,
    load_peft_tensors,
    peft_config,
    peft_tensors,
)
from pairtune.engine.norms import replace_norms
from pairtune.engine.packing import Segment, pack_batches, pack_pairs
from pairtune.engine.policy import PACKED_FAMILIES, Policy
from pairtune.engine.processes import Processes
from pairtune.engine.reference import compute_logps, load_reference, reference_fingerprint, reference_logps
from pairtune.errors import RunFailed
from pairtune.models.load import load_model
from pairtune.models.save import save_adapter
from pairtune.serve.kv_cache import PrefillChunk
from pairtune.serve.model_runner import DecodeToken, ModelRunner, PromptChunk

CPU = torch.device("cpu")
PAIR = TokenIds([1, 2, 3], [4, 5], [6, 7, 8])


def test_a_packed_row_by_hand():
    pack = pack_pairs([PAIR, TokenIds([9], [10], [11, 12])], CPU)
    assert pack.input_ids.tolist() == [[1, 2, 3, 4, 6, 7, 9, 11]]
    assert pack.positions.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1]]
    assert pack.segments == (Segment(3, 1, 2), Segment(1, 0, 1))
    assert pack.targets.tolist() == [4, 5, 6, 7, 8, 10, 11, 12]
    assert pack.predicting.tolist() == [2, 3, 2, 4, 5, 6, 6, 7]
    assert pack.answers.tolist() == [0, 0, 1, 1, 1, 2, 3, 3]
    assert pack.answer_tokens.tolist() == [2, 3, 1, 2]


def test_a_row_with_prompts_of_their_own_by_hand():
    pack = pack_pairs([PAIR], CPU, share_prompts=False)
    assert pack.input_ids.tolist() == [[1, 2, 3, 4, 1, 2, 3, 6, 7]]
    assert pack.segments == (Segment(3, 1, 0), Segment(3, 2, 0))
    assert pack.predicting.tolist() == [2, 3, 6, 7, 8]


lengths = st.integers(1, 5)
triples = st.builds(lambda p, c, r: TokenIds([1] * p, [2] * c, [3] * r), lengths, lengths, lengths)


@given(st.lists(triples, max_size=9), st.integers(1, 40))
def test_rows_hold_every_pair_once_and_in_order(pairs, limit):
    rows = list(pack_batches(pairs, limit, CPU))
    assert sum(pack.pairs for pack in rows) == len(pairs)
    targets = [token for pack in rows for token in pack.targets.tolist()]
    assert targets == [token for pair in pairs for token in (*pair.chosen, *pair.rejected)]
    for pack in rows:
        assert pack.pairs == 1 or sum(map(len, pack.segments and [pack.input_ids[0]])) <= limit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_the_dense_kernel_and_pytorchs_agree_forward_and_backward(dtype, window, key_heads, monkeypatch):
    torch.manual_seed(0)
    segments = (Segment(4, 3, 2), Segment(2, 0, 5), Segment(1, 3, 0))
    tokens = sum(segment.length for segment in segments)
    inputs = [torch.randn(2, heads, tokens, 8, dtype=dtype) for heads in (4, key_heads, key_heads)]
    results = []
    for limit in (attention.DENSE_TOKENS, 0):
        monkeypatch.setattr(attention, "DENSE_TOKENS", limit)
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output, _ = attention.packed_attention(None, *leaves, None, segments=segments, sliding_window=window)
        (output * torch.arange(output.numel(), dtype=dtype).view_as(output).cos()).sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for dense, plain in zip(*results, strict=True):
        torch.testing.assert_close(dense, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_log_probs_and_their_gradients_are_those_of_log_softmax(monkeypatch, softcap, with_bias):
    monkeypatch.setattr(logps, "CHUNK_LOGITS", 16 * 50)  # three chunks
    torch.manual_seed(0)
    hidden, head = torch.randn(40, 12, dtype=torch.float64), torch.randn(50, 12, dtype=torch.float64)
    bias = torch.randn(50, dtype=torch.float64) if with_bias else None
    targets, weights = torch.randint(50, (40,)), torch.randn(40)
    results = []
    for ours in (True, False):
        leaves = [leaf.clone().requires_grad_() if leaf is not None else None for leaf in (hidden, head, bias)]
        if ours:
            values, means = logps.token_logps(*leaves, targets, softcap=softcap)
        else:
            logits = torch.nn.functional.linear(*leaves)
            logits = torch.tanh(logits / softcap) * softcap if softcap else logits
            values, means = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], logits.mean(1)
        (values * weights).sum().backward()
        results.append([values.double(), means.double(), *(leaf.grad for leaf in leaves if leaf is not None)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "smollm3": SmolLM3Config(**SMALL),
    "gemma": GemmaConfig(**SMALL, head_dim=8),
    "gemma2": Gemma2Config(
        **SMALL, head_dim=8, sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3_text": Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=6),
    "mistral": MistralConfig(**SMALL, sliding_window=6),
    "phi": PhiConfig(**SMALL),
    "phi3": Phi3Config(**SMALL),
    "ministral": MinistralConfig(**SMALL, head_dim=8, sliding_window=6),
    "olmo": OlmoConfig(**SMALL),
    "olmo2": Olmo2Config(**SMALL),
    "olmo3": Olmo3Config(**SMALL, sliding_window=6),
    "granite": GraniteConfig(
        **SMALL, logits_scaling=8.0, residual_multiplier=0.5, attention_multiplier=0.2, embedding_multiplier=3.0
    ),
    "gpt_neox": GPTNeoXConfig(**{name: value for name, value in SMALL.items() if name != "num_key_value_heads"}),
    "starcoder2": Starcoder2Config(**SMALL, sliding_window=6),
    "glm": GlmConfig(**SMALL, head_dim=8),
    "glm4": Glm4Config(**SMALL, head_dim=8),
    "exaone4": Exaone4Config(**SMALL, sliding_window=6),
    "helium": HeliumConfig(**SMALL, head_dim=8),
    "ernie4_5": Ernie4_5Config(**SMALL),
    "hunyuan_v1_dense": HunYuanDenseV1Config(**SMALL, head_dim=8),
    "seed_oss": SeedOssConfig(**SMALL, head_dim=8),
    "arcee": ArceeConfig(**SMALL, rope_parameters=ROPE),
    "apertus": ApertusConfig(**SMALL, rope_parameters=ROPE),
    "cohere": CohereConfig(**SMALL, logit_scale=0.0625),
    "gpt2, padded": GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "falcon, padded": FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2),
    "stablelm, padded": StableLmConfig(**SMALL),
    "nemotron, padded": NemotronConfig(**SMALL),
    "bloom, padded": BloomConfig(**SMALL),
    "mamba, padded": MambaConfig(**SMALL),
    "lfm2, padded": Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "mixtral, padded": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe, padded": Qwen3MoeConfig(**SMALL, head_dim=8, moe_intermediate_size=16, **EXPERTS),
    "gpt_oss, padded": GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
}
PAIRS = [
    TokenIds([5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15], [16, 17]),
    TokenIds([20], [21], [22, 23, 24]),
    TokenIds([30, 31, 32], [33, 34], [33, 35, 36, 37, 38, 39, 40, 41, 42]),
]


def slow_logps(model, pairs):
    """Log-probs one sequence at a time, through the model's own attention and head."""
    values = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            logits = model(input_ids=torch.tensor([[*pair.prompt, *answer]])).logits[0].float().log_softmax(-1)
            start = len(pair.prompt)
            values.append(sum(logits[start + at - 1, token] for at, token in enumerate(answer)))
    return torch.stack(values)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_packed_is_itself_one_sequence_at_a_time(family):
    """Values and gradients; sliding windows and soft-capping included."""
    torch.manual_seed(1)
    config = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    weights = torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0, 0.7])
    expected = slow_logps(model, PAIRS)
    (expected * weights).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    policy = Policy(model)
    assert policy.packed == (config.model_type in PACKED_FAMILIES) == ("padded" not in family)
    assert policy.needed_only == (family.split(",")[0] in {"llama", "qwen2", "qwen3", "smollm3", "mistral"})
    (pack,) = policy.rows(PAIRS, 1000)
    got = policy.answer_logps(pack).logps[0]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    (got * weights).sum().backward()
    for name, weight in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(weight.grad, gradients[name], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", [name for name in FAMILIES if "padded" not in name])
def test_every_family_answers_in_batches_with_its_own_logits(family):
    """A prompt in two chunks and a token after it, as the server of models computes them."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32, attn_implementation="eager").eval()
    ids = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0].float()
        runner = ModelRunner(model, 2, 32)
        runner.forward([], [PromptChunk(PrefillChunk(1, 0, 4), ids[:4], None, last=False)])
        prompt = runner.forward([], [PromptChunk(PrefillChunk(1, 4, 5), ids[4:9], None, last=True)])
        token = runner.forward([DecodeToken(1, ids[9], 9, None)], [])
    torch.testing.assert_close(torch.cat([prompt, token]), expected[8:], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("targets", [None, ("q_proj", "down_proj"), ("v_proj", "gate_proj")])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_layers_in_few_steps_are_layers_in_many(monkeypatch, family, targets, dropout):
    """Adapters on all linear layers and on some, with dropout and without; the gradients of all adapters."""
    results = []
    for known in (layers._KNOWN, frozenset()):
        monkeypatch.setattr(layers, "_KNOWN", known)
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).eval()
        adapted = add_adapters(model, LoraSettings(rank=4, dropout=dropout, targets=targets), [5, 6])
        for layer in adapted.values():
            torch.nn.init.normal_(layer.lora_b, std=0.1)
        policy = Policy(model, adapted, 2)
        assert policy.needed_only == bool(known)
        policy.train(True)
        (pack,) = policy.rows(PAIRS, 1000)
        policy.draw_dropout(pack, [3, 4, 5], 7)
        got = policy.answer_logps(pack, keep_states=True)
        (got.logps * torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0, 0.7])).sum().backward()
        factors = [factor.grad for layer in adapted.values() for factor in (layer.lora_a, layer.lora_b)]
        assert all(bool(factor.any()) for factor in factors)
        results.append([got.logps, got.logits, got.states, *factors])
    for few, many in zip(*results, strict=True):
        torch.testing.assert_close(few, many, atol=1e-5, rtol=1e-4)


def test_every_packed_family_has_a_test():
    assert {config.model_type for name, config in FAMILIES.items() if "padded" not in name} == PACKED_FAMILIES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_has_the_same_bits_in_any_row(tiny_base, dtype):
    policy = Policy(load_model(tiny_base.source, dtype))
    table = PairTable.of([make_pair(number) for number in range(6)], tiny_base.tokenizer)
    ids = table.tokens(range(6))
    together = [policy.answer_logps(pack).logps for pack in policy.rows(ids, 10_000)]
    alone = [policy.answer_logps(pack).logps for pack in policy.rows(ids, 1)]
    assert len(together) == 1 and len(alone) == 6
    assert torch.equal(together[0], torch.cat(alone, 1))


def test_k_adapters_side_by_side_are_k_adapters_alone(tiny_base):
    table = PairTable.of([make_pair(number) for number in range(3)], tiny_base.tokenizer)
    settings = LoraSettings(rank=4, alpha=8)

    def policy(seeds):
        model = load_model(tiny_base.source, torch.float32)
        adapted = add_adapters(model, settings, seeds)
        for layer in adapted.values():
            for trial, seed in enumerate(seeds):
                generator = torch.Generator().manual_seed(seed)
                layer.lora_b.data[trial] = torch.randn(layer.lora_b.shape[1:], generator=generator) / 10
        return Policy(model, adapted, len(seeds))

    def gradients(which):
        (pack,) = which.rows(table.tokens(range(3)), 10_000)
        values = which.answer_logps(pack).logps
        values.sum().backward()
        return values, {name: layer.lora_a.grad for name, layer in which.adapted.items()}

    together, by_a = gradients(policy([5, 6, 7]))
    for trial, seed in enumerate([5, 6, 7]):
        alone, by_alone = gradients(policy([seed]))
        torch.testing.assert_close(together[trial], alone[0], atol=1e-5, rtol=1e-5)
        for name, grad in by_alone.items():
            torch.testing.assert_close(by_a[name][trial], grad[0], atol=1e-5, rtol=1e-4)


def test_a_lora_layer_by_hand():
    base = torch.nn.Linear(2, 1, bias=False)
    base.weight.data = torch.tensor([[1.0, 2.0]])
    layer = LoraLinear(base, LoraSettings(rank=1, alpha=3.0), 1)
    layer.lora_a.data = torch.tensor([[[1.0, -1.0]]])
    layer.lora_b.data = torch.tensor([[[0.5]]])
    # x = (4, 1): base 6, A x = 3, B A x = 1.5, times alpha / rank 4.5.
    x = torch.tensor([[[4.0, 1.0]]], requires_grad=True)
    output = layer(x)
    assert output.item() == 10.5
    output.backward()
    assert layer.lora_b.grad.item() == 9.0  # 3 * A x
    assert layer.lora_a.grad.tolist() == [[[6.0, 1.5]]]  # 3 * B * x
    assert x.grad.tolist() == [[[2.5, 0.5]]]  # W + 3 B A
    assert LoraSettings(rank=16, alpha=32, rslora=True).scale == 8.0


def test_dropout_is_only_for_training():
    layer = LoraLinear(torch.nn.Linear(64, 8), LoraSettings(rank=2, dropout=0.5), 1)
    torch.nn.init.normal_(layer.lora_a)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(1, 5, 64)
    layer.noise = [(3, 2), (4, 3)]
    trained = layer.train()(x)
    assert torch.equal(layer(x), trained), "a layer that is computed twice drops the same"
    layer.noise = [(3, 2), (5, 3)]
    assert not torch.allclose(layer(x), trained)
    assert not torch.allclose(layer.eval()(x), trained)


def test_dropout_leaves_the_mean_alone():
    layer = LoraLinear(torch.nn.Linear(64, 8), LoraSettings(rank=2, dropout=0.25), 1).train()
    torch.nn.init.normal_(layer.lora_a)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(1, 3, 64)
    total = 0
    for seed in range(4000):
        layer.noise = [(seed, 3)]
        total = total + layer(x).detach()
    expected = layer.eval()(x)
    spread = (layer.train()(x) - expected).abs().mean()
    assert (total / 4000 - expected).abs().max() < 0.1 * spread + 0.1


@pytest.mark.parametrize(("family", "rslora"), [("llama", False), ("llama", True), ("phi", False), ("gemma", False)])
def test_our_adapters_load_in_peft_and_pefts_here(tmp_path, family, rslora, tiny_base):
    torch.manual_seed(2)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).save_pretrained(folder)

    def fresh():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    ours = fresh()
    settings = LoraSettings(rank=3, alpha=6.0, rslora=rslora)
    adapted = add_adapters(ours, settings, [1])
    for layer in adapted.values():
        torch.nn.init.normal_(layer.lora_b)
    expected = slow_logps(ours, PAIRS)
    save_adapter(
        peft_tensors(adapted, 0), peft_config(adapted, settings), tiny_base.tokenizer, tmp_path / "a", tiny_base.source
    )
    theirs = PeftModel.from_pretrained(fresh(), tmp_path / "a").eval()
    torch.testing.assert_close(slow_logps(theirs, PAIRS), expected, atol=1e-5, rtol=1e-5)

    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=rslora)
    peft = get_peft_model(fresh(), config)
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    peft.save_pretrained(tmp_path / "b")
    load_peft_tensors(adapted, 0, load_file(tmp_path / "b" / "adapter_model.safetensors"))
    torch.testing.assert_close(slow_logps(ours, PAIRS), slow_logps(peft.eval(), PAIRS), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_other_layers_is_refused(tiny_base):
    adapted = add_adapters(load_model(tiny_base.source, torch.float32), LoraSettings(rank=2), [0])
    tensors = peft_tensors(adapted, 0)
    name = next(iter(tensors))
    with pytest.raises(ValueError, match="adapter layers and model layers differ"):
        load_peft_tensors(adapted, 0, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ValueError, match="shape"):
        load_peft_tensors(adapted, 0, {**tensors, name: torch.zeros(1, 1)})


def test_adapters_start_as_pefts_do(tiny_base):
    adapted = add_adapters(load_model(tiny_base.source, torch.float32), LoraSettings(rank=64), [0, 1])
    for layer in adapted.values():
        bound = 1 / math.sqrt(layer.in_features)
        assert not layer.lora_b.any()
        assert layer.lora_a.abs().max() <= bound
        assert layer.lora_a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not torch.equal(layer.lora_a[0], layer.lora_a[1])


def test_references_are_computed_once_and_refused_for_other_pairs(tiny_base, tmp_path, monkeypatch):
    table = PairTable.of([make_pair(number) for number in range(5)], tiny_base.tokenizer)
    other = PairTable.of([make_pair(number + 1) for number in range(5)], tiny_base.tokenizer)
    model = load_model(tiny_base.source, torch.float32)
    policy, half = Policy(model), Policy(load_model(tiny_base.source, torch.bfloat16))
    name = reference_fingerprint("base", policy, table)
    assert name != reference_fingerprint("base", policy, other)
    assert name != reference_fingerprint("base", half, table)
    assert name != reference_fingerprint("tuned", policy, table)
    computed, alone = [], Processes(CPU)
    monkeypatch.setattr(Policy, "answer_logps", counting(Policy.answer_logps, computed))
    run, another = (tmp_path / each / "train.safetensors" for each in ("run", "another"))

    first = reference_logps(policy, name, table, run, alone)
    assert first.shape == (5, 2)
    torch.testing.assert_close(
        first.flatten(), slow_logps(load_model(tiny_base.source, torch.float32), table.tokens(range(5)))
    )
    passes = len(computed)
    assert torch.equal(reference_logps(policy, name, table, run, alone), first)
    assert torch.equal(reference_logps(policy, name, table, another, alone), first)
    assert len(computed) == passes
    with pytest.raises(RunFailed, match="belong to another model or other pairs"):
        load_reference(run, "another", 5)
    with pytest.raises(RunFailed, match="belong to another model or other pairs"):
        reference_logps(policy, reference_fingerprint("base", policy, other), table, run, alone)
    run.write_bytes(b"short")
    with pytest.raises(RunFailed, match="are damaged"):
        reference_logps(policy, name, table, run, alone)


def test_references_of_another_machine_are_computed_anew(tiny_base, tmp_path):
    table = PairTable.of([make_pair(number) for number in range(3)], tiny_base.tokenizer)
    policy, alone, run = Policy(load_model(tiny_base.source, torch.float32)), Processes(CPU), tmp_path / "a.safetensors"
    weights, _, kernels = reference_fingerprint("base", policy, table).partition("-")
    here, there = f"{weights}-{kernels}", f"{weights}-{kernels[::-1]}"
    run.write_bytes(save({"logps": torch.zeros(3, 2)}, metadata={"fingerprint": there}))
    found = reference_logps(policy, here, table, run, alone)
    torch.testing.assert_close(
        found.flatten(), slow_logps(load_model(tiny_base.source, torch.float32), table.tokens(range(3)))
    )
    assert torch.equal(load_reference(run, here, 3), found)


def test_references_know_the_models_settings(tiny_base):
    """The same weights with other rotary frequencies are another model."""
    table = PairTable.of([make_pair(0)], tiny_base.tokenizer)
    policy = Policy(load_model(tiny_base.source, torch.float32))
    name = reference_fingerprint("base", policy, table)
    policy.model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500_000.0}
    assert reference_fingerprint("base", policy, table) != name


def counting(function, calls):
    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return counted


def test_references_of_no_pairs_are_none(tiny_base):
    table = PairTable.of([make_pair(0)], tiny_base.tokenizer)[:0]
    policy = Policy(load_model(tiny_base.source, torch.float32))
    assert compute_logps(policy, table, Processes(CPU)).shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3"])
def test_norms_are_transformers_own(family, dtype):
    """The forward pass to the dtype's last digit, the backward pass to its rounding; also for the weights."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=dtype)
    norm = model.base_model.layers[0].input_layernorm
    torch.nn.init.normal_(norm.weight)
    x, grad = (torch.randn(1, 7, norm.weight.shape[0], dtype=dtype) for _ in range(2))
    results = []
    for replaced in (False, True):
        if replaced:
            replace_norms(model)
            assert "forward" in vars(norm)
        seen = x.clone().requires_grad_()
        norm.weight.grad = None
        result = norm(seen)
        result.backward(grad)
        results.append((result.detach(), seen.grad, norm.weight.grad))
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    for own, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(own, theirs, **near)


@pytest.mark.parametrize("needed_only", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("parts", [(9, 6, 7), (9, 0, 7), (9, 6, 0), (1, 5, 5)])
def test_attention_in_blocks_is_attention_with_a_mask(monkeypatch, parts, window, needed_only):
    """Forward pass and all gradients, with pairs in blocks and whole, of all positions and of those that predict."""
    torch.manual_seed(4)
    segments = (Segment(*parts), Segment(4, 3, 2))
    total = sum(segment.length for segment in segments)
    inputs = [torch.randn(2, heads, total, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    grad = torch.randn(2, total, 4, 8, dtype=torch.float64)
    needed = [*range(parts[0] - 1, sum(parts)), *range(sum(parts) + 3, total)]
    if needed_only:
        grad = grad[:, needed]

    def run(attend, limited=False):
        seen = [each.clone().requires_grad_() for each in inputs]
        query = seen[0][:, :, needed] if limited else seen[0]
        result, _ = attend(None, query, *seen[1:], None, segments=segments, sliding_window=window, needed_only=limited)
        if needed_only and not limited:
            result = result[:, needed]
        result.backward(grad)
        return [result.detach(), *(each.grad for each in seen)]

    monkeypatch.setattr(attention, "DENSE_TOKENS", 0)
    expected = run(attention.packed_attention)
    for one, other in zip(run(attention.packed_attention, needed_only), expected, strict=True):
        torch.testing.assert_close(one, other)
    monkeypatch.setattr(attention, "DENSE_TOKENS", 640)
    try:
        for worth, blocks in ((0, 3), (10**9, 1)):
            monkeypatch.setattr(attention, "_WORTH_SPLITTING", worth)
            attention._blocks.cache_clear()
            attention._bias.cache_clear()
            assert len(attention._blocks(segments[1], needed_only)) == blocks
            for one, other in zip(run(attention.packed_attention, needed_only), expected, strict=True):
                torch.testing.assert_close(one, other)
    finally:
        attention._blocks.cache_clear()
        attention._bias.cache_clear()
