"""`pairtune chat`: chat in the terminal, switching between the base and the tuned model."""

from __future__ import annotations

import queue
from collections.abc import Generator
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from rich.text import Text

from pairtune.conversation import Conversation
from pairtune.errors import BadInput, RunFailed
from pairtune.models.generate import stream_answer
from pairtune.models.load import is_adapted, load_model, load_tuned, open_base
from pairtune.models.resolve import resolve_target
from pairtune.models.sampling import SamplingParams
from pairtune.models.start import open_base_of
from pairtune.serve.adapters import read_adapter
from pairtune.serve.catalogue import Catalogue
from pairtune.serve.request import Event, Failed, Finished, Limits, NotBatchable, TextDelta

SAMPLING = SamplingParams(max_tokens=512, temperature=0.7)
HELP = "/base and /tuned switch the model and start a new conversation, /new starts a new one, /quit (or Ctrl-D) ends"


class ChatModels(Protocol):
    """The models of a chat: the base and, unless a plain model was named, the tuned one."""

    has_tuned: bool

    def stream(self, name: str, conversation: Conversation, params: SamplingParams) -> Generator[str, None, None]:
        """Stream the answer of the model `name` (`base` or `tuned`)."""

    def close(self) -> None:
        """Free the models."""


class BatchedModels:
    """Models behind the scheduler that the worker uses; see `ChatModels`.

    Args:
        target: a finished run or its trial, an adapter, or any model.
        context: maximum tokens of a conversation.

    Raises:
        BadInput: there is no such model.
        NotBatchable: the scheduler does not support its family or its adapter.
    """

    def __init__(self, target: str, context: int = 32_768) -> None:
        self._catalogue = Catalogue([target], None, Limits(concurrency=2, context=context))
        base, *tuned = self._catalogue.models().values()
        self._served = {"base": base} | ({"tuned": tuned[0]} if tuned else {})
        self.has_tuned = bool(tuned)
        if tuned and tuned[0].adapted and tuned[0].folder:  # found out before the base is loaded
            read_adapter(tuned[0].folder, torch.float32, torch.device("cpu"))
        # Loaded now, so that the first answer does not wait.
        self._catalogue.open(self._served["tuned" if tuned else "base"])

    def stream(self, name: str, conversation: Conversation, params: SamplingParams) -> Generator[str, None, None]:
        """See `ChatModels`."""
        model = self._catalogue.open(self._served[name])
        ids = model.encode(conversation)
        if len(ids) >= model.context:
            raise BadInput(f"the conversation has {len(ids):,} of at most {model.context:,} tokens; type /new")
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = model.request(ids, params, events.put)
        model.scheduler.submit(request)
        try:
            while True:
                match events.get():
                    case TextDelta(text):
                        yield text
                    case Finished():
                        return
                    case Failed(message):
                        raise RunFailed(message)
        finally:
            model.scheduler.cancel(request)

    def close(self) -> None:
        """See `ChatModels`."""
        self._catalogue.close()


class PlainModels:
    """Models run by transformers' own generation, for those that cannot be batched; see `ChatModels`."""

    def __init__(self, name: str) -> None:
        target = resolve_target(name)
        self._opened = open_base_of(target.run) if target.run else open_base(target.base)
        self._tuned = load_tuned(target.weights, self._opened) if target.weights else None
        self.has_tuned = self._tuned is not None
        base = self._opened
        alone = not is_adapted(self._tuned)
        self._base = load_model(base.source, base.dtype, base.device) if alone else None

    def stream(self, name: str, conversation: Conversation, params: SamplingParams) -> Generator[str, None, None]:
        """See `ChatModels`."""
        adapter_off = name == "base" and is_adapted(self._tuned)
        model = self._tuned if name == "tuned" or adapter_off else self._base
        assert model is not None  # noqa: S101 - callers check `has_tuned`
        with model.disable_adapter() if adapter_off else nullcontext():
            yield from stream_answer(model, self._opened.tokenizer, conversation, params)

    def close(self) -> None:
        """See `ChatModels`."""


def open_models(target: str) -> ChatModels:
    """Load the target of `pairtune chat`: a finished run or its trial, an adapter, or any model.

    Raises:
        BadInput: the target is none of these, or the run is unfinished.
    """
    try:
        return BatchedModels(target)
    except NotBatchable:
        return PlainModels(target)


def chat(target: str, console: Console) -> None:
    """Read lines from standard input and stream answers to `console` until the input ends or `/quit`."""
    with console.status(f"opening {target}"):
        models = open_models(target)
    try:
        _converse(models, Path(target).name if Path(target).exists() else target, console)
    finally:
        models.close()


def _converse(models: ChatModels, title: str, console: Console) -> None:
    name = "tuned" if models.has_tuned else "base"
    console.print(Text.assemble((title, "bold"), ", talking to the ", (name, "cyan"), f" model. {HELP}"))
    conversation: list[dict[str, str]] = []
    while True:
        try:
            line = console.input(Text("you ", "bold")).strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/quit":
            return
        if line == "/new":
            conversation = []
        elif line in ("/base", "/tuned"):
            if line == "/tuned" and not models.has_tuned:
                console.print("this is a plain model; name a run folder to talk to a tuned one")
            else:
                name, conversation = line[1:], []  # else a model would continue the other's answers
                console.print(Text.assemble("talking to the ", (name, "cyan"), " model in a new conversation"))
        elif line.startswith("/"):
            console.print(HELP, highlight=False)
        elif line:
            turns = [*conversation, {"role": "user", "content": line}]
            try:
                answer = _print_answer(models, name, turns, console)
            except BadInput as error:
                console.print(str(error), highlight=False)
            else:
                conversation = [*turns, {"role": "assistant", "content": answer}]


def _print_answer(models: ChatModels, name: str, conversation: Conversation, console: Console) -> str:
    """Stream one answer; Ctrl-C ends it early and keeps the text so far."""
    console.print(Text(f"{name} ", "cyan"), end="")
    pieces: list[str] = []
    answer = models.stream(name, conversation, SAMPLING)
    try:
        for piece in answer:
            pieces.append(piece)
            console.print(piece, end="", highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        answer.close()
    console.print()
    return "".join(pieces)
