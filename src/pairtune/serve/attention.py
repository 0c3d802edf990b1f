"""Attention of many conversations in one pass, each with keys and values of its own.

Every pass takes some tokens of some conversations: one of each that is being answered, and pieces of prompts that have
come in. They lie in one row; the linear layers see tokens alone, and attention goes conversation by conversation over
what is kept here (continuous batching, Yu et al. 2022, "Orca"; prompts in pieces, Agrawal et al. 2023, "Sarathi").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

ATTENTION = "pairtune_served"


@dataclass(frozen=True)
class Piece:
    """Tokens of one conversation in a pass.

    Attributes:
        slot: the conversation's place.
        start: how many of its tokens are kept already.
        length: how many come now.
    """

    slot: int
    start: int
    length: int


@dataclass(frozen=True)
class Copy:
    """The first tokens of one conversation are those of another: from slot to slot."""

    source: int
    target: int
    tokens: int


class Kept:
    """Keys and values of the conversations, [slots, key heads, tokens, size] a layer; room grows as it is needed.

    Args:
        model: whose layers they are.
        slots: conversations at once.
    """

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        config = model.config
        self._slots, self._dtype, self._device = slots, model.dtype, model.device
        self._heads = config.num_key_value_heads
        self._size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._layers = config.num_hidden_layers
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self.room = 0

    @property
    def bytes(self) -> int:
        """Memory taken."""
        return sum(tensor.nbytes for tensor in [*self._keys, *self._values])

    def make_room(self, tokens: int) -> None:
        """Let every slot hold so many tokens."""
        if tokens <= self.room:
            return
        room = max(tokens, 2 * self.room, 256)
        shape = (self._slots, self._heads, room, self._size)
        grown = []
        for kept in (self._keys, self._values):
            grown.append([torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in range(self._layers)])
            for new, old in zip(grown[-1], kept, strict=False):  # at first there is nothing old
                new[:, :, : self.room] = old
        (self._keys, self._values), self.room = grown, room

    def copy(self, copy: Copy, layer: int | None = None) -> None:
        """Let a conversation know what another has read; in one layer, or in all."""
        for kept in (self._keys, self._values):
            for tensor in kept if layer is None else kept[layer : layer + 1]:
                tensor[copy.target, :, : copy.tokens] = tensor[copy.source, :, : copy.tokens]

    def swap(self, one: int, other: int, tokens: int) -> None:
        """Let two conversations, of so many tokens at most, change places."""
        for tensor in [*self._keys, *self._values]:
            pair = tensor[[other, one], :, :tokens]
            tensor[one, :, :tokens], tensor[other, :, :tokens] = pair[0], pair[1]

    def add(self, layer: int, piece: Piece, key: Tensor, value: Tensor) -> None:
        """Keep a piece's keys and values, [key heads, length, size]."""
        place = slice(piece.start, piece.start + piece.length)
        self._keys[layer][piece.slot, :, place], self._values[layer][piece.slot, :, place] = key, value

    def of(self, layer: int, piece: Piece) -> tuple[Tensor, Tensor]:
        """Keys and values of a conversation up to the end of a piece, [key heads, tokens, size]."""
        end = piece.start + piece.length
        return self._keys[layer][piece.slot, :, :end], self._values[layer][piece.slot, :, :end]

    def add_tokens(self, layer: int, starts: Tensor, longest: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The same for one token each of the first conversations, [conversations, key heads, size]."""
        rows = torch.arange(len(starts), device=starts.device)
        keys, values = self._keys[layer], self._values[layer]
        keys[rows, :, starts], values[rows, :, starts] = key, value
        return keys[: len(starts), :, :longest], values[: len(starts), :, :longest]


@dataclass(frozen=True)
class Pass:
    """What one pass is made of: first one token each of conversations 0 .. answering - 1, then pieces of prompts.

    Attributes:
        kept: where keys and values are.
        starts: how many tokens of each conversation that is being answered are kept, [answering].
        pieces: of prompts, behind them in the row.
        copies: what a piece takes over from one before it, which is read in this same pass.
    """

    kept: Kept
    starts: Tensor
    longest: int
    pieces: tuple[Piece, ...]
    copies: tuple[Copy, ...] = ()

    def visible(self, window: int | None) -> Tensor:
        """Which kept tokens the answering conversations see, [answering, 1, 1, longest]."""
        places = torch.arange(self.longest, device=self.starts.device)
        seen = places <= self.starts[:, None]
        if window is not None:
            seen &= places > self.starts[:, None] - window
        return seen[:, None, None]


def served_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    batch: Pass | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a pass; query, key and value are [1, heads, tokens, size].

    Returns:
        [1, tokens, heads, size], and no weights.
    """
    if batch is None:
        raise ValueError("served attention needs a pass")
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    answering = len(batch.starts)
    results = []
    if answering:
        q, k, v = (tensor[0, :, :answering].transpose(0, 1) for tensor in (query, key, value))
        keys, values = batch.kept.add_tokens(layer, batch.starts, batch.longest, k, v)
        seen = batch.visible(sliding_window)
        results.append(_attend(q.unsqueeze(2), keys, values, seen, scale, softcap)[:, :, 0].transpose(0, 1))
    parts = []
    place = answering
    for piece in batch.pieces:
        q, k, v = (tensor[0, :, place : place + piece.length] for tensor in (query, key, value))
        batch.kept.add(layer, piece, k, v)
        parts.append(q)
        place += piece.length
    for copy in batch.copies:
        batch.kept.copy(copy, layer)
    for piece, q in zip(batch.pieces, parts, strict=True):
        keys, values = batch.kept.of(layer, piece)
        here = torch.arange(piece.start, piece.start + piece.length, device=q.device)[:, None]
        places = torch.arange(keys.shape[1], device=q.device)
        seen = places <= here if sliding_window is None else (places <= here) & (places > here - sliding_window)
        results.append(_attend(q[None], keys[None], values[None], seen, scale, softcap)[0])
    return torch.cat(results, dim=1).transpose(0, 1)[None], None


def _attend(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, softcap: float | None) -> Tensor:
    """[conversations, heads, tokens, size] of queries over the keys that groups of heads share."""
    rows, heads, tokens, size = query.shape
    shared = keys.shape[1]
    if tokens > 1 and softcap is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scale, enable_gqa=True)
    grouped = query.reshape(rows, shared, heads // shared * tokens, size)
    scores = (grouped @ keys.mT).float().view(rows, heads, tokens, -1) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill_(~seen, -torch.inf).softmax(-1).to(values.dtype)
    return (weights.view(rows, shared, heads // shared * tokens, -1) @ values).view(rows, heads, tokens, size)


AttentionInterface.register(ATTENTION, served_attention)
