"""Export a run's model as a folder that other tools load: the adapter, the full model with the adapter merged into it,
or the same as one GGUF file.

Every export passes a parity check: it is loaded again and compared with the trained model on held-out prompts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pairtune.chat_templates import end_token
from pairtune.conversation import Conversation
from pairtune.errors import BadInput, RunFailed
from pairtune.extras import require
from pairtune.files import fill_folder, write_json
from pairtune.models.generate import generate_answers
from pairtune.models.load import LoadedBase, is_adapted, load_model, load_tokenizer, load_tuned
from pairtune.models.resolve import ADAPTER_SETTINGS
from pairtune.models.sampling import SamplingParams
from pairtune.models.save import save_best
from pairtune.models.start import open_base_of
from pairtune.publish.modelfile import MODEL_FILE, Quantisation
from pairtune.run.folder import Run

Format = Literal["adapter", "merged", "gguf"]
FORMATS: tuple[Format, ...] = ("adapter", "merged", "gguf")

_PROMPTS = 4
_GREEDY = SamplingParams(max_tokens=48)
_ASKED = ({"role": "user", "content": "What is a lighthouse for?"},)

Loaded = tuple[Any, Any]  # a model and its tokenizer

PARITY = "parity.json"  # what the check of an export found


@dataclass(frozen=True)
class Parity:
    """Result of the parity check; written to the export's `parity.json`.

    Attributes:
        prompts: number of prompts compared.
        same_tokens: whether the rendered prompts have the same token ids.
        logp_difference: mean absolute difference of token log-probs on the trained model's own answers, in nats.
        tolerance: the largest difference allowed.
        same_answers: number of identical greedy answers.
        answers: the first prompt's greedy answers: trained, exported.
    """

    prompts: int
    same_tokens: bool
    logp_difference: float
    tolerance: float
    same_answers: int
    answers: tuple[str, str]

    @property
    def holds(self) -> bool:
        """Whether the export matches the trained model."""
        return self.same_tokens and self.logp_difference <= self.tolerance


def export_run(
    run: Run, kind: Format, target: Path, quantisation: Quantisation = "q8_0", trial: str | None = None
) -> Parity:
    """Export a run's model to a new folder, and check it.

    Args:
        run: a finished run.
        kind: the format.
        target: the new folder.
        quantisation: the type of a GGUF file's matrices.
        trial: the trial whose model is exported; None: the winner.

    Raises:
        BadInput: the folder exists, its parent does not, or the model cannot be exported in this format.
        RunFailed: the export does not match the trained model; nothing is left behind.
    """
    if kind == "gguf":
        require("gguf", "a GGUF file")
        if quantisation == "q4_k_m":
            require("llamacpp", "--quant q4_k_m")
    if target.exists():
        raise BadInput(f"--to {target}: already exists; choose another name or remove it first")
    if not target.absolute().parent.is_dir():
        raise BadInput(f"--to {target}: the folder {target.absolute().parent} does not exist; create it first")
    base, weights = open_base_of(run), run.paths.trial(trial).best if trial else run.paths.best
    found: list[Parity] = []

    def fill(folder: Path) -> None:
        rotary = _write(run, weights, kind, base, folder, quantisation)
        exported = _load(folder, kind, base, rotary)
        parity = check_parity(run, weights, base, exported, tolerance(kind, base.dtype, quantisation))
        if not parity.holds:
            raise RunFailed(
                f"{target}: the exported model does not match the trained one (same prompt tokens: "
                f"{parity.same_tokens}, mean log-prob difference: {parity.logp_difference:.4f} nats per token, "
                f"{parity.tolerance:g} allowed)"
            )
        write_json(folder / PARITY, {**vars(parity), "answers": list(parity.answers)})
        found.append(parity)

    fill_folder(target, fill)
    return found[0]


def tolerance(kind: Format, dtype: torch.dtype, quantisation: Quantisation) -> float:
    """The mean difference of token log-probs that is allowed, in nats.

    An adapter is the same computation; merging rounds W + BA once to the base's dtype; GGUF types keep 11, 8,
    4 to 6, and 4 bits of a weight.
    """
    merged = {torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]
    packed = {"f16": 0.0, "q8_0": 0.05, "q4_k_m": 0.5, "q4_1": 0.5}[quantisation]
    return {"adapter": 1e-4, "merged": merged, "gguf": merged + packed}[kind]


def _write(
    run: Run, weights: Path, kind: Format, base: LoadedBase, folder: Path, quantisation: Quantisation
) -> Mapping[str, Any] | None:
    """Write the model; return its rotary embedding's parameters, which a GGUF file does not hold."""
    adapted = (weights / ADAPTER_SETTINGS).is_file()
    if kind == "adapter":
        if not adapted:
            raise BadInput(f"{run.root}: the run trained the full model, so there is no adapter; use merged")
        shutil.copytree(weights, folder, dirs_exist_ok=True)
        _name_base(folder / ADAPTER_SETTINGS, base)
        return None
    model = load_tuned(weights, base)
    merged = model.merge_and_unload() if is_adapted(model) else model
    if kind == "gguf":
        from pairtune.publish.write_gguf import write_gguf

        write_gguf(merged, load_tokenizer(weights), folder, run.root.resolve().name, quantisation)
    else:
        save_best(merged, load_tokenizer(weights), folder, base.source)
    return getattr(merged.config, "rope_parameters", None)


