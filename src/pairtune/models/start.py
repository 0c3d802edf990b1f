"""What a run starts from: a plain model, or one that was tuned before."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig

from pairtune.config import Method, OnTop, Reference, source_name
from pairtune.errors import BadInput
from pairtune.files import fill_folder, fingerprint, saved_fingerprint
from pairtune.models.load import LoadedBase, load_tokenizer, load_tuned, open_base
from pairtune.models.resolve import ModelSource, Target, merged_folder, resolve_model, resolve_target
from pairtune.models.save import save_best
from pairtune.run.folder import Run
from pairtune.run.records import Beginning, Lineage, Parent


@dataclass(frozen=True)
class Start:
    """A run's base model and, if it starts from a tuned one, what is recorded of that.

    Attributes:
        base: the model as the run uses it.
        lineage: None for a plain model.
        adapter: the adapter that the start has, which the run keeps a copy of; None if it has none.
        run: the run that the start comes from; None if there is none.
    """

    base: LoadedBase
    lineage: Lineage | None = None
    adapter: Path | None = None
    run: Run | None = None

    def keep(self, run: Run) -> None:
        """Write lineage and adapter into a new run, which from then on does not need its parent."""
        if self.lineage:
            run.write(self.lineage)
        if self.adapter:
            copy = shutil.copytree(self.adapter, run.paths.start, ignore=shutil.ignore_patterns("README.md", ".*"))
            for pickled in (*copy.glob("*.bin"), *copy.glob("*.pt")):
                pickled.unlink()


def open_start(name: str, dtype: str, on_top: OnTop | None, reference: Reference, method: Method) -> Start:
    """Find what a new run starts from.

    Args:
        name: what the user typed after `--model`.
        dtype: `auto`, `float32` or `bfloat16`.
        on_top: how to build on an adapter; None: train it further if the run trains adapters.
        reference: what the policy is measured against.
        method: what the run trains.

    Raises:
        BadInput: the model cannot be found or used, or a setting does not fit it.
    """
    target = resolve_target(name, "--model")
    if target.weights is None:
        for flag, given in (("--on-top", on_top), ("--reference base", reference == "base")):
            if given:
                raise BadInput(f"{flag}: --model {name} is not a tuned model, which this is for; omit the flag")
        return Start(open_base(name, dtype))
    if on_top == "continue" and not (target.adapted and method == "lora"):
        why = "all weights are trained (--method full)" if target.adapted else f"{name} has no adapter"
        raise BadInput(f"--on-top continue: {why}, so no adapter can be trained further; omit the flag")
    beginning: Beginning = "whole"
    if target.adapted:
        beginning = on_top or ("continue" if method == "lora" else "new")
    lineage = Lineage(base=_base_name(target), on_top=beginning, reference=reference, parents=_parents(target))
    adapter = target.weights if target.adapted else None
    if beginning == "new":
        below = resolve_model(lineage.base).folder
        name = f"{below.name[:40]}-{fingerprint([saved_fingerprint(below), lineage.start.weights])}"
        lineage = lineage.model_copy(update={"merged": name})
    return Start(_open(lineage, target.weights, dtype), lineage, adapter, target.run)


def open_base_of(run: Run) -> LoadedBase:
    """A run's base model in the dtype that the run used, which is not chosen again.

    If the run has saved a tokenizer with its weights, that tokenizer is used: a model that was tuned with an older
    default chat template keeps it.

    Raises:
        BadInput: the model cannot be found or used.
    """
    config, lineage, best = run.settings, run.lineage, run.paths.best
    dtype = run.choices.dtype or config.dtype
    if lineage is None:
        base = open_base(config.model, dtype)
    else:
        weights = Path(lineage.start.place) if lineage.on_top == "whole" else run.paths.start
        if not weights.is_dir():
            raise BadInput(f"{run.root}: starts from {weights}, which no longer exists")
        base = _open(lineage, weights, dtype)
    if not (best / "tokenizer_config.json").is_file():
        return base
    return replace(base, tokenizer=load_tokenizer(best))


def _open(lineage: Lineage, weights: Path, dtype: str) -> LoadedBase:
    """The whole model under a run's trials, with the tokenizer of the start at `weights`."""
    below = open_base(lineage.base, dtype)
    tokenizer = load_tokenizer(weights) if (weights / "tokenizer_config.json").is_file() else below.tokenizer
    reference = below.source if lineage.reference == "base" else None
    if lineage.on_top == "continue":
        return replace(below, tokenizer=tokenizer, adapter=weights, reference=reference)
    folder = weights if lineage.on_top == "whole" else _merged(lineage, below.source, weights)
    source = ModelSource(lineage.start.name, folder, "folder", str(folder.resolve()), below.source.licence)
    return replace(below, source=source, tokenizer=tokenizer, reference=reference)


def _base_name(target: Target) -> str:
    """The base under a tuned model, in a form that does not depend on the current folder."""
    return str(Path(target.base).resolve()) if Path(target.base).exists() else target.base


def _parents(target: Target) -> list[Parent]:
    """What a tuned model is, and what it was itself tuned from."""
    assert target.weights is not None  # noqa: S101 - it is a tuned model
    weights = saved_fingerprint(target.weights)
    run = target.run
    if run is None:
        local = Path(target.name).exists()
        name = Path(target.name).resolve().name if local else target.name
        place = str(target.weights.resolve()) if local else target.name
        return [Parent(name=name, kind="adapter", place=place, weights=weights)]
    name = f"{run.name}/{target.trial}" if target.trial else run.name
    data = [source_name(source.source) for source in run.settings.data]
    kind = "trial" if target.trial else "run"
    place = str(target.weights.resolve() if not target.adapted else run.root.resolve())
    own = Parent(name=name, kind=kind, place=place, weights=weights, data=data)
    return [own, *(run.lineage.parents if run.lineage else [])]


@torch.no_grad()
def _merged(lineage: Lineage, source: ModelSource, adapter: Path) -> Path:
    """The cache folder with a base model that an adapter was merged into; made at first use.

    The sum is rounded once, to the dtype in which the base is stored.
    """
    folder = merged_folder(lineage)
    if (folder / "config.json").is_file():
        return folder

    def fill(target: Path) -> None:
        tokenizer = load_tokenizer(adapter if (adapter / "tokenizer_config.json").is_file() else source)
        whole = LoadedBase(source, tokenizer, torch.float32, torch.device("cpu"))
        tuned = load_tuned(adapter, whole)
        assert isinstance(tuned, PeftModel)  # noqa: S101 - the folder has an adapter's settings
        stored = AutoConfig.from_pretrained(source.folder).dtype or torch.float32
        save_best(tuned.merge_and_unload().to(stored), tokenizer, target, str(folder))

    return fill_folder(folder, fill)
