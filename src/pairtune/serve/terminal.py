"""`pairtune chat`: a conversation in the terminal, base and tuned model switchable."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from pairtune.errors import BadInput
from pairtune.models.generate import Conversation, Sampling, stream_answer
from pairtune.models.load import LoadedBase, load_model, load_tuned, open_base, open_base_of
from pairtune.models.resolve import base_of_adapter, find_adapter
from pairtune.runs import RunFolder

SAMPLING = Sampling(max_new_tokens=512, temperature=0.7)
HELP = "/base and /tuned switch the model and start again, so does /new, /quit ends (so does Ctrl-D)"


@dataclass
class Talker:
    """The models of one chat.

    Attributes:
        tuned: the tuned model, or None where a plain model was named.
        base: the base as a model of its own, or None where it is `tuned` without its adapter.
    """

    opened: LoadedBase
    tuned: PreTrainedModel | PeftModel | None
    base: PreTrainedModel | None

    def answer(self, name: str, conversation: Conversation) -> Any:
        """Pieces of an answer by the model called `name` (`base` or `tuned`)."""
        adapter_off = name == "base" and isinstance(self.tuned, PeftModel)
        model = self.tuned if name == "tuned" or adapter_off else self.base
        if model is None:
            raise BadInput(f"there is no {name} model in this chat")
        with model.disable_adapter() if adapter_off else nullcontext():
            yield from stream_answer(model, self.opened.tokenizer, conversation, SAMPLING)


def open_talker(target: str) -> Talker:
    """Load what `pairtune chat TARGET` names: a finished run, an adapter (a folder or a Hub id), or any model.

    Raises:
        BadInput: it is neither, or the run is unfinished.
    """
    folder = Path(target)
    if (folder / "config.yaml").is_file() or (folder / "trials").is_dir():
        run = RunFolder.finished(folder)
        opened = open_base_of(run)
        tuned = load_tuned(run.best, opened)
        alone = None if isinstance(tuned, PeftModel) else load_model(opened.source, opened.dtype, opened.device)
        return Talker(opened, tuned, alone)
    if adapter := find_adapter(target):
        opened = open_base(base_of_adapter(adapter))
        return Talker(opened, load_tuned(adapter, opened), None)
    opened = open_base(target)
    return Talker(opened, None, load_model(opened.source, opened.dtype, opened.device))


def chat(target: str, console: Console) -> None:
    """Read lines from standard input, stream answers to `console`, until the input ends or `/quit`."""
    talker = open_talker(target)
    name = "tuned" if talker.tuned is not None else "base"
    console.print(f"[bold]{target}[/bold], talking to the [cyan]{name}[/cyan] model. {HELP}", highlight=False)
    conversation: list[dict[str, str]] = []
    while True:
        try:
            said = console.input("[bold]you[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if said == "/quit":
            return
        if said == "/new":
            conversation = []
        elif said in ("/base", "/tuned"):
            if said == "/tuned" and talker.tuned is None:
                console.print("this is a plain model; give a run folder to talk to a tuned one")
            else:
                name, conversation = said[1:], []  # else a model goes on in the words of the other
                console.print(f"talking to the [cyan]{name}[/cyan] model, a new conversation")
        elif said.startswith("/"):
            console.print(HELP, highlight=False)
        elif said:
            conversation.append({"role": "user", "content": said})
            conversation.append({"role": "assistant", "content": _say(talker, name, conversation, console)})


def _say(talker: Talker, name: str, conversation: Conversation, console: Console) -> str:
    """Stream one answer; Ctrl-C ends it early and keeps what was said."""
    console.print(f"[cyan]{name}[/cyan] ", end="")
    pieces: list[str] = []
    answer = talker.answer(name, conversation)
    try:
        for piece in answer:
            pieces.append(piece)
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        answer.close()
    console.print()
    return "".join(pieces)
