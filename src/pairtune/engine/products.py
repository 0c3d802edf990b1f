"""Batch-invariant matrix products, in which a row's result does not depend on the other rows, on every machine.

A library may pick another kernel, with another order of summation, for another number of rows: oneDNN's bfloat16
products do so on AMX, float32 products of few rows almost everywhere. A pair's log-probs would then depend on what else
is in its row. Where a probe finds this (`engine.kernels`), products are cut into tiles with a fixed number of rows, the
last one padded, so that the library only ever sees one shape (He et al. 2025, "Defeating Nondeterminism in LLM
Inference"). Elsewhere a product is a single library call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pairtune.models.nf4 import Nf4Linear


@dataclass(frozen=True)
class Products:
    """How products of one dtype are computed on one machine.

    Attributes:
        tile: number of rows per tile; None: no tiles.
        least: without tiles, a product of fewer rows is padded to this many.
        by_trial: whether batched products, too, depend on the number of rows or on the size of the batch, so that they
            are computed one trial at a time and in tiles.
        exact: whether a row's bits are known not to depend on the other rows.
    """

    tile: int | None = None
    least: int = 1
    by_trial: bool = False
    exact: bool = False

    @property
    def plain(self) -> bool:
        """Whether the library's own calls always suffice."""
        return self.tile is None and self.least == 1

    def matmul(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """X matrix + bias: [N, in] and [in, out] to [N, out]."""
        if self._whole(len(x)):
            return _product(x, matrix, bias)
        result = x.new_empty(len(x), matrix.shape[1])
        for rows in self._tiles(len(x)):
            part = self._padded(x[rows])
            if len(part) == len(result[rows]):
                _product(part, matrix, bias, out=result[rows])
            else:
                result[rows] = _product(part, matrix, bias)[: len(result[rows])]
        return result

    def batched(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Each trial's rows times its own matrix: [K, N, in] and [K, in, out] to [K, N, out]."""
        if self._whole_batch(x.shape[1]):
            return torch.bmm(x, matrices)
        return torch.stack([self.matmul(rows, matrix) for rows, matrix in zip(x, matrices, strict=True)])

    def add_batched(self, y: Tensor, x: Tensor, matrices: Tensor, scale: float) -> Tensor:
        """Add scale * x @ matrices, as in `batched`, to y, [K, N, out], in place."""
        if self._whole_batch(x.shape[1]):
            return y.baddbmm_(x, matrices, alpha=scale)
        for total, rows_of_trial, matrix in zip(y, x, matrices, strict=True):
            for rows in self._tiles(len(total)):
                part = self._padded(total[rows])
                part.addmm_(self._padded(rows_of_trial[rows]), matrix, alpha=scale)
                total[rows] = part[: len(total[rows])]
        return y

    def bmm(self, a: Tensor, b: Tensor, trials: int) -> Tensor:
        """`torch.bmm` for operands [trials * M, ., .] whose shapes depend on one pair alone."""
        if not self.by_trial or trials == 1:
            return torch.bmm(a, b)
        return torch.cat([torch.bmm(*two) for two in zip(a.chunk(trials), b.chunk(trials), strict=True)])

    def _whole(self, rows: int) -> bool:
        """Whether a single library call suffices for this number of rows."""
        return self.tile is None and rows >= self.least

    def _whole_batch(self, rows: int) -> bool:
        """The same for a batched product."""
        return not self.by_trial and (self.tile is not None or rows >= self.least)

    def _tiles(self, count: int) -> Iterator[slice]:
        size = self.tile or max(count, 1)
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    def _padded(self, rows: Tensor) -> Tensor:
        """The rows, padded with rows of zeros to the size of a tile or the least number of rows."""
        size = self.tile or self.least
        if len(rows) >= size:
            return rows
        padded = rows.new_zeros(size, rows.shape[1])
        padded[: len(rows)] = rows
        return padded


# The library's own products.
PLAIN = Products()


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(x, matrix, out=out) if bias is None else torch.addmm(bias, x, matrix, out=out)


def matrix_of(layer: nn.Module) -> Tensor:
    """The matrix of a linear layer, [in, out]: a view of its weight, which GPT-2's Conv1D stores in this layout."""
    weight = cast(Tensor, layer.weight)
    return weight if isinstance(layer, Conv1D) else weight.T


# Other subclasses of nn.Linear, such as those of quantization libraries, may compute something else.
_KINDS = (nn.Linear, Nf4Linear, Conv1D)
_PLAIN = frozenset({"FalconLinear"})


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """A model's linear layers by name, without the output embedding."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if module is not head and (type(module) in _KINDS or type(module).__name__ in _PLAIN):
            yield name, module
