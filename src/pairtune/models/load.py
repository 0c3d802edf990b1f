"""Loads weights and tokenizers."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import psutil
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.pytorch_utils import Conv1D

from pairtune.chat_templates import adds_bos
from pairtune.errors import BadInput, one_line
from pairtune.files import fingerprint
from pairtune.models.nf4 import named_weights, pack_linears
from pairtune.models.resolve import ADAPTER_SETTINGS, ModelSource, resolve_model

if TYPE_CHECKING:
    from peft import PeftModel

# For models that were never tuned to chat. It marks turns with plain words, since such a model has no tokens for them;
# the end token closes an answer, which the model learns in tuning. If the tokenizer begins plain text with BOS, so that
# the model has never seen text without it, BOS is put before the template. Saved with the tuned model's tokenizer.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class LoadedBase:
    """A base model as a run uses it.

    Attributes:
        source: the location of the whole weights under all adapters.
        tokenizer: its tokenizer.
        dtype: the dtype of its weights.
        device: where it computes.
        adapter: the folder of the adapter that trials train further; None: they start from the weights alone.
        reference: the model that policies are measured against; None: the one that they start from.
    """

    source: ModelSource
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    adapter: Path | None = None
    reference: ModelSource | None = None

    @property
    def reference_adapter(self) -> Path | None:
        """The adapter of the reference model; None if it is a whole model."""
        return self.adapter if self.reference is None else None


def open_base(name: str, dtype: str = "auto") -> LoadedBase:
    """Find a model and load its tokenizer; weights are loaded afresh wherever they are used.

    Args:
        name: what the user types after `--model`.
        dtype: `auto`, `float32` or `bfloat16`.

    Raises:
        BadInput: the model cannot be found or used.
    """
    source, device = resolve_model(name), pick_device()
    read_config(source)  # before anything slow
    return LoadedBase(
        source, load_tokenizer(source), pick_dtype(device) if dtype == "auto" else getattr(torch, dtype), device
    )


def pick_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """The device's name as shown to the user."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def pick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if this machine multiplies it clearly faster than float32, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    measured = measure_dtypes(device)
    faster = bool(measured) and measured["bfloat16"] * 1.2 < measured["float32"]
    return torch.bfloat16 if faster else torch.float32


