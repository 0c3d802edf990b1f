"""The served models: base models, all tuned models of the served runs, and plain models."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairtune.conversation import Conversation
from pairtune.errors import BadInput, one_line
from pairtune.files import saved_fingerprint
from pairtune.models.generate import end_tokens
from pairtune.models.load import load_answering, load_model, load_tokenizer, open_base
from pairtune.models.resolve import ADAPTER_SETTINGS, resolve_model, resolve_target
from pairtune.models.sampling import SamplingParams
from pairtune.models.start import open_base_of
from pairtune.run.folder import Run
from pairtune.serve.request import AdapterRef, Event, GenerationRequest, Limits
from pairtune.serve.scheduler import BatchScheduler

log = logging.getLogger(__name__)

# Maximum number of whole models in memory; adapters are small in comparison.
_MODELS = 3


@dataclass(frozen=True)
class ServedModel:
    """A model that requests can name.

    Attributes:
        id: the name: the base's, the run's for its winner, or `run/trial` for a trial.
        base: its base model, as given to `--model`.
        dtype: the dtype to compute in.
        folder: the folder of its adapter or, if the whole model was trained, of its weights; None: the base itself.
        run: the folder of its run.
        created: Unix time.
    """

    id: str
    base: str
    dtype: str = "auto"
    folder: Path | None = None
    run: Path | None = None
    created: int = 0

    @property
    def adapted(self) -> bool:
        """Whether the model is an adapter on its base."""
        return self.folder is not None and (self.folder / ADAPTER_SETTINGS).is_file()


@dataclass(frozen=True)
class OpenedModel:
    """A model in memory, ready for requests.

    Attributes:
        scheduler: the scheduler of its base, or its own if the whole model was trained.
        adapter: its adapter; None: the scheduler's model unchanged.
        tokenizer: its own tokenizer, with the chat template that it was tuned with.
        stop_token_ids: tokens that end its answers.
        fingerprint: hashes of the base's weight files and the adapter's.
    """

    scheduler: BatchScheduler
    adapter: AdapterRef | None
    tokenizer: Any
    stop_token_ids: frozenset[int]
    fingerprint: str

    @property
    def context(self) -> int:
        """Maximum tokens of prompt and answer together."""
        return self.scheduler.limits.context

    def encode(self, turns: Conversation, *, goes_on: bool = False) -> list[int]:
        """Tokenize a conversation with the chat template, including the generation prompt.

        Args:
            turns: the conversation.
            goes_on: whether its last turn is the beginning of an answer, which then stays open.

        Raises:
            TemplateError: the template rejects the conversation.
            ValueError: the template changes the beginning of the answer, so that it cannot be continued.
        """
        how = {"continue_final_message": True} if goes_on else {"add_generation_prompt": True}
        text = self.tokenizer.apply_chat_template(list(turns), tokenize=False, **how)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def request(self, ids: list[int], params: SamplingParams, emit: Callable[[Event], None]) -> GenerationRequest:
        """Make a request for this model's scheduler."""
        return GenerationRequest(ids, params, self.adapter, self.tokenizer, self.stop_token_ids, emit)


