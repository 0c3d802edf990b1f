"""Packs pairs into rows without padding: `[prompt | chosen | rejected]`, one pair after another.

An entry may also have a single answer, in unpaired training: `[prompt | answer]`.

The rejected answer's positions continue from the prompt, and it does not attend to the chosen answer, so that every
token attends to what it would attend to in a row of its own (Wang and Hegde 2024, "Accelerating Direct Preference
Optimization with Prefix Sharing"). An answer's last token predicts nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pairtune.data.table import TokenIds
from pairtune.engine.row_layout import RowLayout, row_layout, takes_whole_rows

# Padded rows are a multiple of this many tokens long.
_PADDING = 32
# A row on an accelerator is padded to the next multiple of an eighth of a power of two within these bounds.
_SHORTEST_STEP, _LONGEST_STEP = 64, 256


@dataclass(frozen=True)
class Segment:
    """One pair's lengths in a row, in tokens. `rejected` is 0 for an answer with its own copy of the prompt."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def length(self) -> int:
        """Number of tokens that the pair takes in the row."""
        return self.prompt + self.chosen + self.rejected


@dataclass(frozen=True)
class Pack:
    """Several pairs in one row of T tokens.

    Attributes:
        input_ids: [1, T]; for padded rows [rows, longest], see `pad_pairs`.
        positions: position ids of the same shape; each answer's continue from its prompt's.
        segments: the pairs, in row order; empty for padded rows.
        predicting: for each of the N answer tokens, the index of the hidden state that predicts it, [N]; an index into
            the flattened rows.
        targets: the answer tokens, [N]; a pair's chosen answer comes before its rejected answer.
        answers: the index of the answer that each target belongs to, [N]: 2i is pair i's chosen, 2i + 1 its rejected.
        answer_tokens: number of targets of each answer, [2 * pairs].
        mask: for padded rows, 1 where there is a token, [rows, longest].
        answers_each: 2, or 1 if each entry has a single answer; then "pair" stands for such an entry.
        layout: on accelerators, where the pairs of the row are; see `row_layout`.
        padding: on accelerators, tokens after the last pair, so that rows have few different lengths.
    """

    input_ids: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    predicting: Tensor
    targets: Tensor
    answers: Tensor
    answer_tokens: Tensor
    mask: Tensor | None = None
    answers_each: int = 2
    layout: RowLayout | None = None
    padding: int = 0

    @property
    def pair_widths(self) -> list[int]:
        """Number of row positions that each pair takes, in the order of the pairs."""
        if self.mask is not None:
            return [self.answers_each * self.mask.shape[1]] * self.pairs
        lengths = [segment.length for segment in self.segments]
        each = len(lengths) // self.pairs  # segments per pair: two if each answer has its own prompt
        return [sum(lengths[start : start + each]) for start in range(0, len(lengths), each)]

    @property
    def needed(self) -> Tensor:
        """Positions in a packed row that predict something, [M]: the last of every prompt, and the answers'."""
        starts = list(accumulate((segment.length for segment in self.segments), initial=0))
        each = zip(starts, starts[1:], self.segments, strict=False)
        positions = [index for start, end, segment in each for index in range(start + segment.prompt - 1, end)]
        return torch.tensor(positions, device=self.input_ids.device)

    @property
    def pairs(self) -> int:
        """Number of pairs in the row."""
        return len(self.answer_tokens) // self.answers_each

    def spaced_indices(self, count: int) -> Tensor:
        """Indices of `count` evenly spaced targets per answer, [2 * pairs * count]; short answers repeat some."""
        starts = self.answer_tokens.cumsum(0) - self.answer_tokens
        steps = torch.arange(count, device=starts.device)
        return (starts[:, None] + steps * self.answer_tokens[:, None] // count).flatten()


def pack_pairs(pairs: Sequence[TokenIds], device: torch.device, *, share_prompts: bool = True) -> Pack:
    """Pack pairs into one row.

    Args:
        pairs: each with a prompt and two answers of at least one token; or all with a single one, and no `rejected`.
        device: the device of the tensors.
        share_prompts: False gives each answer its own copy of the prompt: the plain layout, twice the prompt tokens.
    """
    pack = _pack(pairs, share_prompts=share_prompts)
    if not takes_whole_rows(device):
        return pack
    lengths = [(segment.prompt, segment.chosen, segment.rejected) for segment in pack.segments]
    padding = _even_length(pack.input_ids.shape[1]) - pack.input_ids.shape[1]
    layout = row_layout(lengths, padding)
    ids, positions = pad(pack.input_ids, (0, padding)), layout.positions[None].long()
    return _moved(replace(pack, input_ids=ids, positions=positions, layout=layout, padding=padding), device)


def _even_length(tokens: int) -> int:
    """The length that a row on an accelerator is padded to: one of a few dozen."""
    octave = 1 << max(0, tokens - 1).bit_length()
    step = min(_LONGEST_STEP, max(_SHORTEST_STEP, octave // 8))
    return -(-tokens // step) * step


def _moved(pack: Pack, device: torch.device) -> Pack:
    """A row on another device, in one copy for each dtype instead of one for each tensor."""
    named = {each.name: value for each in fields(pack) if isinstance(value := getattr(pack, each.name), Tensor)}
    moved: dict[str, Any] = dict(zip(named, _together(list(named.values()), device), strict=True))
    layout = None if pack.layout is None else pack.layout.with_tensors(_together(pack.layout.tensors(), device))
    return replace(pack, **moved, layout=layout)


def _together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one dtype on another device."""
    flat = torch.cat([each.flatten() for each in tensors])
    if device.type == "cuda":
        flat = flat.pin_memory()  # so that the program need not wait for the copy
    parts = flat.to(device, non_blocking=True).split([each.numel() for each in tensors])
    return [part.view(each.shape) for part, each in zip(parts, tensors, strict=True)]


def _pack(pairs: Sequence[TokenIds], *, share_prompts: bool) -> Pack:
    """One row on the CPU."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    predicting: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    each = 2 if pairs and pairs[0].rejected else 1
    for pair in pairs:
        prompt = len(pair.prompt)
        for side, answer in enumerate((pair.chosen, pair.rejected)[:each]):
            if side == 0 or not share_prompts:
                start = len(ids)  # where this answer's prompt begins
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
            segments.append(Segment(prompt, len(pair.chosen) - 1, max(0, len(pair.rejected) - 1)))
    answer_tokens = torch.tensor(lengths)
    return Pack(
        input_ids=torch.tensor([ids]),
        positions=torch.tensor([positions]),
        segments=tuple(segments),
        predicting=torch.tensor(predicting),
        targets=torch.tensor(targets),
        answers=torch.repeat_interleave(torch.arange(len(lengths)), answer_tokens, output_size=len(targets)),
        answer_tokens=answer_tokens,
        answers_each=each,
    )


def pack_batches(
    pairs: Sequence[TokenIds], max_tokens: int, device: torch.device, *, share_prompts: bool = True
) -> Iterator[Pack]:
    """Rows of at most `max_tokens` tokens, in the order of the pairs; a longer pair gets a row of its own."""
    row: list[TokenIds] = []
    for pair in pairs:
        if row and sum(map(_row_tokens, row)) + _row_tokens(pair) > max_tokens:
            yield pack_pairs(row, device, share_prompts=share_prompts)
            row = []
        row.append(pair)
    if row:
        yield pack_pairs(row, device, share_prompts=share_prompts)


def pad_pairs(pairs: Sequence[TokenIds], max_tokens: int, device: torch.device) -> Iterator[Pack]:
    """Pairs as padded rows, one answer per row: for models whose attention does not support segments.

    A pair is padded to the next multiple of 32, depending on its own length alone, since attention over another length
    differs in its last bits. Neighbours of the same padded length share a batch.
    """
    batch: list[TokenIds] = []
    for pair in pairs:
        alike = not batch or _padded_length(pair) == _padded_length(batch[0])
        answers = (len(batch) + 1) * (2 if pair.rejected else 1)
        if batch and not (alike and answers * _padded_length(pair) <= max_tokens):
            yield _pad(batch, device)
            batch = []
        batch.append(pair)
    if batch:
        yield _pad(batch, device)


def _pad(pairs: Sequence[TokenIds], device: torch.device) -> Pack:
    flat = _pack(pairs, share_prompts=False)
    lengths = torch.tensor([segment.length for segment in flat.segments])
    longest = _padded_length(pairs[0])
    total = flat.input_ids.shape[1]
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths, output_size=total)
    index = row * longest + flat.positions[0]
    padded = torch.zeros(2, len(lengths) * longest, dtype=torch.long)
    padded[0, index], padded[1, index] = flat.input_ids[0], 1
    ids, mask = padded.view(2, len(lengths), longest)
    # Padding repeats the last token's position: the model may have no positions beyond the pair's length.
    positions = torch.arange(longest).minimum(lengths[:, None] - 1)
    predicting = index[flat.predicting]
    pack = replace(flat, input_ids=ids, positions=positions, segments=(), predicting=predicting, mask=mask)
    return pack if device.type == "cpu" else _moved(pack, device)


def _padded_length(pair: TokenIds) -> int:
    longest = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) - 1
    return -(-longest // _PADDING) * _PADDING


def _row_tokens(pair: TokenIds) -> int:
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
