"""What can be talked to: the base, every tuned model of the runs that are served, and plain models."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pairtune.config import resolve
from pairtune.errors import BadInput, one_line
from pairtune.models.load import load_model, load_tokenizer, open_base
from pairtune.models.resolve import ADAPTER_SETTINGS, base_of_adapter, find_adapter, resolve_model
from pairtune.runs import RunFolder, saved_fingerprint
from pairtune.serve.lane import Lane, Limits

log = logging.getLogger(__name__)

# Whole models in memory; adapters take little beside them.
MODELS = 3


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
        self._lanes: dict[tuple[str, str, str], Lane] = {}
        self._bases: dict[str, Path] = {}  # folders, by what is typed: finding one may mean hashing a file
        self._fingerprints: dict[tuple[Path, int], str] = {}
        self._lock = threading.Lock()
        self._named: dict[str, Served] = {}
        for each in (model for target in self._targets for model in _models_of(target)):
            if self._named.setdefault(each.id, each).folder != each.folder:
                raise BadInput(f"{each.folder}: another model is called {each.id} as well; rename one of the folders")

    def models(self) -> dict[str, Served]:
        """By name; runs that are gone are not there, new ones are."""
        found = {each.id: each for each in self._named.values() if each.folder is None or each.folder.is_dir()}
        for folder in sorted(self._root.iterdir()) if self._root and self._root.is_dir() else []:
            try:
                if (folder / "COMPLETE").is_file():
                    found |= {each.id: each for each in _models_of(str(folder)) if each.id not in found}
            except (BadInput, OSError):
                continue  # a damaged run; the site says what is wrong with it
        return found

    def usable(self) -> list[Served]:
        """Those whose base is to be had as well."""
        found = []
        for each in self.models().values():
            try:
                self.fingerprint(each)
            except (BadInput, OSError) as error:
                log.warning("%s is not served: %s", each.id, one_line(error, 200))
                continue
            found.append(each)
        return found

    def fingerprint(self, model: Served) -> str:
        """Of the base's weight files, and of the adapter's: what an answer was really computed with."""
        if model.base not in self._bases:
            self._bases[model.base] = resolve_model(model.base).folder
        base = self._hash(self._bases[model.base])
        return base if model.folder is None else f"{base}+{self._hash(model.folder)}"

    def lane(self, model: Served) -> Lane:
        """The model in memory, or its base where it is an adapter; loads what is not there yet.

        Raises:
            BadInput: it cannot be loaded.
        """
        own = None if model.adapted else model.folder
        # By what the weights are, too: a run that was made again under its name is another model.
        key = (str(own or model.base), model.dtype, self.fingerprint(model).partition("+")[2] if own else "")
        if known := self._lanes.get(key):
            return known
        with self._lock:
            if key not in self._lanes:
                self._forget_idle()
                base = open_base(model.base, model.dtype)
                loaded = load_model(own or base.source, base.dtype, base.device)
                self._lanes[key] = Lane(loaded, load_tokenizer(own or base.source), self._limits)
            return self._lanes[key]

    def _forget_idle(self) -> None:
        """Make room for a model, where several are in memory and nobody talks to one of them."""
        for key, lane in list(self._lanes.items()):
            if len(self._lanes) >= MODELS and not (lane.load["answering"] or lane.load["waiting"]):
                self._lanes.pop(key).close()

    def adapter(self, model: Served) -> tuple[str, Path] | None:
        """Fingerprint and folder of its adapter."""
        return (self._hash(model.folder), model.folder) if model.adapted and model.folder else None

    def loads(self) -> dict[str, dict[str, int]]:
        """How much is going on, by the models in memory."""
        return {key[0]: lane.load for key, lane in list(self._lanes.items())}

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
        dtype = run.choices().get("dtype", config.dtype)
        yield Served(config.model, config.model, dtype)
        yield Served(name, config.model, dtype, run.best, folder, created)
        for trial in sorted(run.trials.iterdir()) if run.trials.is_dir() else []:
            if (trial / "best").is_dir():
                yield Served(f"{name}/{trial.name}", config.model, dtype, trial / "best", folder, created)
    elif adapter := find_adapter(target):
        base = base_of_adapter(adapter)
        yield Served(base, base)
        yield Served(folder.name if folder.is_dir() else target, base, folder=adapter)
    else:
        resolve_model(target, "MODEL")
        yield Served(target, target)
