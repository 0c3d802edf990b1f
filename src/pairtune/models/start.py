"""What a run starts from: a plain model, or one that was tuned before."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pairtune.config import Method, OnTop, Reference, source_name
from pairtune.errors import BadInput
from pairtune.files import fill_folder, fingerprint, saved_fingerprint
from pairtune.models.load import LoadedBase, is_adapted, load_tokenizer, load_tuned, open_base, read_config
from pairtune.models.resolve import NF4, ModelSource, Target, merged_folder, resolve_model, resolve_target
from pairtune.models.save import save_best
from pairtune.run.folder import Run
from pairtune.run.records import Beginning, Lineage, Parent


@dataclass(frozen=True)
class Start:
    """A run's base model and, if it starts from a tuned one, what is recorded of that.

    Attributes:
        base: the model as the run uses it.
        lineage: None for a plain model.
        merged: the adapters that are merged into the ground, in order; the run keeps copies.
        run: the run that the start comes from; None if there is none.
    """

    base: LoadedBase
    lineage: Lineage | None = None
    merged: tuple[Path, ...] = ()
    run: Run | None = None

    def keep(self, run: Run) -> None:
        """Write lineage and adapters into a new run, which from then on needs no parent but a fully tuned one."""
        if self.lineage:
            run.write(self.lineage)
        for number, adapter in enumerate(self.merged):
            _copy(adapter, _merged_adapter(run, number))
        if self.base.adapter:
            _copy(self.base.adapter, run.paths.start)


def _copy(adapter: Path, target: Path) -> None:
    """Copy an adapter with its tokenizer; nothing pickled, and nothing of the runs that it comes from."""
    target.mkdir(parents=True, exist_ok=True)
    for file in adapter.iterdir():
        if file.is_file() and file.suffix not in (".bin", ".pt", ".npz", ".md"):
            shutil.copy(file, target / file.name)


def _merged_adapter(run: Run, number: int) -> Path:
    return Path(run.paths.start) / "merged" / str(number)


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
    check_method(name, method)
    target = resolve_target(name, "--model")
    if target.weights is None:
        for flag, given in (("--on-top", on_top), ("--reference base", reference == "base")):
            if given:
                raise BadInput(f"{flag}: --model {name} is not a tuned model, which this is for; omit the flag")
        return Start(open_base(name, dtype))
    if on_top == "continue" and not (target.adapted and method == "lora"):
        why = "all weights are trained (--method full)" if target.adapted else f"{name} has no adapter"
        raise BadInput(f"--on-top continue: {why}, so no adapter can be trained further; omit the flag")
    before = target.run.lineage if target.run else None
    base = before.base if before else _lasting(target.run.settings.model if target.run else target.base)
    ground, ground_weights = base, ""
    merged: tuple[Path, ...] = ()
    if before and target.run:
        ground, ground_weights = before.ground, before.ground_weights
        merged = tuple(_merged_adapter(target.run, number) for number in range(before.merged))
    beginning: Beginning = "whole"
    adapter = None
    if not target.adapted:
        ground, merged = str(target.weights.resolve()), ()
        ground_weights = saved_fingerprint(target.weights)
    elif (on_top or ("continue" if method == "lora" else "new")) == "continue":
        beginning, adapter = "continue", target.weights
    else:
        beginning, merged = "new", (*merged, target.weights)
    lineage = Lineage(
        base=base,
        ground=ground,
        ground_weights=ground_weights,
        on_top=beginning,
        reference=reference,
        merged=len(merged),
        merged_as=_merged_name(ground, merged) if merged else "",
        parents=_parents(target),
    )
    return Start(_open(lineage, merged, adapter, dtype), lineage, merged, target.run)


def check_method(name: str, method: Method) -> None:
    """Refuse to train all weights of a base in 4 bits, before that base is made.

    Raises:
        BadInput: that is asked for.
    """
    if method == "full" and name.endswith(NF4) and not Path(name).exists():
        raise BadInput(f"--method full: {name} keeps its weights in 4 bits, which are not trained; omit {NF4}")


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
        merged = tuple(_merged_adapter(run, number) for number in range(lineage.merged))
        base = _open(lineage, merged, run.paths.start if lineage.on_top == "continue" else None, dtype)
    if not (best / "tokenizer_config.json").is_file():
        return base
    return replace(base, tokenizer=load_tokenizer(best))


def _open(lineage: Lineage, merged: Sequence[Path], adapter: Path | None, dtype: str) -> LoadedBase:
    """The whole model under a run's trials, with the tokenizer of what the run starts from."""
    below = open_base(lineage.ground, dtype)
    if lineage.ground_weights and saved_fingerprint(below.source.folder) != lineage.ground_weights:
        raise BadInput(
            f"{lineage.ground}: holds other weights than those that this run was built on ({lineage.ground_weights}); "
            "restore them, or start a new run"
        )
    source = below.source
    if merged:
        folder = _merge(lineage, source, merged)
        source = ModelSource(lineage.start.name, folder, "folder", str(folder.resolve()), source.licence)
    elif lineage.on_top == "whole":
        licence = resolve_model(lineage.base).licence
        source = ModelSource(lineage.start.name, source.folder, "folder", str(source.folder.resolve()), licence)
    with_tokenizer = [each for each in (*merged, adapter) if each and (each / "tokenizer_config.json").is_file()]
    tokenizer = load_tokenizer(with_tokenizer[-1]) if with_tokenizer else below.tokenizer
    reference = resolve_model(lineage.base) if lineage.reference == "base" else None
    return replace(below, source=source, tokenizer=tokenizer, adapter=adapter, reference=reference)


def _lasting(name: str) -> str:
    """A model's name in a form that does not depend on the current folder, nor on what the Hub's `main` is later."""
    if Path(name).exists():
        return str(Path(name).resolve())
    return f"{_lasting(name.removesuffix(NF4))}{NF4}" if name.endswith(NF4) else resolve_model(name).pinned


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


def _merged_name(ground: str, adapters: Sequence[Path]) -> str:
    """The name of a folder for merged weights; the same for the same weights."""
    folder = resolve_model(ground).folder
    return f"{folder.name[:40]}-{fingerprint([saved_fingerprint(folder), *map(saved_fingerprint, adapters)])}"


@torch.no_grad()
def _merge(lineage: Lineage, ground: ModelSource, adapters: Sequence[Path]) -> Path:
    """The cache folder with whole weights that adapters were merged into, one after the other; made at first use.

    Each sum is rounded once, to the dtype in which the ground is stored.
    """
    final = merged_folder(lineage)
    if (final / "config.json").is_file():
        return final
    stored = read_config(ground).dtype or torch.float32
    folder = ground.folder
    for number, adapter in enumerate(adapters, 1):
        made = final if number == len(adapters) else final.parent / _merged_name(lineage.ground, adapters[:number])
        if not (made / "config.json").is_file():
            below = folder

            def fill(target: Path, below: Path = below, adapter: Path = adapter) -> None:
                own = (adapter / "tokenizer_config.json").is_file()
                tokenizer = load_tokenizer(adapter if own else below)
                source = ModelSource(str(below), below, "folder", str(below))
                tuned = load_tuned(adapter, LoadedBase(source, tokenizer, torch.float32, torch.device("cpu")))
                assert is_adapted(tuned)  # noqa: S101 - the folder has an adapter's settings
                save_best(tuned.merge_and_unload().to(stored), tokenizer, target, source)

            fill_folder(made, fill)
        folder = made
    return folder
