"""Attention for many requests in one forward pass, each over its own keys and values.

A batch holds one token of each decoding request, followed by chunks of the prompts in prefill. All of them form one
row: the linear layers process it token by token, and attention runs per request over the KV cache (continuous batching,
Yu et al. 2022, "Orca"; chunked prefill, Agrawal et al. 2023, "Sarathi").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pairtune.engine.softcap import soft_cap
from pairtune.serve.kv_cache import KVCache, PrefillChunk, PrefixCopy

ATTENTION = "pairtune_served"


@dataclass(frozen=True)
class SlotRun:
    """Decoding requests in adjacent slots, whose attention is computed together.

    Attributes:
        start: index of the first request in the batch.
        slot: the first slot.
        count: the number of slots.
        tokens: length of the longest of these requests, including its new token.
    """

    start: int
    slot: int
    count: int
    tokens: int

    @property
    def rows(self) -> slice:
        """Its requests' rows in the batch."""
        return slice(self.start, self.start + self.count)


def slot_runs(slots: Sequence[int], positions: Sequence[int]) -> tuple[SlotRun, ...]:
    """Group adjacent slots.

    Args:
        slots: slots of the decoding requests, ascending.
        positions: positions of their new tokens.
    """
    runs: list[SlotRun] = []
    for number, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        last = runs[-1] if runs else None
        if last and slot == last.slot + last.count:
            runs[-1] = SlotRun(last.start, last.slot, last.count + 1, max(last.tokens, position + 1))
        else:
            runs.append(SlotRun(number, slot, 1, position + 1))
    return tuple(runs)


@dataclass(frozen=True)
class ForwardBatch:
    """The input of one forward pass: one token of each decoding request, then chunks of prompts.

    Attributes:
        cache: the KV cache.
        slots: slots of the decoding requests, ascending, [decoding].
        positions: positions of their tokens, [decoding].
        runs: the same slots, grouped where adjacent.
        chunks: prompt chunks, after the decoding tokens in the row.
        copies: prefixes that a chunk takes over from an earlier chunk of the same pass.
    """

    cache: KVCache
    slots: Tensor
    positions: Tensor
    runs: tuple[SlotRun, ...]
    chunks: tuple[PrefillChunk, ...]
    copies: tuple[PrefixCopy, ...] = ()

    def visible(self, run: SlotRun, window: int | None) -> Tensor:
        """The attention mask of a run's requests, [requests, 1, 1, tokens]."""
        return _visible(self.positions[run.rows, None], run.tokens, window)[:, None, None]


def _visible(queries: Tensor, tokens: int, window: int | None) -> Tensor:
    """The causal mask, [queries, tokens], for queries at positions [queries, 1]."""
    keys = torch.arange(tokens, device=queries.device)
    return keys <= queries if window is None else (keys <= queries) & (keys > queries - window)


def served_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    batch: ForwardBatch | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute a batch's attention; query, key and value are [1, heads, tokens, size].

    Returns:
        The output, [1, tokens, heads, size], and None for the attention weights.
    """
    if batch is None:
        raise ValueError("served attention needs a batch")
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    decoding = len(batch.slots)
    results = []
    if decoding:
        q, k, v = (tensor[0, :, :decoding].transpose(0, 1) for tensor in (query, key, value))
        batch.cache.write_tokens(layer, batch.slots, batch.positions, k, v)
        for run in batch.runs:
            keys, values = batch.cache.read_slots(layer, run.slot, run.count, run.tokens)
            visible = batch.visible(run, sliding_window)
            attended = _attend(q[run.rows].unsqueeze(2), keys, values, visible, scale, softcap)
            results.append(attended[:, :, 0].transpose(0, 1))
    queries = []
    offset = decoding
    for chunk in batch.chunks:
        q, k, v = (tensor[0, :, offset : offset + chunk.length] for tensor in (query, key, value))
        batch.cache.write_chunk(layer, chunk, k, v)
        queries.append(q)
        offset += chunk.length
    for copy in batch.copies:
        batch.cache.copy(copy, layer)
    for chunk, q in zip(batch.chunks, queries, strict=True):
        keys, values = batch.cache.read_chunk(layer, chunk)
        positions = torch.arange(chunk.start, chunk.end, device=q.device)[:, None]
        visible = _visible(positions, chunk.end, sliding_window)
        results.append(_attend(q[None], keys[None], values[None], visible, scale, softcap)[0])
    return torch.cat(results, dim=1).transpose(0, 1)[None], None


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Grouped-query attention of [requests, heads, tokens, size] queries."""
    rows, heads, tokens, size = query.shape
    shared = keys.shape[1]
    if tokens > 1 and softcap is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scale, enable_gqa=True)
    grouped = query.reshape(rows, shared, heads // shared * tokens, size)
    scores = soft_cap((grouped @ keys.mT).float().view(rows, heads, tokens, -1) * scale, softcap)
    weights = scores.masked_fill_(~visible, -torch.inf).softmax(-1).to(values.dtype)
    return (weights.view(rows, shared, heads // shared * tokens, -1) @ values).view(rows, heads, tokens, size)


AttentionInterface.register(ATTENTION, served_attention)
