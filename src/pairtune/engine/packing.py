"""Pairs in one row, without padding: `[prompt | chosen | rejected]`, one pair after the other.

The rejected answer's positions go on from the prompt, and its attention does not see the chosen answer, so that every
token sees what it would see in a row of its own (Wang and Hegde 2024, "Accelerating Direct Preference Optimization with
Prefix Sharing"). An answer's last token predicts nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pairtune.data.table import TokenIds

# Padded rows are multiples of this many tokens.
_PADDING = 32


@dataclass(frozen=True)
class Segment:
    """Where one pair lies in a row, in tokens. `rejected` is 0 for an answer that has the prompt to itself."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def length(self) -> int:
        """Tokens of the row that the pair takes."""
        return self.prompt + self.chosen + self.rejected


@dataclass(frozen=True)
class Pack:
    """Several pairs in one row of T tokens.

    Attributes:
        input_ids: [1, T]; of padded rows [rows, longest], see `pad_pairs`.
        positions: the same shape; each answer's go on from its prompt's.
        segments: the pairs, in their order in the row; empty for padded rows.
        predicting: for each of the N answer tokens, the place whose hidden state predicts it, [N]. Places count through
            padded rows.
        targets: the answer tokens, [N]; first a pair's chosen, then its rejected.
        answers: the number of the answer that each target belongs to, [N]: 2i chosen, 2i + 1 rejected of pair i.
        answer_tokens: how many targets each answer has, [2 * pairs].
        mask: of padded rows, 1 where there is a token, [rows, longest].
    """

    input_ids: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    predicting: Tensor
    targets: Tensor
    answers: Tensor
    answer_tokens: Tensor
    mask: Tensor | None = None

    @property
    def places_of_pairs(self) -> list[int]:
        """How many of the row's places each pair takes, in the order of the pairs."""
        if self.mask is not None:
            return [2 * self.mask.shape[1]] * self.pairs
        lengths = [segment.length for segment in self.segments]
        each = len(lengths) // self.pairs  # segments of a pair: two, where each answer has a prompt of its own
        return [sum(lengths[start : start + each]) for start in range(0, len(lengths), each)]

    @property
    def pairs(self) -> int:
        """How many pairs the row holds."""
        return len(self.answer_tokens) // 2

    def places(self, count: int) -> Tensor:
        """For each answer the numbers of `count` evenly spaced targets, [2 * pairs * count]; of fewer some twice."""
        starts = self.answer_tokens.cumsum(0) - self.answer_tokens
        steps = torch.arange(count, device=starts.device)
        return (starts[:, None] + steps * self.answer_tokens[:, None] // count).flatten()


def pack_pairs(pairs: Sequence[TokenIds], device: torch.device, *, share_prompts: bool = True) -> Pack:
    """Put pairs into one row.

    Args:
        pairs: each with a prompt and two answers of at least one token.
        device: where the tensors go.
        share_prompts: False gives each answer a prompt of its own: the plain layout, twice the prompts' tokens.
    """
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    predicting: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    for pair in pairs:
        prompt = len(pair.prompt)
        for side, answer in enumerate((pair.chosen, pair.rejected)):
            if side == 0 or not share_prompts:
                start = len(ids)  # of the prompt that this answer follows
                ids += pair.prompt
                positions += range(prompt)
            predicting += [start + prompt - 1, *range(len(ids), len(ids) + len(answer) - 1)]
            targets += answer
            lengths.append(len(answer))
            ids += answer[:-1]
            positions += range(prompt, prompt + len(answer) - 1)
            if not share_prompts:
                segments.append(Segment(prompt, len(answer) - 1, 0))
        if share_prompts:
            segments.append(Segment(prompt, len(pair.chosen) - 1, len(pair.rejected) - 1))
    answer_tokens = torch.tensor(lengths, device=device)
    return Pack(
        input_ids=torch.tensor([ids], device=device),
        positions=torch.tensor([positions], device=device),
        segments=tuple(segments),
        predicting=torch.tensor(predicting, device=device),
        targets=torch.tensor(targets, device=device),
        answers=torch.repeat_interleave(
            torch.arange(len(lengths), device=device), answer_tokens, output_size=len(targets)
        ),
        answer_tokens=answer_tokens,
    )


def pack_batches(
    pairs: Sequence[TokenIds], max_tokens: int, device: torch.device, *, share_prompts: bool = True
) -> Iterator[Pack]:
    """Rows of at most `max_tokens` tokens, in the order of the pairs; a longer pair has a row of its own."""
    row: list[TokenIds] = []
    for pair in pairs:
        if row and sum(map(_row_tokens, row)) + _row_tokens(pair) > max_tokens:
            yield pack_pairs(row, device, share_prompts=share_prompts)
            row = []
        row.append(pair)
    if row:
        yield pack_pairs(row, device, share_prompts=share_prompts)


def pad_pairs(pairs: Sequence[TokenIds], max_tokens: int, device: torch.device) -> Iterator[Pack]:
    """Pairs as padded rows, one answer a row: for models whose attention cannot be told about segments.

    How far a pair is padded depends on its own length alone, since attention over other lengths has other last bits:
    to the next multiple of 32. Neighbours that are padded alike go together.
    """
    batch: list[TokenIds] = []
    for pair in pairs:
        alike = not batch or _padded_length(pair) == _padded_length(batch[0])
        if batch and not (alike and 2 * (len(batch) + 1) * _padded_length(pair) <= max_tokens):
            yield _pad(batch, device)
            batch = []
        batch.append(pair)
    if batch:
        yield _pad(batch, device)


def _pad(pairs: Sequence[TokenIds], device: torch.device) -> Pack:
    flat = pack_pairs(pairs, device, share_prompts=False)
    lengths = torch.tensor([segment.length for segment in flat.segments], device=device)
    longest = _padded_length(pairs[0])
    total = flat.input_ids.shape[1]
    row = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=total)
    place = row * longest + flat.positions[0]
    padded = torch.zeros(2, len(lengths) * longest, dtype=torch.long, device=device)
    padded[0, place], padded[1, place] = flat.input_ids[0], 1
    ids, mask = padded.view(2, len(lengths), longest)
    # Padding has the last token's position: a model may have no more positions than the pair has tokens.
    positions = torch.arange(longest, device=device).minimum(lengths[:, None] - 1)
    return replace(flat, input_ids=ids, positions=positions, segments=(), predicting=place[flat.predicting], mask=mask)


def _padded_length(pair: TokenIds) -> int:
    longest = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) - 1
    return -(-longest // _PADDING) * _PADDING


def _row_tokens(pair: TokenIds) -> int:
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
