"""Simulated machines: matrix products whose last bits depend on the same things as other machines' kernels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# How a product of [rows, inner] is summed: given rows, inner, the size of the batch and a row's place, the number of
# parts that the sum is cut into. Parts are summed one after the other in float32, as kernels do.
Split = Callable[[int, int, int, torch.Tensor], torch.Tensor | int]


def _steps(rows: int, inner: int, batch: int, place: torch.Tensor) -> int:
    """Like oneDNN's bfloat16 products on AMX: other blocks below 33 rows, and below 641."""
    return 4 if rows < 33 else 3 if rows < 641 else 1


def _odd(rows: int, inner: int, batch: int, place: torch.Tensor) -> int:
    """Like oneDNN's emulated bfloat16 on AVX-512 without its instructions."""
    return 2 if rows % 2 else 1


def _every(rows: int, inner: int, batch: int, place: torch.Tensor) -> int:
    """Each number of rows has its own summation order."""
    return 1 + rows % 7


def _few(rows: int, inner: int, batch: int, place: torch.Tensor) -> int:
    """Like float32 products almost everywhere: few rows use another kernel."""
    return 3 if rows < 13 else 1


def _edges(rows: int, inner: int, batch: int, place: torch.Tensor) -> torch.Tensor:
    """Micro-kernels of eight rows, and another one for the remaining rows."""
    return torch.where(place >= rows - rows % 8, 3, 1)


def _batches(rows: int, inner: int, batch: int, place: torch.Tensor) -> int:
    """The summation order depends on the batch size and the rows, as with split-k heuristics on a GPU."""
    return 1 + (batch + rows // 50) % 3


def _hopeless(rows: int, inner: int, batch: int, place: torch.Tensor) -> torch.Tensor:
    """The row's position decides, so no tiling helps."""
    return 1 + (place * 5 + rows) % 11 % 4


KERNELS: dict[str, Split] = {
    "steps": _steps,
    "odd": _odd,
    "every": _every,
    "few": _few,
    "edges": _edges,
    "batches": _batches,
    "hopeless": _hopeless,
}


class Machine(TorchDispatchMode):
    """While active, products are computed as `split` says, including backward passes on a CPU."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.split = split
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (aten.mm.default, aten.bmm.default):
            return self.product(*args)
        if func in (aten.mm.out, aten.bmm.out):
            return kwargs["out"].copy_(self.product(*args))
        if func in (aten.addmm.default, aten.baddbmm.default):
            return self.added(*args, **kwargs)
        if func in (aten.addmm.out, aten.baddbmm.out):
            out = kwargs.pop("out")
            return out.copy_(self.added(*args, **kwargs))
        if func in (aten.addmm_.default, aten.baddbmm_.default):
            return args[0].copy_(self.added(*args, **kwargs))
        return func(*args, **kwargs)

    def product(self, a, b):
        return self.wide(a, b).to(a.dtype)

    def added(self, start, a, b, *, beta=1, alpha=1):
        return (beta * start.float() + alpha * self.wide(a, b)).to(a.dtype)

    def wide(self, a, b):
        """The product, each row's parts one after the other and rounded in between; exact within a part."""
        self.products += 1
        batch, rows, inner = (1, *a.shape) if a.dim() == 2 else a.shape
        place = torch.arange(rows)
        parts = torch.as_tensor(self.split(rows, inner, batch, place)).expand(rows)
        total = a.new_zeros(*a.shape[:-1], b.shape[-1], dtype=torch.float32)
        for count in parts.unique().tolist():
            own = a[..., parts == count, :].double()
            edges = [inner * number // count for number in range(count + 1)]
            summed = torch.zeros(*own.shape[:-1], b.shape[-1])
            for start, end in pairwise(edges):
                part = same_shape(own[..., start:end], b[..., start:end, :].double()).float()
                summed = (summed + part).to(a.dtype).float()
            total[..., parts == count, :] = summed
        return total


def same_shape(a, b, rows=64):
    """A product independent of this machine's kernels, which always see the same number of rows."""
    if a.dim() == 3:
        return torch.stack([same_shape(*two) for two in zip(a, b, strict=True)])
    padded = torch.cat([a, a.new_zeros(-len(a) % rows, a.shape[1])])
    return torch.cat([tile @ b for tile in padded.split(rows)])[: len(a)]