@cache
def measure_dtypes(device: torch.device) -> dict[str, float]:
    """Seconds for one small matrix product by dtype on a CPU; measured once per process, which takes about 50 ms.

    It must be measured, since the same instruction set is fast on one processor and emulated on another. There are
    seven alternating rounds; the fastest one of each dtype counts.
    """
    best = {"float32": float("inf"), "bfloat16": float("inf")}
    for _ in range(7 if device.type == "cpu" else 0):
        for name, fastest in best.items():
            dtype = getattr(torch, name)
            x, w = torch.ones(256, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
            started = time.perf_counter()
            torch.nn.functional.linear(x, w)
            best[name] = min(fastest, time.perf_counter() - started)
    return best if device.type == "cpu" else {}


def load_tokenizer(source: ModelSource | Path) -> Any:
    """The model's tokenizer, with a padding token and a chat template (`DEFAULT_TEMPLATE` if it has none).

    Raises:
        BadInput: the folder has no usable tokenizer, or the tokenizer has no end token.
    """
    folder = source.folder if isinstance(source, ModelSource) else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BadInput(f"--model {_typed(source)}: the tokenizer cannot be loaded ({why_unloadable(error)})") from error
    if tokenizer.eos_token is None:
        raise BadInput(f"--model {_typed(source)}: the tokenizer has no end token, so answers could never end")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos(tokenizer) else "") + DEFAULT_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    source: ModelSource | Path, dtype: torch.dtype, device: torch.device | None = None, *, packed: bool = False
) -> PreTrainedModel:
    """Load fresh weights from disk. Every trial calls this again, so that no trial sees what another one trained.

    Args:
        source: the model, or the folder with its weights.
        dtype: the dtype of its weights.
        device: where it computes; by default the accelerator, if there is one.
        packed: keep the layers of an NF4 base in 4 bits. Results are the same, but its weights cannot be changed.

    Raises:
        BadInput: the folder holds no causal language model in safetensors format.
    """
    folder = source.folder if isinstance(source, ModelSource) else source
    transformers_logging.disable_progress_bar()  # the live view shows what is going on
    try:
        if sum(file.stat().st_size for file in folder.glob("*.safetensors")) >= LARGE:
            give_memory_back()
        packed = packed and isinstance(source, ModelSource) and source.kind == "nf4"
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16 if packed else dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise BadInput(f"--model {_typed(source)}: the weights cannot be loaded ({why_unloadable(error)})") from error
    if packed:
        pack_linears(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model.to(device or pick_device()).eval()


def load_answering(base: LoadedBase) -> PreTrainedModel:
    """A base model that is to generate answers.

    On a CPU it is not packed: unpacking all layers for every token takes longer than the rest of a pass.
    """
    return load_model(base.source, base.dtype, base.device, packed=base.device.type != "cpu")


# Weight files of so many bytes are worth looking for memory, which takes up to a second.
LARGE = 64 << 20


def give_memory_back() -> None:
    """Give memory that is not needed any more back to the system: that of earlier models, or of longer rows.

    Layers refer to themselves, so that only the garbage collector frees them; and glibc keeps what was freed, in pieces
    that the next model's tensors do not fit into, unless it is asked.
    """
    gc.collect()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def give_large_pieces_back() -> None:
    """Have glibc give memory of a megabyte and more back as soon as it is freed, from now on.

    By default it keeps ever larger pieces for later. Weights that are gathered and freed layer by layer leave them full
    of holes, which took as much memory again.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, 1 << 20)


_MMAP_THRESHOLD = -3  # glibc's number of this parameter


def why_unloadable(error: Exception) -> str:
    """Why transformers could not load a model, for a message in one line."""
    if "trust_remote_code" in str(error):
        return "it brings Python code of its own, which is never run; choose a model that transformers itself supports"
    return one_line(error)


def read_config(source: ModelSource) -> PretrainedConfig:
    """A model's config.

    Raises:
        BadInput: it cannot be read, or is of an architecture that transformers does not have.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise BadInput(f"--model {source.name}: its config.json cannot be used ({why_unloadable(error)})") from error
    return config


def blank_model(source: ModelSource) -> PreTrainedModel:
    """A model of the same architecture without weights, on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(read_config(source), trust_remote_code=False)
        if source.kind == "nf4":
            pack_linears(model)
    return model


def load_tuned(
    folder: Path, base: LoadedBase, model: PreTrainedModel | PeftModel | None = None, name: str = "default"
) -> PreTrainedModel | PeftModel:
    """Load the `best/` of a run or trial: the base model with its adapter, or the full model saved there.

    Args:
        folder: the folder with the weights.
        base: the base model that an adapter belongs to.
        model: the loaded base model to put the adapter on, which may have others already; loaded if not given.
        name: the name of the adapter within the model.

    Raises:
        BadInput: the folder holds neither an adapter nor a model, or the adapter does not fit.
    """
    if not (folder / ADAPTER_SETTINGS).is_file():
        return load_model(folder, base.dtype, base.device)
    from peft import PeftModel

    model = model or load_model(base.source, base.dtype, base.device)
    check_adapter(folder, blank_model(base.source) if is_adapted(model) else model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about a name that differs between PEFT and transformers
            if is_adapted(model):
                model.load_adapter(folder, name)
                return model.eval()
            return PeftModel.from_pretrained(model, folder, name).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"{folder}: the adapter cannot be loaded ({one_line(error)})") from error


def is_adapted(model: Any) -> TypeGuard[PeftModel]:
    """Whether PEFT has put adapters on a model; does not import PEFT to say no."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def check_adapter(folder: Path, model: torch.nn.Module) -> None:
    """Compare a LoRA adapter with the model that it is to be put on, before memory is taken for either.

    The adapter's own numbers decide how much that is, so a wrong or malicious rank would otherwise fill the memory.

    Args:
        folder: the adapter's folder; of its weights only the header is read.
        model: the model, or one of its architecture on the meta device.

    Raises:
        BadInput: the files cannot be read, or ranks or shapes do not fit.
    """
    try:
        settings = json.loads((folder / ADAPTER_SETTINGS).read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
        ranks = [settings.get("r", 0), *(settings.get("rank_pattern") or {}).values()]
        highest = max(map(int, ranks))
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise BadInput(f"{folder}: the adapter cannot be loaded ({one_line(error)})") from error
    layers = dict(model.named_modules())
    found = 0
    for name, shape in shapes.items():
        layer, _, rest = name.removeprefix("base_model.model.").rpartition(".lora_")
        if rest not in ("A.weight", "B.weight") or len(shape) != 2:
            continue  # DoRA's magnitudes and whole layers are checked by PEFT
        module = layers.get(layer)
        if isinstance(module, Conv1D):
            sizes = (module.nx, module.nf)
        elif isinstance(module, torch.nn.Linear):
            sizes = (module.in_features, module.out_features)
        else:
            told = "is no layer of this model" if module is None else "is no linear layer"
            raise BadInput(f"{folder}: the adapter does not fit its base model: {layer} {told}")
        rank, size = shape if rest == "A.weight" else shape[::-1]
        if size != sizes[rest == "B.weight"]:
            raise BadInput(f"{folder}: the adapter does not fit its base model: {name} is {shape}, the layer {sizes}")
        found = max(found, rank)
    if found and highest > found:
        raise BadInput(f"{folder}: {ADAPTER_SETTINGS} says rank {highest:,}, and the weights have {found:,}")


def weights_fingerprint(model: torch.nn.Module) -> str:
    """A fingerprint of every parameter's name, shape, dtype and bits, independent of order and device.

    A model that another trial has trained, or that already has an adapter, has a different one than the base.
    """

    def parts() -> Iterator[memoryview | str]:
        for name, tensor in named_weights(model):
            values = tensor.detach().cpu().contiguous()
            yield name
            yield f"{values.dtype}{tuple(values.shape)}"
            yield values.flatten().view(torch.uint8).numpy().data  # not copied: there may be no room

    return fingerprint(parts())


def _typed(source: ModelSource | Path) -> str:
    return source.name if isinstance(source, ModelSource) else str(source)
