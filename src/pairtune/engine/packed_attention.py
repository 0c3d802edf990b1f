"""Attention over packed pairs, for every transformers model that uses `AttentionInterface`.

A model is switched to it by name (`ATTENTION`) and called with `segments=pack.segments`, which transformers passes
through to `packed_attention`. No mask over the whole row is ever built. Short pairs, the common case, take a few dense
products each with a custom backward pass: on a CPU that is several times faster than the flash kernel, whose tiles are
made for long sequences. Long pairs use PyTorch's kernel. On accelerators a whole row is one call; see `row_layout`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pairtune.engine.packing import Segment
from pairtune.engine.row_layout import RowLayout
from pairtune.engine.softcap import soft_cap
from pairtune.footprint import DENSE_TOKENS

ATTENTION = "pairtune_packed"

# A pair is computed in blocks if that saves at least this many scores.
_WORTH_SPLITTING = 16_000


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Sequence[Segment] | RowLayout | None = None,
    needed_only: bool = False,
    by_trial: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in which every answer attends to its prompt and itself.

    Args:
        module: the attention layer.
        query: [trials, heads, T, size]; with `needed_only` [trials, heads, M, size], at the positions `Pack.needed`.
        key: [trials, key heads, T, size]; groups of query heads share a key head (grouped-query attention).
        value: the same shape as key.
        attention_mask: unused; the segments define what is visible.
        segments: the pairs in the row; on an accelerator their layout, with which `needed_only` and `by_trial` are
            not used.
        needed_only: whether the queries are only those whose results predict something.
        by_trial: compute one trial at a time, because batched products depend on the size of the batch; see
            `engine.products`.
        scaling: factor of the scores; 1 / sqrt(size) by default.
        dropout: must be 0.
        sliding_window: number of tokens that a token attends to, itself included; None: all.
        softcap: cap of the scores' soft-capping (Gemma 2); None: no capping.

    Returns:
        [trials, T or M, heads, size], and None for the attention weights.
    """
    if segments is None or dropout:
        raise ValueError("packed attention needs segments and supports no dropout")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(segments, RowLayout):
        q, k, v = (each.transpose(1, 2) for each in (query, key, value))
        return segments.attend(q, k, v, scale, sliding_window, softcap), None
    if by_trial and len(query) > 1:
        one = partial(
            packed_attention,
            segments=segments,
            needed_only=needed_only,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
        )
        each = zip(query.split(1), key.split(1), value.split(1), strict=True)
        return torch.cat([one(module, q, k, v, None)[0] for q, k, v in each]), None
    dense = [query.device.type == "cpu" and softcap is None and each.length <= DENSE_TOKENS for each in segments]
    if all(dense):
        result: Tensor = _DenseAttention.apply(query, key, value, tuple(segments), scale, sliding_window, needed_only)
        return result.transpose(1, 2), None
    # One split each for queries, keys and values: the backward of a split is one concatenation, whereas each slice
    # would allocate zeros as long as the whole row.
    lengths = [segment.length for segment in segments]
    of_query = [len(range(_first_query(each, needed_only), each.length)) for each in segments]
    parts = [query.split(of_query, 2), key.split(lengths, 2), value.split(lengths, 2)]
    results = [
        # Chosen per pair: its results must not depend on the lengths of its neighbours.
        _DenseAttention.apply(q, k, v, (segment,), scale, sliding_window, needed_only)
        if is_dense
        else _attend(q, k, v, _visible(segment, sliding_window, query.device)[-q.shape[2] :], scale, softcap)
        for segment, is_dense, q, k, v in zip(segments, dense, *parts, strict=True)
    ]
    return torch.cat(results, dim=2).transpose(1, 2), None


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, softcap: float | None) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)
    scores = soft_cap(query @ key.mT * scale, softcap)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value


@lru_cache(maxsize=64)  # all layers of a model use the same few masks
def _visible(segment: Segment, window: int | None, device: torch.device) -> Tensor:
    """Whether a token of a pair attends to another, [length, length]."""
    positions = torch.cat(
        [
            torch.arange(segment.prompt + segment.chosen, device=device),
            torch.arange(segment.prompt, segment.prompt + segment.rejected, device=device),
        ]
    )
    distance = positions[:, None] - positions
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    chosen = slice(segment.prompt, segment.prompt + segment.chosen)
    rejected = slice(segment.prompt + segment.chosen, segment.length)
    visible[rejected, chosen] = visible[chosen, rejected] = False
    return visible


def _first_query(segment: Segment, needed_only: bool) -> int:
    """The first position of a pair that has a query."""
    return segment.prompt - 1 if needed_only else 0


@dataclass(frozen=True)
class _Block:
    """Some queries of a pair, and the keys that any of them attends to, as positions in the pair."""

    queries: slice
    keys: tuple[slice, ...]


