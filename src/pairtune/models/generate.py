"""Generates answers with a model: in batches for evaluations, token by token for a chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from threading import Thread
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, TextIteratorStreamer

from pairtune.chat_templates import end_token
from pairtune.conversation import Conversation
from pairtune.models.sampling import SamplingParams
from pairtune.run.records import Answer


def generation_config(params: SamplingParams, model: PreTrainedModel, tokenizer: Any) -> GenerationConfig:
    """Sampling parameters for transformers; they replace the model's own sampling defaults completely."""
    sampled = {} if params.greedy else {"temperature": params.temperature, "top_k": params.top_k}
    return GenerationConfig(
        max_new_tokens=params.max_tokens,
        do_sample=not params.greedy,
        eos_token_id=sorted(end_tokens(model, tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
        **sampled,
    )


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Ids that end an answer: the end tokens of the chat template, the tokenizer and the generation config.

    A model that was tuned with a template ends its answers as the template does, whatever its base's config states.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    own = tokenizer.convert_tokens_to_ids(end_token(tokenizer))
    return {token for token in [*ids, own, tokenizer.eos_token_id] if token is not None}


def generate_answers(
    model: PreTrainedModel,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    params: SamplingParams,
    *,
    seed: int = 0,
    batch_size: int = 32,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Answer every conversation once, in batches of similar length; results are in the order given.

    The seed is set for each batch, so the same call gives the same answers on the same machine.
    """
    prompts = [_render(tokenizer, conversation) for conversation in conversations]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, Answer] = {}
    config, ends = generation_config(params, model, tokenizer), end_tokens(model, tokenizer)
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
        on_progress(len(answers))
    return [answers[row] for row in range(len(prompts))]


def stream_answer(
    model: PreTrainedModel, tokenizer: Any, conversation: Conversation, params: SamplingParams
) -> Iterator[str]:
    """Answer one conversation and yield pieces of text as they are generated. Closing the iterator stops the model."""
    batch = tokenizer(_render(tokenizer, conversation), return_tensors="pt", add_special_tokens=False).to(model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = False
    failure: list[BaseException] = []

    def generate() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    **batch,
                    generation_config=generation_config(params, model, tokenizer),
                    streamer=streamer,
                    stopping_criteria=[lambda ids, scores, **_: torch.full((ids.shape[0],), stop, device=ids.device)],
                )
        except BaseException as error:  # noqa: BLE001 - raised by the reader, which would otherwise wait forever
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
    length = next((position for position, token in enumerate(ids) if token in ends), None)
    kept = ids if length is None else ids[:length]
    text: str = tokenizer.decode(kept, skip_special_tokens=True).strip()
    return Answer(text=text, tokens=len(kept), ended=length is not None)
