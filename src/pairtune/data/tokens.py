"""Pairs to token ids: the chat template is applied to whole conversations, which are then split into prompt and answer.

Prompt and answers are never templated separately: many templates write a system prompt or a thinking block of their
own, and would write it twice. The ids and the split equal TRL's for its conversational format.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from pairtune.chat_templates import answer_end, leaves_out_bos
from pairtune.conversation import Message
from pairtune.data.preference import ANSWERS, BadRow, LeftOut, PreferencePair
from pairtune.errors import BadInput, one_line, plural
from pairtune.files import fingerprint
from pairtune.run.records import DecodedPair

Tools = tuple[Mapping[str, Any], ...]

# Number of pairs whose ids are computed both ways before the quick way is trusted.
_CHECKED = 16
_LONG = 20_000  # characters; checking longer prompts would cost more time than it saves


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as the model sees it: `prompt_ids + chosen_ids` and `prompt_ids + rejected_ids`; answers carry the loss.

    Attributes:
        pair: the pair as it was read.
        prompt: the turns of its prompt that are used.
        prompt_ids: the common beginning of both conversations, including the header of the answer.
        chosen_ids: the answer, its end-of-turn token and what the template writes after it; empty if the pair is a
            single undesirable answer.
        rejected_ids: likewise; empty if the pair is a single desirable answer.
    """

    pair: PreferencePair
    prompt: tuple[Message, ...]
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def turns_cut(self) -> int:
        """Number of the prompt's oldest turns that were removed."""
        return len(self.pair.prompt) - len(self.prompt)

    @property
    def length(self) -> int:
        """Number of tokens of the longer of the two conversations."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


class PairTokenizer:
    """Renders and tokenizes pairs with a model's tokenizer and chat template.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        max_length: maximum tokens of a conversation, beyond which it loses its oldest turns; None for no limit.
    """

    def __init__(self, tokenizer: Any, max_length: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.template = _Template(tokenizer)
        # No text with more characters can fit; the factor 4 allows for normalizers that merge characters.
        self._max_characters = 4 * max_length * max(map(len, tokenizer.get_vocab())) if max_length else None

    @property
    def warnings(self) -> list[str]:
        """What the user should know about the tokenizer and its template."""
        left_out = [f"{plural(pairs, 'pair')} with {what}" for what, pairs in self.template.left_out.items()]
        if not self.template.bos_left_out:
            return left_out
        return [
            *left_out,
            f"the tokenizer begins plain text with {self.tokenizer.bos_token}, but the model's chat template does not "
            "write it, so conversations lack it, in training (as in TRL) and afterwards; if the model was trained "
            "with it, put {{ bos_token }} at the beginning of its template",
        ]

    def encode(self, pairs: Sequence[PreferencePair]) -> list[TokenizedPair | BadRow]:
        """Tokenize pairs; one that is too long or that the template refuses is a `BadRow`.

        A conversation over `max_length` tokens loses its oldest exchange, then the next, but never the system message
        or the last user turn. Answers are never cut.
        """
        encoded = iter(self.encode_whole([pair for pair in pairs if not self._cannot_fit(pair)]))
        return self.fit([self._too_long() if self._cannot_fit(pair) else next(encoded) for pair in pairs])

    def encode_whole(self, pairs: Sequence[PreferencePair]) -> list[TokenizedPair | BadRow]:
        """Tokenize pairs without a limit on the length."""
        try:
            return [*self.template.encode(pairs)] if pairs else []
        except TemplateError as error:
            if len(pairs) > 1:  # find the faulty pair
                return [result for pair in pairs for result in self.encode_whole([pair])]
            reason = f"is refused by the model's chat template ({one_line(error, 120)})"
            return [BadRow("refused by the chat template", "prompt", reason)]

    def fit(self, whole: Sequence[TokenizedPair | BadRow]) -> list[TokenizedPair | BadRow]:
        """Remove the oldest turns from the results of `encode_whole` until they fit; see `encode`."""
        results = list(whole)
        too_long = {
            at: each.pair for at, each in enumerate(results) if isinstance(each, TokenizedPair) and not self._fits(each)
        }
        cut = 0
        while too_long:
            cut += 1
            shorter = {at: _without_oldest(pair, cut) for at, pair in too_long.items()}
            retried = {at: pair for at, pair in shorter.items() if pair is not None}
            counted = self.template.left_out.copy()  # once for a pair, not for each of its lengths
            encoded = dict(zip(retried, self.encode_whole(list(retried.values())), strict=True))
            self.template.left_out = counted
            for at, pair in too_long.items():
                result = encoded.get(at) or self._too_long()
                results[at] = result if isinstance(result, BadRow) else replace(result, pair=pair)
            too_long = {at: pair for at, pair in too_long.items() if not self._fits(results[at])}
        return results

    def fingerprint(self) -> str:
        """A fingerprint of everything besides the pairs that the ids depend on."""
        tokenizer = self.tokenizer
        rules = (
            tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(sorted(tokenizer.get_vocab().items()))
        )
        roles = sorted(tokenizer.special_tokens_map.items())  # templates may use any of them
        return fingerprint(
            [rules, *map(str, (type(tokenizer).__name__, tokenizer.chat_template, roles, self.max_length))]
        )

    def _fits(self, result: TokenizedPair | BadRow) -> bool:
        return isinstance(result, BadRow) or self.max_length is None or result.length <= self.max_length

    def _cannot_fit(self, pair: PreferencePair) -> bool:
        answer = max(len(pair.chosen), len(pair.rejected))
        return self._max_characters is not None and len(pair.prompt[-1]["content"]) + answer > self._max_characters

    def _too_long(self) -> LeftOut:
        return LeftOut(f"longer than {self.max_length} tokens", "", "does not fit even without its older turns")


def decode_pair(tokenizer: Any, pair: TokenizedPair) -> DecodedPair:
    """A pair as the model sees it, including special tokens."""
    return DecodedPair(
        origin=pair.pair.origin,
        prompt=_clip(tokenizer.decode(pair.prompt_ids)),
        chosen=_clip(tokenizer.decode(pair.chosen_ids)),
        rejected=_clip(tokenizer.decode(pair.rejected_ids)),
    )


def _clip(text: str, limit: int = 3000) -> str:
    """A long text without its middle: what matters is how the template opens and closes it."""
    left_out = len(text) - limit
    return text if left_out <= 0 else f"{text[: limit // 2]}[… {left_out:,} characters …]{text[-limit // 2 :]}"


def _without_oldest(pair: PreferencePair, count: int) -> PreferencePair | None:
    """The pair without the `count` oldest exchanges after the system message; None if no user turn would be left."""
    starts = [at for at, turn in enumerate(pair.prompt) if turn["role"] == "user"]
    if count >= len(starts):
        return None
    return replace(pair, prompt=pair.prompt[: starts[0]] + pair.prompt[starts[count] :])


class _Template:
    """The chat template of one tokenizer, applied to pairs.

    Most templates open an answer with a special token, and tokenizers split the text at special tokens first. The ids
    of a whole conversation are then the ids of its parts, and the long prompt is tokenized once instead of three times.
    This is done only if the tokenizer's settings allow it and the first pairs give equal ids.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        question: Message = {"role": "user", "content": "question"}
        try:
            alone, opened = (self._render([[question]], header=header)[0] for header in (False, True))
            # Without an end token after the answers, the model would learn never to stop.
            self.end = [] if answer_end(tokenizer) else [tokenizer.eos_token_id]
            self.bos_left_out = leaves_out_bos(tokenizer)
        except TemplateError as error:
            raise BadInput(f"--model: its chat template cannot render a question ({one_line(error)})") from error
        self.header = opened.removeprefix(alone)  # what opens an answer, in ChatML "<|im_start|>assistant\n"
        self.quick = self._opens_with_special(self.header)
        self.header_ids = self._ids([self.header])[0] if self.quick else []
        self.checked = 0
        self.left_out: Counter[str] = Counter()

    def encode(self, pairs: Sequence[PreferencePair]) -> list[TokenizedPair]:
        """Token ids of pairs of any length."""
        results: dict[int, TokenizedPair] = {}
        for tools, numbers in _by_tools(pairs):
            encoded = self._encode([pairs[number] for number in numbers], tools)
            results |= dict(zip(numbers, encoded, strict=True))
        return [results[number] for number in range(len(pairs))]

    def _encode(self, pairs: Sequence[PreferencePair], tools: Tools) -> list[TokenizedPair]:
        """Token ids of pairs that offer the same tools."""
        prompts = self._render([list(pair.prompt) for pair in pairs], header=True, tools=tools)
        chosen, rejected = (
            # A missing answer is rendered as the other one, so that both agree on where the prompt ends.
            self._render([[*pair.prompt, pair.answer(pair.given(side))] for pair in pairs], tools=tools)
            for side in ANSWERS
        )
        self._count_left_out(pairs, tools, prompts, (chosen, rejected))
        texts = list(zip(prompts, chosen, rejected, strict=True))
        return [
            TokenizedPair(
                pair,
                pair.prompt,
                ids,
                chosen_ids + self.end if pair.chosen else [],
                rejected_ids + self.end if pair.rejected else [],
            )
            for pair, (ids, chosen_ids, rejected_ids) in zip(pairs, self._cut(texts), strict=True)
        ]

    def _cut(self, texts: list[tuple[str, str, str]]) -> list[tuple[list[int], list[int], list[int]]]:
        if not self.quick:
            return self._cut_whole(texts)
        if self.checked < _CHECKED:
            unchecked = [three for three in texts[: _CHECKED - self.checked] if len(three[0]) < _LONG]
            self.checked += len(unchecked)
            if self._cut_parts(unchecked) != self._cut_whole(unchecked):
                self.quick = False
        return self._cut_parts(texts) if self.quick else self._cut_whole(texts)

    def _cut_whole(self, texts: list[tuple[str, str, str]]) -> list[tuple[list[int], list[int], list[int]]]:
        ids = self._ids([text for three in texts for text in three])
        return [_part(*ids[at : at + 3]) for at in range(0, len(ids), 3)]

    def _cut_parts(self, texts: list[tuple[str, str, str]]) -> list[tuple[list[int], list[int], list[int]]]:
        parts: list[str] = []
        for prompt, chosen, rejected in texts:
            at = len(prompt) - len(self.header)
            if not (prompt.endswith(self.header) and chosen.startswith(prompt) and rejected.startswith(prompt)):
                return self._cut_whole(texts)
            parts += [prompt[:at], chosen[at:], rejected[at:]]
        ids, results = self._ids(parts), []
        for at in range(0, len(ids), 3):
            header, chosen_ids, rejected_ids = _part(self.header_ids, ids[at + 1], ids[at + 2])
            results.append((ids[at] + header, chosen_ids, rejected_ids))
        return results

    def _count_left_out(
        self, pairs: Sequence[PreferencePair], tools: Tools, prompts: list[str], answers: tuple[list[str], list[str]]
    ) -> None:
        """Count what the template has no room for."""
        if tools and self._render([list(pairs[0].prompt)], header=True)[0] == prompts[0]:
            self.left_out["tools, for which the model's chat template has no room"] += len(pairs)
        for pair, *texts in zip(pairs, *answers, strict=True):
            if any(thinking and thinking not in text for thinking, text in zip(pair.thinking, texts, strict=True)):
                self.left_out["thinking, for which the model's chat template has no room"] += 1

    def _render(self, conversations: list[list[Message]], *, header: bool = False, tools: Tools = ()) -> list[str]:
        texts: list[str] = self.tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=header, tools=list(tools) or None
        )
        return texts

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if self.tokenizer.is_fast:
            backend = self.tokenizer.backend_tokenizer
            backend.no_padding()
            backend.no_truncation()
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def _opens_with_special(self, text: str) -> bool:
        """Whether a text opens with a token at which any text is split exactly, whatever precedes it."""
        return self.tokenizer.is_fast and any(
            text.startswith(token.content)
            for token in self.tokenizer.added_tokens_decoder.values()
            if not (token.lstrip or token.single_word or token.normalized)
        )


def _by_tools(pairs: Sequence[PreferencePair]) -> list[tuple[Tools, list[int]]]:
    """The numbers of the pairs that offer the same tools, with these tools."""
    groups: dict[str, tuple[Tools, list[int]]] = {}
    for number, pair in enumerate(pairs):
        key = json.dumps(pair.tools) if pair.tools else ""
        groups.setdefault(key, (pair.tools, []))[1].append(number)
    return list(groups.values())


def _part(prompt: list[int], chosen: list[int], rejected: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Split both conversations where the first of them diverges from the prompt, as TRL does."""
    shared = min(_common(prompt, chosen), _common(prompt, rejected))
    return prompt[:shared], chosen[shared:], rejected[shared:]


def _common(a: list[int], b: list[int]) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next(at for at, (x, y) in enumerate(zip(a, [*b, None], strict=False)) if x != y)
