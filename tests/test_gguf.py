"""GGUF files: transformers and llama.cpp read back the model that was written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import CHATML, SPECIALS, byte_tokenizer, pairtune, small_run
from gguf import GGUFReader
from model_hub import online, serve_models
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pairtune.errors import BadInput
from pairtune.models.load import DEFAULT_TEMPLATE
from pairtune.models.read_gguf import read_gguf
from pairtune.models.resolve import resolve_model
from pairtune.publish.modelfile import MODEL_FILE, QUANTISATIONS, modelfile, template_pieces
from pairtune.publish.write_gguf import write_gguf

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(WORDS % "{1,3}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(WORDS % ""), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
TEXT = (
    "The keeper's lamp isn't lit; 1234567 boats, 12 gulls… Übermäßig viele Möwen, 灯台の光 😀!"
    "\n\n  def f(x):\n\treturn x"
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA3_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|im_start|>' + message['role'] + '<|im_end|>\n\n' "
    "+ message['content'] | trim + '<|endoftext|>' %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}"
)
PLAIN = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n{% endfor %}"
DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def bpe_tokenizer(cut: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges that splits text like one of the families."""
    tokenizer = Tokenizer(models.BPE())
    steps = CUTS[cut]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT, "boats and gulls and 123 lamps, 456 keepers"] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    return fast


