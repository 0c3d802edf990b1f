"""Attention over packed pairs on an accelerator: one call for all pairs of a row, and for all trials.

On a CPU, each pair takes products of its own (`packed_attention`). An accelerator would wait for the next small kernel
most of the time, so here the pairs' places are tensors: the row is computed in one call, whatever the pairs' lengths,
and a row's shapes depend only on its number of tokens, so that it can be replayed as a graph (`row_graphs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad, scaled_dot_product_attention

from pairtune.engine.softcap import soft_cap

# Largest head that the flash kernels take, and the number that its size must be a multiple of.
_LARGEST_HEAD, _HEAD_MULTIPLE = 256, 8
# The oldest GPUs that the flash kernels run on (Ampere).
_OLDEST = (8, 0)
# Rows have at least this many sequences, some of them empty, so that most rows have the same number.
_SEQUENCES = 16
# The flash kernels are started for sequences of this many tokens, or of a power of two above; in short rows for those
# of the whole row, again so that most rows are alike.
_LONGEST, _SHORT_ROW = 512, 2048


@dataclass(frozen=True, eq=False)
class RowLayout:
    """Where the pairs of a row of T tokens are, as tensors.

    The flash kernels take a row as S sequences of queries and of keys, one after another: a pair's prompt and chosen
    answer attend to themselves; its rejected answer attends to a copy of the prompt's keys and to itself. There are 2 T
    keys, of which the last ones may be unused.

    Attributes:
        longest: no sequence has more queries, and none with queries more keys; a power of two, or T.
        pairs: the number of each token's pair, [T].
        parts: 0 in a prompt, 1 in a chosen answer, 2 in a rejected one, [T].
        positions: position ids, [T].
        query_starts: where each sequence's queries start, and T, [S + 1].
        key_starts: where its keys start, and 2 T, [S + 1].
        keys: the token that each key is of, [2 T].
        places: where among the keys each token's own is, [T].
        copies: where the copy of a prompt token's key is, [T]; 0 where there is none.
        copied: 1 where there is a copy, else 0, [T].
    """

    longest: int
    pairs: Tensor
    parts: Tensor
    positions: Tensor
    query_starts: Tensor
    key_starts: Tensor
    keys: Tensor
    places: Tensor
    copies: Tensor
    copied: Tensor
    _known: dict[Any, Any] = field(default_factory=dict, init=False)

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the arguments."""
        return [value for each in fields(self) if isinstance(value := getattr(self, each.name), Tensor)]

    @property
    def shape(self) -> tuple[int, int, int]:
        """T, S and the longest sequence: rows with the same are computed by the same kernels."""
        return len(self.pairs), len(self.query_starts) - 1, self.longest

    def with_tensors(self, tensors: Sequence[Tensor]) -> RowLayout:
        """A layout of the same shape with other tensors; what this one remembers is not kept."""
        return RowLayout(self.longest, *tensors)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attention of every token to its pair's prompt and to its own answer, up to itself.

        Args:
            query: [trials, T, heads, size].
            key: [trials, T, key heads, size].
            value: the same shape as key.
            scale: factor of the scores.
            window: number of tokens that a token attends to, itself included; None: all.
            softcap: cap of the scores' soft-capping; None: no capping.

        Returns:
            [trials, T, heads, size].
        """
        if _flash_runs(query, value, softcap):
            starts = self._starts(*query.shape[:2])
            left = -1 if window is None else window - 1
            result: Tensor = _FlashRows.apply(query, key, value, self, *starts, scale, left)
            return result
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        visible = self._visible(window)
        if softcap is None:
            mixed = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)
        else:
            scores = soft_cap(query @ key.mT * scale, softcap).masked_fill(~visible, -torch.inf)
            mixed = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
        return mixed.transpose(1, 2)

    def _starts(self, trials: int, tokens: int) -> tuple[Tensor, Tensor]:
        """The starts of the queries and keys of all trials, one after another, [trials * S + 1] each."""
        if (trials, tokens) not in self._known:
            by = torch.arange(trials, device=self.keys.device, dtype=torch.int32)[:, None]
            own, of_keys = self.query_starts[:-1] + by * tokens, self.key_starts[:-1] + by * (2 * tokens)
            ends = self.query_starts[-1:] * trials, self.key_starts[-1:] * trials
            each = zip((own, of_keys), ends, strict=True)
            self._known[trials, tokens] = tuple(torch.cat([starts.flatten(), end]).int() for starts, end in each)
        found: tuple[Tensor, Tensor] = self._known[trials, tokens]
        return found

    def _visible(self, window: int | None) -> Tensor:
        """Whether a token attends to another, [T, T]."""
        if window not in self._known:
            distance = self.positions[:, None] - self.positions
            visible = (self.pairs[:, None] == self.pairs) & (distance >= 0)
            visible &= (self.parts == 0) | (self.parts[:, None] == self.parts)
            self._known[window] = visible if window is None else visible & (distance < window)
        found: Tensor = self._known[window]
        return found


def takes_whole_rows(device: torch.device) -> bool:
    """Whether rows are computed whole on a device, with a layout, and all trials' adapters updated as one tensor."""
    return device.type != "cpu"


