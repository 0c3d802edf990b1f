"""Write a model as one GGUF file, for llama.cpp and the tools built on it.

The `gguf` package of llama.cpp writes the file and packs the weights. This module supplies what the format needs for
the Llama, Qwen2 and Qwen3 families: names, shapes, order of the rotary dimensions, tokenizer, chat template.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pairtune.chat_templates import adds_bos, end_token, leaves_out_bos
from pairtune.errors import BadInput, RunFailed
from pairtune.models.generate import end_tokens
from pairtune.publish.modelfile import MODEL_FILE, Quantisation, modelfile

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
}
_BLOCK = 32  # weights that share a scale, in q8_0 and q4_1
_SPECIAL = ("bos", "eos", "unk", "pad")

# Pre-tokenizer patterns of byte-level tokenizers, and llama.cpp's names for them. They differ in how they split
# digits: in groups of up to three (Llama 3), or one by one (Qwen).
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {_WORDS % r"\p{N}{1,3}": "llama-bpe", _WORDS % r"\p{N}": "qwen2"}


def write_gguf(model: PreTrainedModel, tokenizer: Any, folder: Path, name: str, quantisation: Quantisation) -> None:
    """Write `model.gguf` and Ollama's `Modelfile` into a folder.

    Norms and biases are float32; matrices whose row length is not a multiple of 32 are float16. In q4_1 the embedding
    and the output layer are q8_0, since llama.cpp's own quantisations keep them finer, too. In q4_k_m, llama.cpp
    chooses.

    Raises:
        BadInput: the model's family, rotary embedding or tokenizer is not supported.
        RunFailed: llama.cpp could not write q4_k_m.
    """
    config = model.config
    if config.model_type not in _ARCHITECTURES:
        raise BadInput(f"GGUF export supports the Llama, Qwen2 and Qwen3 families, not {config.model_type}; use merged")
    if quantisation == "q4_k_m":
        with TemporaryDirectory(dir=folder) as scratch:
            write_gguf(model, tokenizer, Path(scratch), name, "f16")
            _quantise(Path(scratch) / MODEL_FILE, folder / MODEL_FILE)
            (Path(scratch) / "Modelfile").rename(folder / "Modelfile")
        return
    writer = gguf.GGUFWriter(folder / MODEL_FILE, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[config.model_type]], True)
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[quantisation])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _describe(writer, config)
    _add_tokenizer(writer, tokenizer, config, sorted(end_tokens(model, tokenizer)))
    for tensor, values in _tensors(model):
        kind = _type_of(tensor, values, quantisation)
        writer.add_tensor(tensor, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "Modelfile").write_text(modelfile(MODEL_FILE, tokenizer), encoding="utf-8")


def _quantise(file: Path, target: Path) -> None:
    """Let llama.cpp write a float16 file again in its mixture of four to six bits a weight."""
    import llama_cpp

    llama_cpp.llama_log_set(_silent(), None)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    if llama_cpp.llama_model_quantize(bytes(file), bytes(target), ctypes.byref(settings)):
        raise RunFailed(f"{target}: llama.cpp could not quantise the model; use --quant q8_0")


@cache
def _silent() -> Any:
    """A log callback that does nothing; kept, since llama.cpp calls it as long as the process lives."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda *_: None)


def _describe(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write the model's dimensions under GGUF's names."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight in float32 under GGUF's name; an output layer tied to the embedding is left out."""
    config = model.config
    names = gguf.get_tensor_name_map(_ARCHITECTURES[config.model_type], config.num_hidden_layers)
    if (factors := _rope_factors(config)) is not None:
        yield "rope_freqs.weight", factors
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if renamed is None:
            raise BadInput(f"GGUF has no name for the weight {name} of this model; use merged")
        values = weight.detach().float().cpu().numpy()
        if config.model_type == "llama" and (found := re.search(r"\.([qk])_proj\.", name)):
            values = _interleave(values, config.num_attention_heads if found[1] == "q" else config.num_key_value_heads)
        yield renamed, values


def _interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorder from rotating the halves of a head (transformers) to rotating neighbours (llama.cpp for Llama)."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _rope_factors(config: Any) -> np.ndarray | None:
    """The factors by which Llama 3.1's rotary embedding slows each pair of dimensions; None for the plain one."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return None
    if kind != "llama3":
        raise BadInput(f"GGUF export supports plain and Llama 3 rotary embeddings, not {kind}; use merged")
    slowed, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    width = 2 * len(slowed)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2).float() / width)
    factors: np.ndarray = (plain / slowed).numpy().astype(np.float32)
    return factors


def _type_of(name: str, values: np.ndarray, quantisation: Quantisation) -> gguf.GGMLQuantizationType:
    types = gguf.GGMLQuantizationType
    if values.ndim == 1:
        return types.F32
    if quantisation == "f16" or values.shape[-1] % _BLOCK:
        return types.F16
    if quantisation == "q8_0" or name in ("token_embd.weight", "output.weight"):
        return types.Q8_0
    return types.Q4_1


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, config: Any, ends: list[int]) -> None:
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
    writer.add_tokenizer_pre(_pre_tokenizer(settings))
    added = {each["id"]: each for each in settings["added_tokens"]}
    tokens, kinds = [], []
    for number in range(config.vocab_size):
        token = tokenizer.convert_ids_to_tokens(number) if number < len(tokenizer) else None
        tokens.append(
            f"[PAD{number}]" if token is None else token
        )  # the embedding may have more rows than there are tokens
        if token is None:
            kinds.append(gguf.TokenType.UNUSED)
        elif number in added:
            kinds.append(gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in settings["model"]["merges"]])
    for special in _SPECIAL:
        if (known := getattr(tokenizer, f"{special}_token_id", None)) is not None:
            getattr(writer, f"add_{special}_token_id")(known)
    own = tokenizer.convert_tokens_to_ids(end_token(tokenizer))
    if others := [end for end in (own, *ends) if end != tokenizer.eos_token_id]:
        writer.add_eot_token_id(others[0])
    # Where the template omits BOS, the model was tuned without it, and llama.cpp must not prepend it to prompts.
    writer.add_add_bos_token(adds_bos(tokenizer) and not leaves_out_bos(tokenizer))
    writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(settings: Any) -> str:
    """llama.cpp's name for how this tokenizer splits text.

    Raises:
        BadInput: llama.cpp has no equivalent.
    """
    model, steps = settings["model"], settings["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    bytewise = model["type"] == "BPE" and not model.get("byte_fallback") and kinds[-1:] == ["ByteLevel"]
    if bytewise and model["merges"]:
        if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and (cut := _CUTS.get(steps[0]["pattern"].get("Regex", ""))):
            return cut
    raise BadInput(
        "GGUF export supports the byte-level tokenizers of Llama 3, Qwen, SmolLM2 and GPT-2, not this model's; export "
        "it as merged, and convert that with llama.cpp's own converter"
    )
