"""Saves trained weights in the formats that `from_pretrained` reads: a PEFT adapter, or a full model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from pairtune.errors import RunFailed, one_line
from pairtune.files import fill_folder, saved_fingerprint
from pairtune.models.generate import end_tokens
from pairtune.models.load import is_adapted
from pairtune.models.resolve import ModelSource

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def save_best(model: PreTrainedModel | PeftModel, tokenizer: Any, folder: Path, base: ModelSource) -> str:
    """Write a model (only the adapter, if it has one) with its tokenizer, replacing the content of `folder`.

    An adapter's config names the base and its revision, so that `AutoPeftModelForCausalLM.from_pretrained` finds it.
    A full model's generation config lists all tokens that end its answers, so that they end the same in other tools.

    Returns:
        The fingerprint of the weights written; see `saved_fingerprint`.
    """

    def fill(target: Path) -> None:
        if is_adapted(model):
            for adapter in model.peft_config.values():
                adapter.base_model_name_or_path, adapter.revision = base.published_as, base.revision
        else:
            ends = sorted(end_tokens(model, tokenizer))
            model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        with explaining_writers(folder):
            model.save_pretrained(target, safe_serialization=True)
            tokenizer.save_pretrained(target)
        (target / "README.md").unlink(
            missing_ok=True
        )  # PEFT's card is an empty template; ours is generated from the run

    return saved_fingerprint(fill_folder(folder, fill))


@contextmanager
def explaining_writers(folder: Path) -> Iterator[None]:
    """Turn what the writers of safetensors and tokenizers say of a full disk into one line.

    Raises:
        RunFailed: something could not be written.
    """
    try:
        yield
    except Exception as error:
        if type(error) not in (SafetensorError, Exception):  # tokenizers raises nothing narrower
            raise
        raise RunFailed(
            f"{folder}: the model cannot be written ({one_line(error)}); free some disk space, then `pairtune "
            "resume RUN` goes on with an unfinished run"
        ) from error


def save_adapter(
    tensors: Mapping[str, Tensor], config: LoraConfig, tokenizer: Any, folder: Path, base: ModelSource
) -> str:
    """Write an adapter in PEFT's format with its tokenizer, replacing the content of `folder`; see `save_best`."""

    def fill(target: Path) -> None:
        config.base_model_name_or_path, config.revision = base.published_as, base.revision
        config.save_pretrained(target)
        content = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with explaining_writers(folder):
            save_file(content, target / "adapter_model.safetensors", metadata={"format": "pt"})
            tokenizer.save_pretrained(target)

    return saved_fingerprint(fill_folder(folder, fill))
