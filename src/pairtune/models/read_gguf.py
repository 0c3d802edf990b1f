"""Loads models from GGUF files with transformers' own reader."""

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
    """The weights of a GGUF file, dequantised to float32, and its tokenizer with the chat template in the file.

    Args:
        file: the file to read.
        rotary: the RoPE parameters, for a file that scales some of the frequencies (Llama 3.1 and later). The file
            contains only the scaling factors, and transformers' reader drops them.

    Raises:
        ValueError: the file has such factors, and no parameters are given.
        OSError, ValueError, KeyError, ImportError, RuntimeError: from transformers, if the file is not GGUF or of an
            unsupported kind.
    """
    scaled = any(tensor.name == "rope_freqs.weight" for tensor in gguf.GGUFReader(file).tensors)
    if scaled and rotary is None:
        raise ValueError("Llama 3.1's rotary embedding cannot be read from GGUF; use the model's safetensors")
    with redirect_stderr(io.StringIO()):  # hides its progress bar; failures are raised, not printed
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
        )
    if hasattr(model.config, "quantization_config"):  # the weights are dense now, and the config must agree
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
    if scaled:
        model.config.rope_parameters = dict(rotary or {})
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.eval(), tokenizer