def row_layout(segments: Sequence[tuple[int, int, int]], padding: int) -> RowLayout:
    """The layout of a row, on the CPU.

    Args:
        segments: tokens of each pair's prompt, chosen and rejected answer, in row order.
        padding: tokens after the last pair, which attend to each other only.
    """
    lengths = torch.tensor([*segments, (0, padding, 0)])
    prompt, chosen, rejected = lengths.T
    first = prompt + chosen  # tokens of the first sequence of each pair
    tokens, keys = lengths.sum(1), first + torch.where(rejected > 0, prompt + rejected, 0)
    starts, key_starts = tokens.cumsum(0) - tokens, keys.cumsum(0) - keys
    total = int(tokens.sum())

    numbers = torch.arange(total)
    pairs = torch.repeat_interleave(tokens, output_size=total)
    parts = torch.repeat_interleave(torch.arange(3).repeat(len(lengths)), lengths.flatten(), output_size=total)
    inside = numbers - starts[pairs]
    places = key_starts[pairs] + inside + torch.where(parts == 2, prompt[pairs], 0)
    copied = (parts == 0) & (rejected[pairs] > 0)
    copies = torch.where(copied, key_starts[pairs] + first[pairs] + inside, 0)
    of_keys = torch.zeros(2 * total, dtype=torch.long)
    of_keys[places] = numbers
    of_keys[copies[copied]] = numbers[copied]

    sequences = max(_SEQUENCES, 1 << (2 * len(lengths)).bit_length())
    rest = sequences - 2 * len(lengths)  # without queries; the first of them has the unused keys
    query_ends = torch.stack([starts + first, starts + tokens], 1).flatten()
    key_ends = torch.stack([key_starts + first, key_starts + keys], 1).flatten()
    longest = int(torch.stack([first, torch.where(rejected > 0, prompt + rejected, 0)]).max())
    columns = (
        pairs,
        parts,
        inside - torch.where(parts == 2, chosen[pairs], 0),
        pad(pad(query_ends, (1, 0)), (0, rest), value=total),
        pad(pad(key_ends, (1, 0)), (0, rest), value=2 * total),
        of_keys,
        places,
        copies,
        copied,
    )
    bound = total if total <= _SHORT_ROW else min(total, max(_LONGEST, 1 << (longest - 1).bit_length()))
    return RowLayout(bound, *(column.int() for column in columns))


def _flash_runs(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    size = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and softcap is None
        and size == value.shape[-1]
        and size <= _LARGEST_HEAD
        and size % _HEAD_MULTIPLE == 0
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= _OLDEST
    )


class _FlashRows(Function):
    """PyTorch's flash attention for sequences of any lengths (Dao 2023), with the prompts' keys used twice."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: RowLayout,
        query_starts: Tensor,
        key_starts: Tensor,
        scale: float,
        left: int,
    ) -> Tensor:
        q = query.flatten(0, 1)
        k, v = (each.index_select(1, layout.keys).flatten(0, 1) for each in (key, value))
        ctx.sequences = (query_starts, key_starts, layout.longest, layout.longest, 0.0, True)
        ctx.options = {"scale": scale, "window_size_left": left, "window_size_right": 0 if left >= 0 else -1}
        forward = torch.ops.aten._flash_attention_forward
        result, sums, *state, _ = forward(q, k, v, *ctx.sequences, False, **ctx.options)
        ctx.layout = layout
        ctx.save_for_backward(query, key, value, result, sums, *state)
        mixed: Tensor = result.view(query.shape)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, sums, *state = ctx.saved_tensors
        layout = ctx.layout
        q, grad = query.flatten(0, 1), grads[0].flatten(0, 1)
        k, v = (each.index_select(1, layout.keys).flatten(0, 1) for each in (key, value))
        found = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, result, sums, *ctx.sequences, *state, **ctx.options
        )
        by_query, by_key, by_value = found
        both = (_gathered(each.view(len(key), -1, *key.shape[2:]), layout) for each in (by_key, by_value))
        return by_query.view(query.shape), *both, None, None, None, None, None


def _gathered(by_keys: Tensor, layout: RowLayout) -> Tensor:
    """The gradients of the tokens' own keys, from those of all keys: a prompt's is a sum of two, in the same order."""
    own, copies = by_keys.index_select(1, layout.places), by_keys.index_select(1, layout.copies)
    return own.addcmul_(copies, layout.copied[:, None, None].to(own.dtype))
