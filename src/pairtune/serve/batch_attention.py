"""Attention of many conversations in one forward pass, each over keys and values of its own.

A batch has one token of each conversation that is decoding, and chunks of prompts that are prefilled. They lie in one
row; the linear layers see tokens alone, and attention goes conversation by conversation over the KV cache (continuous
batching, Yu et al. 2022, "Orca"; chunked prefill, Agrawal et al. 2023, "Sarathi").
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
    """Decoding conversations in neighbouring slots, whose attention is one product.

    Attributes:
        start: of its conversations among those that decode.
        slot: the first slot.
        count: how many slots.
        tokens: of the longest of these conversations, with the token that comes now.
    """

    start: int
    slot: int
    count: int
    tokens: int

    @property
    def rows(self) -> slice:
        """Its conversations among those that decode."""
        return slice(self.start, self.start + self.count)


def slot_runs(slots: Sequence[int], positions: Sequence[int]) -> tuple[SlotRun, ...]:
    """Neighbouring slots together.

    Args:
        slots: of the decoding conversations, ascending.
        positions: of the tokens that come now.
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
    """What one forward pass is made of: first one token of each decoding conversation, then chunks of prompts.

    Attributes:
        cache: where keys and values are.
        slots: of the decoding conversations, ascending, [decoding].
        positions: of their tokens, [decoding].
        runs: the same slots, neighbours together.
        chunks: of prompts, behind them in the row.
        copies: what a chunk takes over from one before it, which is computed in this same pass.
    """

    cache: KVCache
    slots: Tensor
    positions: Tensor
    runs: tuple[SlotRun, ...]
    chunks: tuple[PrefillChunk, ...]
    copies: tuple[PrefixCopy, ...] = ()

    def visible(self, run: SlotRun, window: int | None) -> Tensor:
        """Which cached tokens the conversations of a run see, [conversations, 1, 1, tokens]."""
        return _visible(self.positions[run.rows, None], run.tokens, window)[:, None, None]


def _visible(queries: Tensor, tokens: int, window: int | None) -> Tensor:
    """Which of the first `tokens` tokens are seen from positions [queries, 1]: [queries, tokens]."""
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
    """Attention of a batch; query, key and value are [1, heads, tokens, size].

    Returns:
        [1, tokens, heads, size], and no weights.
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
    place = decoding
    for chunk in batch.chunks:
        q, k, v = (tensor[0, :, place : place + chunk.length] for tensor in (query, key, value))
        batch.cache.write_chunk(layer, chunk, k, v)
        queries.append(q)
        place += chunk.length
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
    """[conversations, heads, tokens, size] of queries over the keys that groups of heads share."""
    rows, heads, tokens, size = query.shape
    shared = keys.shape[1]
    if tokens > 1 and softcap is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scale, enable_gqa=True)
    grouped = query.reshape(rows, shared, heads // shared * tokens, size)
    scores = soft_cap((grouped @ keys.mT).float().view(rows, heads, tokens, -1) * scale, softcap)
    weights = scores.masked_fill_(~visible, -torch.inf).softmax(-1).to(values.dtype)
    return (weights.view(rows, shared, heads // shared * tokens, -1) @ values).view(rows, heads, tokens, size)


AttentionInterface.register(ATTENTION, served_attention)
