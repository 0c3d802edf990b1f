"""What can be talked to: the base, every tuned model of the runs that are served, and plain models."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pairtune.config import resolve
from pairtune.errors import BadInput
from pairtune.models.load import LoadedBase, load_model, load_tokenizer, open_base
from pairtune.models.resolve import ADAPTER_SETTINGS, base_of_adapter, find_adapter, resolve_model
from pairtune.runs import RunFolder, saved_fingerprint
from pairtune.serve.lane import Lane, Limits


@dataclass(frozen=True)
class Served:
    """One model by the name under which it is asked for.

    Attributes:
        id: the name: the base's, the run's for its winner, `run/trial` for a trial.
        base: what a person would type after `--model` for its base.
        dtype: in which it is computed.
        folder: of its adapter or, where the whole model was trained, of its weights; None: the base itself.
        run: the folder of the run that it comes from.
        created: seconds since 1970.
    """

    id: str
    base: str
    dtype: str = "auto"
    folder: Path | None = None
    run: Path | None = None
    created: int = 0

    @property
    def adapted(self) -> bool:
        """Whether it is an adapter on its base."""
        return self.folder is not None and (self.folder / ADAPTER_SETTINGS).is_file()


class Catalogue:
    """Models by name, and in memory once they are used. Methods may be called from any thread.

    Args:
        targets: run folders, adapters and models that were named.
        root: a folder whose finished runs are served as well, also those that are finished later.
        limits: of each model in memory.

    Raises:
        BadInput: a target is none of these, or an unfinished run.
    """

    def __init__(self, targets: Sequence[str], root: Path | None, limits: Limits) -> None:
        self._targets, self._root, self._limits = list(targets), root, limits
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._bases: dict[tuple[str, str], LoadedBase] = {}
        self._fingerprints: dict[tuple[Path, int], str] = {}
        self._lock = threading.Lock()
        named = [list(_models_of(target)) for target in self._targets]
        self._named = {each.id: each for models in named for each in models}

    def models(self) -> dict[str, Served]:
        """By name; runs that are gone are not there, new ones are."""
        found = {each.id: each for each in self._named.values() if each.folder is None or each.folder.is_dir()}
        for folder in sorted(self._root.iterdir()) if self._root and self._root.is_dir() else []:
            if (folder / "COMPLETE").is_file():
                try:
                    found |= {each.id: each for each in _models_of(str(folder)) if each.id not in found}
                except BadInput:
                    continue  # a damaged run; the site says what is wrong with it
        return found

    def fingerprint(self, model: Served) -> str:
        """Of the base's weight files, and of the adapter's: what an answer was really computed with."""
        base = self._hash(resolve_model(model.base).folder)
        return base if model.folder is None else f"{base}+{self._hash(model.folder)}"

    def lane(self, model: Served) -> Lane:
        """The model in memory, or its base where it is an adapter; loads what is not there yet.

        Raises:
            BadInput: it cannot be loaded.
        """
        weights = model.base if model.adapted or model.folder is None else str(model.folder)
        with self._lock:
            key = (weights, model.dtype)
            if key not in self._lanes:
                base = open_base(model.base, model.dtype)
                own = None if weights == model.base else model.folder
                loaded = load_model(own or base.source, base.dtype, base.device)
                self._lanes[key] = Lane(loaded, load_tokenizer(own or base.source), self._limits)
            return self._lanes[key]

    def adapter(self, model: Served) -> tuple[str, Path] | None:
        """Fingerprint and folder of its adapter."""
        return (self._hash(model.folder), model.folder) if model.adapted and model.folder else None

    def loads(self) -> dict[str, dict[str, int]]:
        """How much is going on, by the models in memory."""
        return {weights: lane.load for (weights, _), lane in list(self._lanes.items())}

    def close(self) -> None:
        """End all lanes."""
        for lane in self._lanes.values():
            lane.close()

    def _hash(self, folder: Path) -> str:
        changed = max((file.stat().st_mtime_ns for file in folder.glob("*.safetensors")), default=0)
        key = (folder, changed)
        if key not in self._fingerprints:
            self._fingerprints[key] = saved_fingerprint(folder)
        return self._fingerprints[key]


def _models_of(target: str) -> Iterator[Served]:
    folder = Path(target)
    if (folder / "config.yaml").is_file() or (folder / "trials").is_dir():
        run = RunFolder.finished(folder)
        config = resolve(run.config, {}).config
        created, name = int(run.complete.stat().st_mtime), folder.resolve().name
        yield Served(config.model, config.model, config.dtype)
        yield Served(name, config.model, config.dtype, run.best, folder, created)
        for trial in sorted(run.trials.iterdir()):
            if (trial / "best").is_dir():
                yield Served(f"{name}/{trial.name}", config.model, config.dtype, trial / "best", folder, created)
    elif adapter := find_adapter(target):
        base = base_of_adapter(adapter)
        yield Served(base, base)
        yield Served(folder.name if folder.is_dir() else target, base, folder=adapter)
    else:
        resolve_model(target, "MODEL")
        yield Served(target, target)