def begin_with(tokenizer: PreTrainedTokenizerFast, bos: str) -> None:
    """Make the tokenizer begin plain text with BOS."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )


SHAPE = {
    "vocab_size": 416,  # more rows than tokens, as real models have
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": ("gpt-2", lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))),
    "smollm": ("smollm", lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))),
    "llama3": ("llama-bpe", lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE))),
    "qwen2": ("qwen2", lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True))),
    "qwen3": ("qwen2", lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE))),
}


def family(name: str):
    """A random model with weights large enough to show rounding, and its tokenizer."""
    cut, make = FAMILIES[name]
    torch.manual_seed(11)
    model = make().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model, bpe_tokenizer(cut)


def logps(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_the_model_back(name, tmp_path):
    model, tokenizer = family(name)
    write_gguf(model, tokenizer, tmp_path, "a name", "f16")
    again, reread = read_gguf(tmp_path / MODEL_FILE, model.config.rope_parameters)
    ids = tokenizer(TEXT)["input_ids"]
    assert reread.chat_template == tokenizer.chat_template
    assert reread(TEXT)["input_ids"] == ids
    assert (reread.eos_token, reread.bos_token) == (tokenizer.eos_token, tokenizer.bos_token)
    torch.testing.assert_close(logps(again, ids), logps(model, ids), atol=0.02, rtol=0)


@pytest.mark.parametrize("quantisation", [each for each in QUANTISATIONS if each != "q4_k_m"])
def test_fewer_bits_are_smaller_and_coarser(quantisation, tmp_path):
    model, tokenizer = family("qwen2")
    write_gguf(model, tokenizer, tmp_path, "a name", quantisation)
    again, _ = read_gguf(tmp_path / MODEL_FILE)
    error = {
        name: float((weight - dict(again.named_parameters())[name]).abs().max().detach() / weight.abs().max().detach())
        for name, weight in model.named_parameters()
        if weight.ndim == 2
    }
    bound = {"f16": 2**-11, "q8_0": 1 / 254, "q4_1": 1 / 15}[quantisation]
    assert max(error.values()) < bound * 1.01
    assert (tmp_path / MODEL_FILE).stat().st_size < {"f16": 2.1, "q8_0": 1.2, "q4_1": 0.95}[quantisation] * sum(
        weight.numel() for weight in model.parameters()
    ) + 20_000  # the tokenizer and the names


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(BadInput, match="not gpt2"):
        write_gguf(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2)), None, tmp_path, "a", "f16")
    with pytest.raises(BadInput, match="Llama 3, Qwen, SmolLM2 and GPT-2"):
        write_gguf(family("llama")[0], byte_tokenizer(), tmp_path, "a", "f16")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=yarn))
    with pytest.raises(BadInput, match="yarn"):
        write_gguf(model, bpe_tokenizer("gpt-2"), tmp_path, "a", "f16")


@pytest.mark.parametrize(("template", "puts"), [("{{ bos_token }}" + CHATML, True), (PLAIN, False)])
def test_llama_cpp_puts_bos_only_where_the_template_has_it(tmp_path, template, puts):
    model, tokenizer = family("smollm")
    tokenizer.chat_template = template
    begin_with(tokenizer, "<|im_start|>")
    write_gguf(model, tokenizer, tmp_path, "a", "f16")
    assert GGUFReader(tmp_path / MODEL_FILE).get_field("tokenizer.ggml.add_bos_token").contents() is puts


def test_an_end_of_turn_token_without_a_role_ends_answers_elsewhere_too(tmp_path):
    model, tokenizer = family("smollm")
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    assert "<|im_end|>" not in tokenizer.all_special_tokens
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    write_gguf(model, tokenizer, tmp_path, "a", "f16")
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GGUFReader(tmp_path / MODEL_FILE).get_field("tokenizer.ggml.eot_token_id").contents() == ends
    written = (tmp_path / "Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n' in written
    assert "TEMPLATE" in written


def test_slowed_rotary_frequencies_are_not_read_wrongly(tmp_path):
    write_gguf(*family("llama3"), tmp_path, "a", "f16")
    with pytest.raises(BadInput, match=r"model\.gguf: cannot be read as GGUF \(Llama 3\.1's rotary"):
        resolve_model(str(tmp_path / MODEL_FILE))


@pytest.mark.parametrize(
    ("template", "bos", "default"),
    [
        (CHATML, "", ""),
        (DEFAULT_SYSTEM, "", "Be brief."),
        ("{{ bos_token }}" + CHATML, "<|im_start|>", ""),
    ],
)
def test_a_modelfile_says_the_template_in_ollamas_words(template, bos, default):
    tokenizer = bpe_tokenizer("gpt-2")
    tokenizer.chat_template = template
    if bos:
        begin_with(tokenizer, bos)
    pieces = template_pieces(tokenizer)
    assert pieces is not None
    assert pieces.default == default
    if template is CHATML:
        assert pieces.user == ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
        assert pieces.system == ("<|im_start|>system\n", "<|im_end|>\n")
        assert pieces.answer == "<|im_end|>\n"


def test_llama_3s_headers_are_told_from_its_end():
    tokenizer = bpe_tokenizer("gpt-2")
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", LLAMA3_TEMPLATE
    pieces = template_pieces(tokenizer)
    assert pieces is not None
    assert pieces.user[0] == "<|im_start|>user<|im_end|>\n\n"
    assert pieces.answer == "<|endoftext|>"


def test_a_template_that_pieces_do_not_make_up_is_left_to_the_file():
    tokenizer = bpe_tokenizer("gpt-2")
    tokenizer.chat_template = CHATML.replace("<|im_start|>{{", "{{ loop.index }}<|im_start|>{{")
    assert template_pieces(tokenizer) is None
    tokenizer.chat_template = "{{ raise_exception('no') }}" + CHATML
    assert template_pieces(tokenizer) is None
    tokenizer.chat_template = DEFAULT_TEMPLATE  # an answer stands behind a blank, the prompt for one does not end in it
    assert "TEMPLATE" not in modelfile(MODEL_FILE, tokenizer)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    model, tokenizer = family("qwen2")
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return small_run(folder / "base", folder)


def test_a_run_leaves_as_gguf_and_comes_back(run, tmp_path):
    done = pairtune("export", run.root, "--format", "gguf", "--quant", "f16", "--to", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    parity = json.loads(done.stdout)
    assert parity["same_tokens"]
    assert parity["logp_difference"] < 0.01
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["Modelfile", MODEL_FILE, "parity.json"]
    assert 'PARAMETER stop "<|im_end|>"' in (tmp_path / "out" / "Modelfile").read_text()
    held = run.root.parent / "held.jsonl"
    evaluate = ("eval", tmp_path / "out" / MODEL_FILE, "--data", held, "--samples", "0", "--dtype", "float32")
    done = pairtune(*evaluate, "--base", run.root.parent / "base", "--json")
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout)["metrics"]["eval_loss"]
    done = pairtune("eval", run.root, "--data", held, "--samples", "0", "--json")
    here = json.loads(done.stdout)["metrics"]["eval_loss"]
    assert there == pytest.approx(here, abs=0.05)  # the file is kept as bfloat16 once it is read


def test_a_gguf_that_is_not_the_trained_model_is_refused(run, tmp_path, monkeypatch):
    from pairtune.publish import write_gguf as writing

    monkeypatch.setattr(writing, "_interleave", lambda values, heads: values)
    monkeypatch.setattr(writing, "_type_of", lambda name, values, kind: writing.gguf.GGMLQuantizationType.F32)
    real = writing._tensors
    monkeypatch.setattr(writing, "_tensors", lambda model: ((name, values * 1.5) for name, values in real(model)))
    from pairtune.errors import RunFailed
    from pairtune.publish.export import export_run

    with pytest.raises(RunFailed, match="does not match the trained one"):
        export_run(run, "gguf", tmp_path / "out", "f16")
    assert not list(tmp_path.iterdir())


def test_a_pushed_gguf_is_taken_by_its_name(run, tmp_path):
    with serve_models() as hub:
        environment = online(hub, tmp_path / "home")
        done = pairtune("push", run.root, "--repo", "someone/packed", "--what", "gguf", **environment)
        assert done.returncode == 0, done.stderr
        arrived = hub.repositories["someone/packed"]["main"]
        assert {"README.md", "Modelfile", MODEL_FILE, "report.html"} <= set(arrived)
        assert "library_name: gguf" in arrived["README.md"].decode()
        held = run.root.parent / "held.jsonl"
        evaluate = ("eval", "someone/packed", "--data", held, "--base", run.root.parent / "base", "--samples", "0")
        done = pairtune(*evaluate, **environment)
        assert done.returncode == 0, done.stderr
        arrived["other.gguf"] = arrived[MODEL_FILE]
        environment = online(hub, tmp_path / "home2")
        done = pairtune(*evaluate, **environment)
        assert done.returncode == 2
        assert "has several GGUF files (model.gguf, other.gguf); download one" in done.stderr


# llama.cpp itself, an extra that compiles for minutes: make test-gguf.


@pytest.mark.gguf
@pytest.mark.parametrize("quantisation", QUANTISATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_reads_the_model(name, quantisation, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-gguf installs it")
    model, tokenizer = family(name)
    write_gguf(model, tokenizer, tmp_path, "a name", quantisation)
    file = str(tmp_path / MODEL_FILE)
    other = llama_cpp.Llama(file, n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    ids = tokenizer(TEXT)["input_ids"]
    assert other.tokenize(TEXT.encode(), add_bos=False, special=True) == ids
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Boats?"}], tokenize=False)
    assert other.tokenize(rendered.encode(), add_bos=False, special=True) == tokenizer(rendered)["input_ids"]
    assert other.metadata["tokenizer.chat_template"] == CHATML
    other.eval(ids)
    found = torch.from_numpy(np.array(other.scores[: len(ids)])).log_softmax(-1)
    again, _ = read_gguf(tmp_path / MODEL_FILE, model.config.rope_parameters)
    # llama.cpp multiplies quantised weights with activations in eight bits.
    bound = {"f16": 0.01, "q8_0": 0.1, "q4_k_m": 0.1, "q4_1": 0.1}[quantisation]
    assert float((found - logps(again, ids)).abs().mean()) < bound