def _name_base(file: Path, base: LoadedBase) -> None:
    """Make the adapter name its base model by Hub id, if it is on the Hub."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if base.source.hub_id:
        named = {"base_model_name_or_path": base.source.hub_id, "revision": base.source.revision}
        write_json(file, settings | named)


def _load(folder: Path, kind: Format, base: LoadedBase, rotary: Mapping[str, Any] | None) -> Callable[[], Loaded]:
    """A function that loads an export, called later so that only one model is in memory at a time."""

    def load() -> Loaded:
        if kind == "gguf":
            from pairtune.models.read_gguf import read_gguf

            model, tokenizer = read_gguf(folder / MODEL_FILE, rotary)
            return model.to(base.device), tokenizer
        model = load_tuned(folder, base) if kind == "adapter" else load_model(folder, base.dtype, base.device)
        return model, load_tokenizer(folder)

    return load


def check_parity(run: Run, weights: Path, base: LoadedBase, load: Callable[[], Loaded], allowed: float) -> Parity:
    """Compare an export with a run's trained `weights`; their log-probs may differ by `allowed` nats per token."""
    prompts = held_out(run)
    trained, tokenizer = load_tuned(weights, base), base.tokenizer
    answers = generate_answers(trained, tokenizer, prompts, _GREEDY)
    expected = [_logps(trained, tokenizer, prompt, each.text) for prompt, each in zip(prompts, answers, strict=True)]
    del trained
    exported, again = load()
    found = [_logps(exported, again, prompt, each.text) for prompt, each in zip(prompts, answers, strict=True)]
    said = generate_answers(exported, again, prompts, _GREEDY)
    same_tokens = all(one.shape == other.shape for one, other in zip(expected, found, strict=True)) and all(
        _ids(tokenizer, prompt) == _ids(again, prompt) for prompt in prompts
    )
    apart = (
        torch.cat([(one - other).abs() for one, other in zip(expected, found, strict=True)]) if same_tokens else None
    )
    return Parity(
        prompts=len(prompts),
        same_tokens=same_tokens,
        logp_difference=float("inf") if apart is None else float(apart.mean()),
        tolerance=allowed,
        same_answers=sum(one.text == other.text for one, other in zip(answers, said, strict=True)),
        answers=(answers[0].text, said[0].text),
    )


def held_out(run: Run) -> Sequence[Conversation]:
    """Prompts that the run was not trained on: those it answered at its end, or a built-in one."""
    return run.generations.prompts[:_PROMPTS] if run.generations else [_ASKED]


def _ids(tokenizer: Any, prompt: Conversation) -> list[int]:
    text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@torch.inference_mode()
def _logps(model: Any, tokenizer: Any, prompt: Conversation, answer: str) -> torch.Tensor:
    """Log-probs of an answer's tokens, its end token included."""
    asked = _ids(tokenizer, prompt)
    end: int = tokenizer.convert_tokens_to_ids(end_token(tokenizer))
    answered = [*tokenizer(answer, add_special_tokens=False)["input_ids"], end]
    row = torch.tensor([asked + answered], device=model.device)
    logps = model(row).logits[0, len(asked) - 1 : -1].float().log_softmax(-1)
    picked: torch.Tensor = logps.gather(1, row[0, len(asked) :, None])[:, 0].cpu()
    return picked