class Catalogue:
    """The served models by name, loaded on first use. Methods may be called from any thread.

    Args:
        targets: run folders, adapters and models to serve.
        root: a folder whose finished runs are served too, including those that finish later.
        limits: the limits of each model's scheduler.

    Raises:
        BadInput: a target is none of these, or an unfinished run.
    """

    def __init__(self, targets: Sequence[str], root: Path | None, limits: Limits) -> None:
        self._targets, self._root, self._limits = list(targets), root, limits
        self._schedulers: dict[tuple[str, str, str], BatchScheduler] = {}
        self._tokenizers: dict[tuple[Path, str], Any] = {}
        self._bases: dict[str, Path] = {}  # resolved folders by name: resolving may mean hashing a file
        self._fingerprints: dict[tuple[Path, int], str] = {}
        self._lock = threading.Lock()
        self._named: dict[str, ServedModel] = {}
        for each in (model for target in self._targets for model in _models_of(target)):
            if self._named.setdefault(each.id, each).folder != each.folder:
                raise BadInput(f"{each.folder}: another model is called {each.id} too; rename one of the folders")

    def models(self) -> dict[str, ServedModel]:
        """The models by name; deleted runs are left out, new ones are included."""
        found = {each.id: each for each in self._named.values() if each.folder is None or each.folder.is_dir()}
        for folder in sorted(self._root.iterdir()) if self._root and self._root.is_dir() else []:
            try:
                if Run.open(folder).complete:
                    found |= {each.id: each for each in _models_of(str(folder)) if each.id not in found}
            except (BadInput, OSError):
                continue  # a damaged run; the site shows what is wrong with it
        return found

    def available(self) -> list[ServedModel]:
        """The models whose base can be found too."""
        found = []
        for each in self.models().values():
            try:
                self.fingerprint(each)
            except (BadInput, OSError) as error:
                log.warning("%s is not served: %s", each.id, one_line(error, 200))
                continue
            found.append(each)
        return found

    def fingerprint(self, model: ServedModel) -> str:
        """Hashes of the base's weight files and the adapter's: the weights behind an answer."""
        if model.base not in self._bases:
            source = open_base_of(Run.open(model.run)).source if model.run else resolve_model(model.base)
            self._bases[model.base] = source.folder
        base = self._hash(self._bases[model.base])
        return base if model.folder is None else f"{base}+{self._hash(model.folder)}"

    def open(self, model: ServedModel) -> OpenedModel:
        """Load a model unless it is in memory.

        Raises:
            BadInput: the model cannot be loaded, or its family cannot be served.
        """
        fingerprint = self.fingerprint(model)
        own = None if model.adapted else model.folder
        # The key includes the weights' hash: a run that was repeated under the same name is another model.
        key = (str(own or model.base), model.dtype, fingerprint.partition("+")[2] if own else "")
        scheduler = self._schedulers.get(key)  # without the lock: loading another model may take minutes
        if scheduler is None or not scheduler.alive:
            with self._lock:
                if key in self._schedulers and not self._schedulers[key].alive:
                    del self._schedulers[key]
                if key not in self._schedulers:
                    self._forget_idle()
                    base = open_base_of(Run.open(model.run)) if model.run else open_base(model.base, model.dtype)
                    loaded = load_model(own, base.dtype, base.device) if own else load_answering(base)
                    self._schedulers[key] = BatchScheduler(loaded, self._limits)
                scheduler = self._schedulers[key]
        tokenizer = self._tokenizer(model, fingerprint)
        ends = frozenset(end_tokens(scheduler.runner.model, tokenizer))
        adapter = AdapterRef(self._hash(model.folder), model.folder) if model.adapted and model.folder else None
        return OpenedModel(scheduler, adapter, tokenizer, ends, fingerprint)

    def _tokenizer(self, model: ServedModel, fingerprint: str) -> Any:
        has_own = model.folder and (model.folder / "tokenizer_config.json").is_file()
        folder = model.folder if model.folder and has_own else self._bases[model.base]
        key = (folder, fingerprint)
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(folder)
        return self._tokenizers[key]

    def _forget_idle(self) -> None:
        """Unload idle models if the limit is reached."""
        for key, scheduler in list(self._schedulers.items()):
            if len(self._schedulers) >= _MODELS and not (scheduler.load["running"] or scheduler.load["waiting"]):
                self._schedulers.pop(key).close()

    def loads(self) -> dict[str, dict[str, int]]:
        """The load of each model in memory."""
        return {key[0]: scheduler.load for key, scheduler in list(self._schedulers.items())}

    def close(self) -> None:
        """Close all schedulers."""
        for scheduler in self._schedulers.values():
            scheduler.close()

    def _hash(self, folder: Path) -> str:
        changed = max((file.stat().st_mtime_ns for file in folder.glob("*.safetensors")), default=0)
        key = (folder, changed)
        if key not in self._fingerprints:
            self._fingerprints[key] = saved_fingerprint(folder)
        return self._fingerprints[key]


def _models_of(name: str) -> Iterator[ServedModel]:
    """The base and the models tuned on it: a run's winner and all its trials, or only the named trial."""
    target = resolve_target(name)
    if run := target.run:
        created, dtype = int(run.paths.complete.stat().st_mtime), run.choices.dtype or run.settings.dtype
        if run.lineage is None or target.base == run.lineage.base:  # else it was made for this run alone
            yield ServedModel(target.base, target.base, dtype)
        if target.trial is None:
            yield ServedModel(run.name, target.base, dtype, run.paths.best, run.root, created)
        for trial in run.trials:
            if trial.paths.best.is_dir() and target.trial in (None, trial.name):
                yield ServedModel(f"{run.name}/{trial.name}", target.base, dtype, trial.paths.best, run.root, created)
        return
    yield ServedModel(target.base, target.base)
    if target.weights:
        yield ServedModel(Path(name).name if Path(name).is_dir() else name, target.base, folder=target.weights)
