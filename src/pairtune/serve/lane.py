"""One model in memory, and everybody who is talking to it, or to an adapter on it.

A thread of its own makes one pass after the other. Whoever comes in joins the next pass, whoever is done leaves it, so
nobody waits for another's answer to end (continuous batching). A long prompt is read in pieces between the others'
tokens, and what it shares with a conversation that is still in memory is not read again: its own earlier turns, a
system message.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from pairtune.engine.norms import replace_norms
from pairtune.engine.policy import PACKED_FAMILIES
from pairtune.errors import BadInput, one_line
from pairtune.models.generate import end_tokens
from pairtune.serve.adapters import Stack, read_adapter
from pairtune.serve.attention import ATTENTION, Copy, Kept, Pass, Piece
from pairtune.serve.text import Drawing, TextStream

log = logging.getLogger(__name__)

# Tokens of prompts in a pass: enough to multiply well, few enough that those who are being answered hardly notice.
PROMPT_TOKENS = 512

# Seconds to wait for others who come at the same moment, where nobody is being answered.
GATHERING = 0.005

# Adapters in memory; beyond that, the one that was idle for longest goes.
ADAPTERS = 16


@dataclass(frozen=True)
class Said:
    """A piece of an answer."""

    text: str


@dataclass(frozen=True)
class Queued:
    """Still waiting, with so many in front."""

    place: int


@dataclass(frozen=True)
class Ended:
    """The answer is over.

    Attributes:
        reason: `stop`, where the model or a stop text ended it, or `length`.
        tokens: how many it has.
    """

    reason: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True)
class Failed:
    """There will be no (more) answer."""

    message: str


Event = Said | Queued | Ended | Failed


@dataclass(frozen=True)
class Limits:
    """What a lane takes on.

    Attributes:
        concurrency: conversations answered at once.
        waiting: how many may wait beyond that.
        context: tokens of a prompt and its answer together.
    """

    concurrency: int = 8
    waiting: int = 64
    context: int = 4096


class Busy(Exception):
    """Too many are waiting already."""


@dataclass(eq=False)
class Request:
    """One answer that somebody wants.

    Attributes:
        ids: of the rendered prompt.
        drawing: how to draw.
        adapter: fingerprint and folder of the adapter; None: the lane's model as it is.
        emit: called with every event, from the lane's thread; it must not block.
    """

    ids: list[int]
    drawing: Drawing
    adapter: tuple[str, Path] | None
    emit: Callable[[Event], None]
    cancelled: bool = False


@dataclass(eq=False)
class _Conversation:
    request: Request
    text: TextStream
    generator: torch.Generator
    ids: list[int]  # prompt and answer; the last one has not been through the model
    kept: int = 0  # tokens whose keys and values are kept
    drawn: int = 0

    @property
    def key(self) -> str | None:
        return self.request.adapter[0] if self.request.adapter else None


@dataclass(frozen=True)
class _Memory:
    """Whose keys and values lie in a free slot."""

    key: str | None = None
    ids: tuple[int, ...] = ()
    left: int = 0  # when: a count of those who have left


@dataclass
class _State:
    answering: list[_Conversation] = field(default_factory=list)
    reading: list[_Conversation] = field(default_factory=list)  # the prompt is not through yet


class Lane:
    """See the module; `submit` and `cancel` may be called from any thread.

    Args:
        model: of transformers, changed in place; a merged or a base model.
        tokenizer: its own.
        limits: of what is taken on.

    Raises:
        BadInput: its family's attention cannot be batched here.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, limits: Limits) -> None:
        family = model.config.model_type
        if family not in PACKED_FAMILIES:
            raise BadInput(f"models of the family {family} are not served here; vLLM or llama.cpp may, with --backend")
        self.model, self.tokenizer = model, tokenizer
        context = min(limits.context, getattr(model.config, "max_position_embeddings", limits.context))
        self.limits = Limits(limits.concurrency, limits.waiting, context)
        replace_norms(model)
        model.set_attn_implementation(ATTENTION)
        self._stack = Stack(model)
        self._kept = Kept(model, limits.concurrency)
        self._ends = end_tokens(model, tokenizer)
        self._waiting: deque[Request] = deque()
        self._state = _State()
        self._memory = [_Memory()] * limits.concurrency  # by slot; only those of free slots count
        self._left = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="pairtune-lane", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Take a request on; its events follow.

        Raises:
            Busy: too many are waiting.
        """
        with self._changed:
            if len(self._waiting) >= self.limits.waiting:
                raise Busy
            self._waiting.append(request)
            request.emit(Queued(len(self._waiting) - 1 if self._full else 0))
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Nobody wants the answer any more: its place is free from the next pass on."""
        request.cancelled = True
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
                self._tell_places()

    def close(self) -> None:
        """End the thread; who is still being answered is told."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def load(self) -> dict[str, int]:
        """How much is going on."""
        return {
            "answering": len(self._state.answering) + len(self._state.reading),
            "waiting": len(self._waiting),
            "kept_bytes": self._kept.bytes,
        }

    @property
    def _full(self) -> bool:
        return len(self._state.answering) + len(self._state.reading) >= self.limits.concurrency

    def _tell_places(self) -> None:
        for place, request in enumerate(self._waiting):
            request.emit(Queued(place))

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    if not (self._state.answering or self._state.reading):
                        self._changed.wait_for(lambda: self._closed or self._waiting)
                        # Those who come together are read together, which is faster for all but the first.
                        self._changed.wait_for(lambda: self._closed or self._free() <= len(self._waiting), GATHERING)
                    if self._closed:
                        break
                    admitted = [self._waiting.popleft() for _ in range(self._free()) if self._waiting]
                    if admitted:
                        self._tell_places()
                try:
                    for request in admitted:
                        self._admit(request)
                    self._step()
                except Exception as error:
                    log.exception("a pass failed")
                    self._fail_all(f"the model failed ({one_line(error, 200)})")
        self._fail_all("the server is closing")

    def _free(self) -> int:
        return self.limits.concurrency - len(self._state.answering) - len(self._state.reading)

    def _fail_all(self, message: str) -> None:
        state, self._state = self._state, _State()
        self._memory = [_Memory()] * self.limits.concurrency  # what a pass that failed has left is not to be trusted
        for each in [*state.answering, *state.reading]:
            each.request.emit(Failed(message))
        if self._closed:
            for request in self._waiting:
                request.emit(Failed(message))

    def _admit(self, request: Request) -> None:
        try:
            if request.adapter:
                self._use(*request.adapter)
            drawing = request.drawing
            text = TextStream(self.tokenizer, drawing.stop)
            new = _Conversation(request, text, drawing.generator(), list(request.ids))
            new.kept = self._remember(new)
        except BadInput as error:
            request.emit(Failed(str(error)))
        except Exception as error:  # whatever is wrong with one request is not the others' matter
            log.exception("a request failed")
            request.emit(Failed(one_line(error, 200)))
        else:
            self._state.reading.append(new)

    def _remember(self, new: _Conversation) -> int:
        """Bring what is known of a prompt into the first free slot; how many tokens that are."""
        active = [*self._state.answering, *self._state.reading]
        first = len(active)
        known: list[tuple[str | None, Sequence[int]]] = [(each.key, each.ids[: each.kept]) for each in active]
        known += [(each.key, each.ids) for each in self._memory[first:]]
        # The last token is read in any case, since the answer starts from what comes out of it.
        shared = [_shared(ids, new.ids[:-1]) if key == new.key else 0 for key, ids in known]
        best = max(range(len(shared)), key=shared.__getitem__)
        # Of the free slots, the one that knows it, else the one that was left first.
        oldest = min(range(first, len(known)), key=lambda slot: self._memory[slot].left)
        free = best if best >= first and shared[best] else oldest
        if free != first:
            self._kept.swap(first, free, max(len(self._memory[first].ids), len(self._memory[free].ids)))
            self._memory[first], self._memory[free] = self._memory[free], self._memory[first]
        if best < first and shared[best]:
            self._kept.copy(Copy(best, first, shared[best]))
        return shared[best]

    def _use(self, key: str, folder: Path) -> None:
        """Bring an adapter into memory, or call to mind that it is used."""
        adapters = self._stack.adapters
        if key in adapters:
            adapters[key] = adapters.pop(key)  # now the last used
        else:
            adapters[key] = read_adapter(folder, self.model.dtype, self.model.device)
        busy = {each.key for each in [*self._state.answering, *self._state.reading]} | {key}
        idle = [each for each in adapters if each not in busy]
        for each in idle[: max(0, len(adapters) - ADAPTERS)]:
            del adapters[each]
        if list(adapters) != list(self._stack.adapters):
            self._stack.set(adapters)

    def _step(self) -> None:
        for each in [*self._state.answering, *self._state.reading]:
            if each.request.cancelled:
                self._leave(each)
        state = self._state
        pieces: list[tuple[_Conversation, Piece]] = []
        copies, budget = [], PROMPT_TOKENS
        for slot, each in enumerate(state.reading, len(state.answering)):
            if copy := _taken_over(each, slot, pieces):
                each.kept = copy.tokens
                copies.append(copy)
            length = min(budget, len(each.ids) - each.kept)
            if length:
                pieces.append((each, Piece(slot, each.kept, length)))
            budget -= length
        if not state.answering and not pieces:
            return
        logits = self._forward(state.answering, pieces, tuple(copies))
        finished = [each for each, piece in pieces if piece.start + piece.length == len(each.ids)]
        drawing = [*state.answering, *finished]
        for each, piece in pieces:
            each.kept += piece.length
        for each in state.answering:
            each.kept += 1
        for each in finished:
            self._start_answering(each)
        for each, row in zip(drawing, logits, strict=True):
            try:
                self._draw(each, row)
            except Exception as error:
                log.exception("an answer failed")
                each.request.emit(Failed(one_line(error, 200)))
                self._leave(each)

    def _forward(
        self, answering: list[_Conversation], pieces: list[tuple[_Conversation, Piece]], copies: tuple[Copy, ...] = ()
    ) -> torch.Tensor:
        """Logits of the next token, of those who are answered and of those whose prompt is through with this pass."""
        device = self.model.device
        ids = [each.ids[-1] for each in answering]
        positions = [each.kept for each in answering]
        keys = [each.key for each in answering]
        rows = list(range(len(answering)))
        for each, piece in pieces:
            end = piece.start + piece.length
            ids += each.ids[piece.start : end]
            positions += range(piece.start, end)
            keys += [each.key] * piece.length
            if end == len(each.ids):
                rows.append(len(ids) - 1)
        self._kept.make_room(max(positions) + 1)
        self._stack.assign(keys, device)
        batch = Pass(
            self._kept,
            torch.tensor(positions[: len(answering)], dtype=torch.long, device=device),
            max(positions[: len(answering)], default=0) + 1,
            tuple(piece for _, piece in pieces),
            copies,
        )
        hidden = self.model.base_model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            batch=batch,
        ).last_hidden_state
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden[0, rows]).float()
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    def _draw(self, each: _Conversation, logits: torch.Tensor) -> None:
        drawing, emit = each.request.drawing, each.request.emit
        token = drawing.draw(logits, each.generator)
        if token not in self._ends:
            each.ids.append(token)
            each.drawn += 1
            if text := each.text.push(token):
                emit(Said(text))
            if each.drawn < drawing.max_tokens and not each.text.stopped:
                return
        if rest := each.text.flush():
            emit(Said(rest))
        cut = token not in self._ends and not each.text.stopped
        emit(Ended("length" if cut else "stop", each.drawn))
        self._leave(each)

    def _start_answering(self, each: _Conversation) -> None:
        """From those whose prompt is read to those who are answered: the first slot behind these."""
        state = self._state
        place = state.reading.index(each)
        if place:
            self._swap(state.reading, 0, place, len(state.answering))
        state.answering.append(state.reading.pop(0))

    def _leave(self, each: _Conversation) -> None:
        """Free a slot, so that those in use stay side by side."""
        state = self._state
        if each in state.answering:
            self._swap(state.answering, state.answering.index(each), len(state.answering) - 1, 0)
            state.answering.pop()
            if state.reading:  # the slot before the first of them is free now
                free, last = len(state.answering), len(state.answering) + len(state.reading)
                self._kept.swap(free, last, max(each.kept, state.reading[-1].kept))
                state.reading.insert(0, state.reading.pop())
        else:
            self._swap(state.reading, state.reading.index(each), len(state.reading) - 1, len(state.answering))
            state.reading.pop()
        self._left += 1
        slot = len(state.answering) + len(state.reading)
        self._memory[slot] = _Memory(each.key, tuple(each.ids[: each.kept]), self._left)

    def _swap(self, among: list[_Conversation], one: int, other: int, first_slot: int) -> None:
        if one != other:
            tokens = max(among[one].kept, among[other].kept)
            self._kept.swap(first_slot + one, first_slot + other, tokens)
            among[one], among[other] = among[other], among[one]


def _taken_over(each: _Conversation, slot: int, pieces: Sequence[tuple[_Conversation, Piece]]) -> Copy | None:
    """What a prompt need not read because another one that is read in the same pass begins alike."""
    known = [
        (min(_shared(other.ids, each.ids[:-1]), piece.start + piece.length), piece.slot)
        for other, piece in pieces
        if other.key == each.key
    ]
    tokens, source = max(known, default=(0, 0))
    return Copy(source, slot, tokens) if tokens > each.kept else None


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    size = min(len(one), len(other))
    return next((place for place in range(size) if one[place] != other[place]), size)
