"""Bases in 4 bits: the rounding, that packing changes no result, and what cannot be done with them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, make_pair, pairtune, small_run, train_one
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, PreTrainedModel, Qwen2Config

from pairtune.config import TrialConfig
from pairtune.data.table import PairTable
from pairtune.engine import native
from pairtune.engine.lora import LoraSettings, add_adapters
from pairtune.engine.memory import shape_of
from pairtune.engine.policy import Policy
from pairtune.engine.trial import TrialInputs
from pairtune.errors import BadInput
from pairtune.models.load import LoadedBase, blank_model, load_model, load_tokenizer, load_tuned, weights_fingerprint
from pairtune.models.nf4 import BLOCK, Nf4Linear, pack, pack_linears, unpack
from pairtune.models.resolve import ModelSource, resolve_model
from pairtune.models.start import open_base_of, open_start

CPU = torch.device("cpu")
TRAIN = [make_pair(number) for number in range(5)]
HELD = [make_pair(number, rejected="No." * (number % 3 + 1) + "{}") for number in range(20, 23)]


@pytest.fixture
def source(tiny_model: Path) -> ModelSource:
    return resolve_model(f"{tiny_model}@nf4")


def dense(source: ModelSource) -> ModelSource:
    """The rounded model as an ordinary one, whose layers are never packed."""
    return replace(source, kind="folder")


def test_a_block_worked_by_hand():
    weight = torch.zeros(BLOCK)
    weight[:5] = torch.tensor([-2.0, 1.0, 1.01, 0.05, 0.1])
    packed, scales = pack(weight)
    assert scales.tolist() == [2.0]
    # 0.5 lies nearer to 0.4407 than to 0.5626, and 0.505 nearer to the latter; 0.025 nearer to 0 than to 0.0796, and
    # 0.05 nearer to 0.0796. Two codes to a byte, the first in its upper half; 7 is zero.
    assert packed[:3].tolist() == [0 * 16 + 12, 13 * 16 + 7, 8 * 16 + 7]
    near = torch.tensor([-1.0, 0.4407, 0.5626, 0.0, 0.0796]) * 2
    assert torch.allclose(unpack(packed, scales)[:5].float(), near, rtol=2**-8)
    assert not unpack(packed, scales)[5:].any()


@given(
    st.lists(st.floats(-65504, 65504, width=16), min_size=BLOCK, max_size=BLOCK),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rounding_is_near_and_rounding_again_changes_nothing(numbers: list[float], dtype: torch.dtype):
    weight = torch.tensor(numbers).to(dtype)
    packed, scales = pack(weight)
    rounded = unpack(packed, scales)
    # The widest gap between two of the 16 values is 0.304; half of it, and what bfloat16 rounds.
    largest = weight.float().abs().max()
    assert (rounded.float() - weight.float()).abs().max() <= largest * (0.304 / 2 + 2**-7)
    again, same = pack(rounded)
    assert torch.equal(unpack(again, same), rounded)


def test_it_is_nearly_the_rounding_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    ours = unpack(*pack(weight)).view_as(weight).float()
    near = (ours - theirs).abs() <= theirs.abs() * 2**-7
    assert near.float().mean() > 0.99  # the others lay on the middle between two values, but for a rounding


def test_large_weights_are_packed_in_parts(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    whole, scales = pack(weight)
    monkeypatch.setattr("pairtune.models.nf4._AT_ONCE", 3 * BLOCK)
    parts, scales_of_parts = pack(weight)
    assert torch.equal(whole, parts)
    assert torch.equal(scales, scales_of_parts)
    values = unpack(parts, scales_of_parts)
    monkeypatch.undo()
    assert torch.equal(values, unpack(whole, scales))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_base_is_the_rounded_one_to_the_bit(source: ModelSource, dtype: torch.dtype):
    whole, packed = load_model(dense(source), dtype, CPU), load_model(source, dtype, CPU, packed=True)
    layers = [layer for layer in packed.modules() if isinstance(layer, Nf4Linear)]
    assert len(layers) == 14
    assert weights_fingerprint(packed) == weights_fingerprint(whole)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, whole(ids).logits)
    assert sum(layer.packed.nbytes + layer.scales.nbytes for layer in layers) < sum(
        layer.weight.nbytes for layer in layers
    ) / (3.5 if dtype == torch.bfloat16 else 7)


def trained(base: LoadedBase, folder: Path) -> tuple[str, list[tuple[float, float]]]:
    """The fingerprint of a trial's best weights, and the losses and margins of its steps."""
    start = weights_fingerprint(load_model(base.source, base.dtype, CPU))
    train, held = (PairTable.of(pairs, base.tokenizer) for pairs in (TRAIN, HELD))
    settings = TrialConfig(learning_rate=5e-3, beta=0.1, epochs=2, dtype="float32", lora_rank=4)
    inputs = TrialInputs(base, start, train, held, "eval_loss")
    result, lines, _ = train_one(native, settings, inputs, folder)
    return result.best_fingerprint, [(line["loss"], line["rewards/margins"]) for line in lines if "grad_norm" in line]


def test_a_trial_on_a_packed_base_takes_the_same_course(source: ModelSource, tmp_path: Path):
    base = LoadedBase(source, load_tokenizer(source), torch.float32, CPU)
    packed = trained(base, tmp_path / "packed")
    assert len(packed[1]) == 6
    assert packed == trained(replace(base, source=dense(source)), tmp_path / "dense")


