"""Models out of GGUF files, through transformers' own reader."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def read_gguf(file: Path, rotary: Mapping[str, Any] | None = None) -> tuple[PreTrainedModel, Any]:
    """A GGUF file's weights, dense and in float32, and its tokenizer with the chat template that it carries.

    Args:
        file: to read.
        rotary: the rotary embedding's parameters, for a file that slows some of its frequencies (Llama 3.1 and later).
            The file holds factors only, and transformers' reader drops them.

    Raises:
        ValueError: the file has such factors, and no parameters are given.
        OSError, ValueError, KeyError, ImportError, RuntimeError: as transformers does, where the file is no GGUF or
            of a kind that it does not know.
    """
    slowed = any(tensor.name == "rope_freqs.weight" for tensor in gguf.GGUFReader(file).tensors)
    if slowed and rotary is None:
        raise ValueError("Llama 3.1's rotary embedding cannot be read from GGUF; use the model's safetensors")
    with redirect_stderr(io.StringIO()):  # its progress bar; a failure is raised, not printed
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):  # the weights are dense now, and the config says so
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
    if slowed:
        model.config.rope_parameters = dict(rotary or {})
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.eval(), tokenizer