@lru_cache(maxsize=256)
def _blocks(segment: Segment, needed_only: bool) -> tuple[_Block, ...]:
    """A pair in three blocks: the prompt attends to itself, each answer to the prompt and itself; no other scores.

    A pair that would save few scores stays whole: slightly larger products are cheaper than more products.
    """
    first = _first_query(segment, needed_only)
    prompt, chosen, rejected = (
        slice(0, segment.prompt),
        slice(segment.prompt, segment.prompt + segment.chosen),
        slice(segment.prompt + segment.chosen, segment.length),
    )
    saved = (segment.prompt - first) * (segment.chosen + segment.rejected) + 2 * segment.chosen * segment.rejected
    whole = slice(0, segment.length)
    if saved < _WORTH_SPLITTING:
        return (_Block(slice(first, segment.length), (whole,)),)
    blocks = (
        _Block(slice(first, segment.prompt), (prompt,)),
        _Block(chosen, (slice(0, chosen.stop),)),
        _Block(rejected, (prompt, rejected) if segment.chosen else (whole,)),
    )
    return tuple(block for block in blocks if block.queries.stop > block.queries.start)


@lru_cache(maxsize=256)
def _bias(
    segment: Segment, number: int, needed_only: bool, window: int | None, groups: int, dtype: torch.dtype
) -> Tensor:
    """A block's bias: 0 where a token attends to another, else -inf; repeated for the heads that share a key head."""
    block = _blocks(segment, needed_only)[number]
    visible = _visible(segment, window, torch.device("cpu"))[block.queries]
    visible = torch.cat([visible[:, keys] for keys in block.keys], dim=1)
    bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
    return bias.repeat(groups, 1)


class _DenseAttention(Function):
    """softmax(scale Q K' + bias) V, block by block; query heads that share keys are rows of one product."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: tuple[Segment, ...],
        scale: float,
        window: int | None,
        needed_only: bool,
    ) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        result = query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)  # in the order that the caller needs
        weights = []
        for place in _places(segments, needed_only):
            q = _rows(query[:, :, place.queries] * scale, groups)
            k, v = _rows(_take(key, place.keys)), _rows(_take(value, place.keys))
            bias = _bias(place.segment, place.number, needed_only, window, groups, query.dtype)
            weights.append(torch.bmm(q, k.mT).add_(bias).softmax(-1))
            result[:, :, place.queries] = torch.bmm(weights[-1], v).view(*query.shape[:2], -1, v.shape[-1])
        ctx.segments, ctx.needed_only, ctx.scale, ctx.groups = segments, needed_only, scale, groups
        ctx.save_for_backward(query, key, value, *weights)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        query, key, value, *weights = ctx.saved_tensors
        by_query, by_key, by_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for place, weight in zip(_places(ctx.segments, ctx.needed_only), weights, strict=True):
            rows = place.queries
            q, g = _rows(query[:, :, rows] * ctx.scale, ctx.groups), _rows(grad[:, :, rows], ctx.groups)
            k, v = _rows(_take(key, place.keys)), _rows(_take(value, place.keys))
            by_scores = torch._softmax_backward_data(torch.bmm(g, v.mT), weight, -1, weight.dtype)
            of_query = torch.bmm(by_scores, k).view(*query.shape[:2], -1, q.shape[-1])
            torch.mul(of_query, ctx.scale, out=by_query[:, :, rows])
            _add(by_key, place.keys, torch.bmm(by_scores.mT, q))  # q is already scaled
            _add(by_value, place.keys, torch.bmm(weight.mT, g))
        return by_query, by_key, by_value, None, None, None, None


class _Place(NamedTuple):
    """A block of a pair by its number, and the places of its queries and keys in the row."""

    segment: Segment
    number: int
    queries: slice
    keys: tuple[slice, ...]


def _places(segments: Sequence[Segment], needed_only: bool) -> Iterator[_Place]:
    """Every block of a row."""
    queries = keys = 0
    for segment in segments:
        for number, block in enumerate(_blocks(segment, needed_only)):
            rows = slice(queries, queries + block.queries.stop - block.queries.start)
            columns = (slice(keys + part.start, keys + part.stop) for part in block.keys)
            yield _Place(segment, number, rows, tuple(columns))
            queries = rows.stop
        keys += segment.length


def _take(heads: Tensor, slices: Sequence[slice]) -> Tensor:
    parts = [heads[:, :, rows] for rows in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _add(total: Tensor, slices: Sequence[slice], more: Tensor) -> None:
    """Add [trials * heads, length, size] to the slices that `_take` took it from."""
    more, start = more.view(*total.shape[:2], -1, total.shape[-1]), 0
    for rows in slices:
        length = rows.stop - rows.start
        total[:, :, rows] += more[:, :, start : start + length]
        start += length


def _rows(heads: Tensor, groups: int = 1) -> Tensor:
    """[trials, heads, length, size] to [trials * heads / groups, groups * length, size]."""
    trials, number, length, size = heads.shape
    return heads.reshape(trials * number // groups, groups * length, size)


AttentionInterface.register(ATTENTION, packed_attention)