def padded_family() -> PreTrainedModel:
    """A model whose layers are transformers' own."""
    torch.manual_seed(2)
    config = MixtralConfig(
        vocab_size=259, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["fused", "others"])
def test_training_keeps_no_unpacked_weight(source: ModelSource, family: str):
    """Autograd would keep each layer's weight for its backward pass, and nothing would be saved."""
    model = load_model(source, torch.float32, CPU, packed=True) if family == "fused" else padded_family()
    if family == "others":
        pack_linears(model)
    sizes = {layer.in_features * layer.out_features for layer in model.modules() if isinstance(layer, Nf4Linear)}
    policy = Policy(model, add_adapters(model, LoraSettings(rank=2), [0]))
    pairs = PairTable.of(TRAIN[:2], load_tokenizer(source))
    (pack_of_pairs,) = policy.rows(pairs.tokens([0, 1]), 4096)
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.dim() == 2:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        policy.answer_logps(pack_of_pairs).logps.sum().backward()
    assert kept
    assert not sizes & set(kept)


def test_a_run_from_beginning_to_end(tiny_model: Path, tmp_path: Path):
    run = small_run(f"{tiny_model}@nf4", tmp_path)
    base = open_base_of(run)
    assert base.source.kind == "nf4"
    assert base.source.name == f"{tiny_model}@nf4"
    rounded = weights_fingerprint(load_model(base.source, base.dtype, CPU))
    assert rounded != weights_fingerprint(load_model(resolve_model(str(tiny_model)), base.dtype, CPU))
    # The adapter names the rounded weights, and the merged model holds them.
    adapter = json.loads((run.paths.best / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(base.source.folder)
    for command in (
        ["export", run.root, "--format", "merged", "--to", tmp_path / "merged"],
        ["eval", run.root, "--data", tmp_path / "held.jsonl", "--samples", "1"],
        ["audit", run.root],
    ):
        done = pairtune(*command)
        assert done.returncode == 0, done.stderr + done.stdout
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tuned = load_tuned(run.paths.best, base).merge_and_unload()
    for (name, one), (_, other) in zip(merged.named_parameters(), tuned.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_next_round_starts_from_the_same_base(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a name that does not depend on the folder; weights that an adapter was merged into are not in 4 bits."""
    monkeypatch.chdir(tiny_model.parent)
    run = small_run(f"{tiny_model.name}@nf4", tmp_path / "first")
    for on_top in ("continue", "new"):
        start = open_start(str(run.root), "float32", on_top, "start", "lora")
        assert start.lineage is not None
        assert start.lineage.ground == f"{tiny_model}@nf4"
        assert start.base.source.kind == ("nf4" if on_top == "continue" else "folder")


def test_all_weights_cannot_be_trained_in_four_bits(tiny_model: Path):
    with pytest.raises(BadInput, match=r"--method full: .*@nf4 keeps its weights in 4 bits.*omit @nf4"):
        open_start(f"{tiny_model}@nf4", "float32", None, "start", "full")


def test_a_tuned_model_is_not_rounded(tiny_model: Path, tmp_path: Path):
    """What it was trained on would be forgotten, and its held-out prompts with it."""
    run = small_run(tiny_model, tmp_path, method="full", learning_rate=[1e-4])
    with pytest.raises(BadInput, match=r"@nf4 is for plain models, and .*run is a tuned one; omit @nf4"):
        resolve_model(f"{run.root}@nf4")


def test_another_template_is_another_model(tiny_model: Path, tmp_path: Path):
    """The rounded model is found again by all that is kept with it, not by its weights alone."""
    copied = Path(shutil.copytree(tiny_model, tmp_path / "copied"))
    before = resolve_model(f"{copied}@nf4").folder
    assert resolve_model(f"{copied}@nf4").folder == before
    (copied / "chat_template.jinja").write_text("{{ messages }}")
    assert resolve_model(f"{copied}@nf4").folder != before


def test_a_model_without_linear_layers_is_refused(tmp_path: Path):
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(BadInput, match=r"gpt2@nf4: GPT2LMHeadModel has no layers that can be stored in 4 bits"):
        resolve_model(f"{tmp_path / 'gpt2'}@nf4")


def test_a_model_that_does_not_exist(tmp_path: Path):
    with pytest.raises(BadInput, match=r"--model .*nothing: "):
        resolve_model(f"{tmp_path / 'nothing'}@nf4")


@pytest.mark.slow
def test_the_plan_counts_four_bits(tmp_path: Path):
    """The shape of Qwen2-0.5B: 358 million of its 494 million weights are in linear layers."""
    config = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config.save_pretrained(tmp_path)
    source = ModelSource("qwen2@nf4", tmp_path, "nf4", str(tmp_path))
    shape = shape_of(blank_model(source), CPU)
    assert shape.parameters == 494_032_768
    assert shape.four_bit == 357_826_560
    expected = (494_032_768 - 357_826_560) * 2 + 357_826_560 * (0.5 + 2 / 64)
    assert shape.weights(2, shape.four_bit) == expected
    done = pairtune("plan", "--model", f"{tmp_path / 'config.json'}@nf4", "--memory", "6GB", "--json")
    assert done.returncode == 0, done.stderr
    size = 4 if json.loads(done.stdout)["cost"]["fit"]["dtype"] == "float32" else 2
    assert json.loads(done.stdout)["cost"]["fit"]["memory"]["weights"] == shape.weights(size, shape.four_bit)
