"""Answers out of a model: in batches for checks, token by token for a chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, TextIteratorStreamer

from pairtune.chat_templates import end_token

# Turns with `role` and `content`.
Conversation = Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
        text: decoded, special tokens removed, outer white space stripped.
        tokens: how many tokens were generated, the end token not counted.
        ended: whether the model ended it itself (False: cut off at the token limit).
    """

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 means greedy.

    Cut by rank (top-k), not by probability mass (top-p): top-p sorts the whole vocabulary at every token, which took
    a fifth of the time of generating with a small model on a CPU.
    """

    max_new_tokens: int = 160
    temperature: float = 0.0
    top_k: int = 50

    def config(self, model: PreTrainedModel, tokenizer: Any) -> GenerationConfig:
        """The same for transformers; the model's own sampling defaults are left out, so that ours are all there is."""
        drawn = {"temperature": self.temperature, "top_k": self.top_k} if self.temperature > 0 else {}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0,
            eos_token_id=sorted(end_tokens(model, tokenizer)),
            pad_token_id=tokenizer.pad_token_id,
            **drawn,
        )


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Ids that end an answer: the chat template's and the tokenizer's end token, and what the generation config names.

    A model that was tuned by a template ends its answers as the template does, whatever its base's config says.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    own = tokenizer.convert_tokens_to_ids(end_token(tokenizer))
    return {token for token in [*ids, own, tokenizer.eos_token_id] if token is not None}


def generate_answers(
    model: PreTrainedModel,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    sampling: Sampling,
    *,
    seed: int = 0,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Answer every conversation once, in batches of similar length; results come in the order given.

    The seed is set per batch, so the same call gives the same answers on the same machine.
    """
    prompts = [_render(tokenizer, conversation) for conversation in conversations]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, Answer] = {}
    config, ends = sampling.config(model, tokenizer), end_tokens(model, tokenizer)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[row] for row in rows],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device)
        torch.manual_seed(seed + start)
        with torch.inference_mode():
            output = model.generate(**batch, generation_config=config)
        for row, ids in zip(rows, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            answers[row] = _answer(tokenizer, ids, ends)
        progress(len(answers))
    return [answers[row] for row in range(len(prompts))]


def stream_answer(
    model: PreTrainedModel, tokenizer: Any, conversation: Conversation, sampling: Sampling
) -> Iterator[str]:
    """Answer one conversation; yields pieces of text as they are made. Closing the iterator stops the model."""
    batch = tokenizer(_render(tokenizer, conversation), return_tensors="pt", add_special_tokens=False).to(model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = False
    failure: list[BaseException] = []

    def generate() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    **batch,
                    generation_config=sampling.config(model, tokenizer),
                    streamer=streamer,
                    stopping_criteria=[lambda ids, scores, **_: torch.full((ids.shape[0],), stop, device=ids.device)],
                )
        except BaseException as error:  # noqa: BLE001 - handed to the reader, who would otherwise wait for ever
            failure.append(error)
            streamer.end()

    worker = Thread(target=generate, daemon=True)
    worker.start()
    try:
        yield from streamer
    finally:
        stop = True
        worker.join()
    if failure:
        raise failure[0]


def _render(tokenizer: Any, conversation: Conversation) -> str:
    rendered: str = tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
    return rendered


def _answer(tokenizer: Any, ids: list[int], ends: set[int]) -> Answer:
    length = next((place for place, token in enumerate(ids) if token in ends), None)
    kept = ids if length is None else ids[:length]
    return Answer(tokenizer.decode(kept, skip_special_tokens=True).strip(), len(kept), length is not None)
