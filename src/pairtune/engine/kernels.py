"""Probes whether this machine's matrix products are batch-invariant, and chooses how to compute them accordingly."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pairtune.engine.products import Products, linear_layers, matrix_of
from pairtune.environment import processor
from pairtune.files import fingerprint, user_cache, write_json
from pairtune.run.records import KernelChoice, dump

# Row counts compared with a large one: small ones, odd ones, both sides of typical kernel thresholds, and those that
# smaller products may be padded to.
_COUNTS = (
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    11,
    13,
    15,
    16,
    17,
    24,
    31,
    32,
    33,
    63,
    64,
    65,
    96,
    127,
    129,
    200,
    257,
    385,
    513,
    641,
    1025,
)
_MANY = 1536
# Number of rows whose products are hashed to tell machines apart.
_TELLING = 200
# The output embedding sees only answer tokens, one chunk at a time.
_HEAD_MANY, _HEAD_WORDS = 192, 65_536
# Of adapters: libraries compute small products another way, so the smaller the rank, the more rows count as few.
_RANKS = (2, 4, 8, 16, 32, 64)
_LEAST = (16, 32, 64)
# Tried in this order; the choice depends on bits alone, never on timings, so that two runs choose the same tile.
_TILES = (128, 96, 256, 192, 64, 32)
# Shape of an attention product: heads, rows, size, keys; a pair of typical length, three query heads per key head.
_ATTENTION = (3, 600, 64, 200)
_TRIALS = 4

Layout = Literal["transposed", "plain"]


@dataclass(frozen=True)
class Probe:
    """The result of probing the products of one dtype.

    Attributes:
        products: the chosen way to compute them.
        differing: row counts whose products differ in their bits from those of many rows.
        bits: a fingerprint of the results of the chosen products: machines, libraries and thread counts with the same
            fingerprint compute the same log-probs.
        seconds: duration of the probe.
    """

    products: Products
    differing: tuple[int, ...]
    bits: str
    seconds: float

    def record(self) -> KernelChoice:
        """The entry for `environment.json`."""
        found = {"differing": list(self.differing), "bits": self.bits, "seconds": self.seconds}
        return KernelChoice(**asdict(self.products), **found)


class Kernels:
    """The products of one model on one machine, by dtype; each dtype is probed on first use.

    Args:
        model: the model whose layer shapes are probed; its weights may be on the meta device.
        device: the device it computes on.
        stored: what an earlier part of the run chose, by dtype.

    A stored choice, or one cached for this machine in the user cache, is reused as long as it computes the same bits.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, stored: Mapping[str, KernelChoice] | None = None
    ) -> None:
        self.device, self._stored = device, dict(stored or {})
        self._shapes = _shapes(model)
        self._probes: dict[torch.dtype, Probe] = {}

    def products(self, dtype: torch.dtype) -> Products:
        """How products of this dtype are computed."""
        return self.probe(dtype).products

    def probe(self, dtype: torch.dtype) -> Probe:
        """The same with the probe's findings. Accelerators are not probed: tiles would cost too much there."""
        if dtype not in self._probes:
            self._probes[dtype] = self._known(dtype, self._stored.get(_name(dtype))) or self._tried(dtype)
        return self._probes[dtype]

    def is_known(self, dtype: torch.dtype) -> bool:
        """Whether this machine's products of this dtype were probed before, so that nothing has to be."""
        return dtype in self._probes or self._cached(dtype).is_file()

    def record(self) -> dict[str, KernelChoice]:
        """The choices by dtype, for `environment.json`."""
        return self._stored | {_name(dtype): probe.record() for dtype, probe in self._probes.items()}

    def _known(self, dtype: torch.dtype, chosen: KernelChoice | None) -> Probe | None:
        """An earlier choice, if this machine still computes the same bits with it."""
        if chosen is None:
            return None
        products = Products(chosen.tile, chosen.least, chosen.by_trial, chosen.exact)
        if self._bits(dtype, products) != chosen.bits:
            return None
        return Probe(products, tuple(chosen.differing), chosen.bits, chosen.seconds)

    def _tried(self, dtype: torch.dtype) -> Probe:
        if self.device.type != "cpu":
            return Probe(Products(), (), self._bits(dtype, Products()), 0.0)
        cached = self._cached(dtype)
        if known := self._known(dtype, _read(cached)):
            return known
        started = time.perf_counter()
        differing = sorted({count for shape in self._shapes for count in _differing(shape, dtype)})
        products = self._choose(dtype, differing)
        seconds = round(time.perf_counter() - started, 3)
        probe = Probe(products, tuple(differing), self._bits(dtype, products), seconds)
        with suppress(OSError):  # the cache is not writable: the next run probes again
            write_json(cached, dump(probe.record()))
        return probe

    def _cached(self, dtype: torch.dtype) -> Path:
        """The file for this machine, its libraries and settings, and the shapes of the products."""
        limits = [f"{name}={os.environ.get(name)}" for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")]
        machine = (
            processor(),
            torch.backends.cpu.get_cpu_capability(),
            str(torch.get_num_threads()),
            torch.__version__,
        )
        name = fingerprint([_name(dtype), *machine, *limits, *map(str, self._shapes)])
        return user_cache() / "kernels" / f"{name}.json"

    def _choose(self, dtype: torch.dtype, differing: list[int]) -> Products:
        if not differing:
            return Products(by_trial=_batches_differ(self._shapes, dtype), exact=True)
        for least in _LEAST:
            if max(differing) < least:
                return Products(least=least, by_trial=_batches_differ(self._shapes, dtype, least), exact=True)
        for tile in _TILES:
            if all(_same_everywhere(shape, dtype, tile) for shape in self._shapes):
                return Products(tile=tile, by_trial=_batches_differ(self._shapes, dtype), exact=True)
        return Products()

    def _bits(self, dtype: torch.dtype, products: Products) -> str:
        if self.device.type != "cpu":
            return fingerprint([torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "other"])
        results = (products.matmul(*_operands(shape, dtype, _TELLING)) for shape in self._shapes)
        threads = str(torch.get_num_threads())  # see `engine.activations`
        return fingerprint([threads, *(each.contiguous().view(torch.uint8).numpy().tobytes() for each in results)])


@dataclass(frozen=True, order=True)
class _Shape:
    """The shape of a product: input and output size of a row, memory layout of the matrix, largest number of rows."""

    inner: int
    outer: int
    layout: Layout
    many: int


def _shapes(model: nn.Module) -> list[_Shape]:
    """The distinct shapes of a model's products, and those of adapters of common ranks."""
    sizes = {tuple(matrix_of(layer).shape) for _, layer in linear_layers(model)}
    sizes |= {two for inner, outer in set(sizes) for rank in _RANKS for two in ((inner, rank), (rank, outer))}
    shapes = set(_both_ways(sizes, _MANY))
    head = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(head, nn.Linear):
        shapes |= set(_both_ways([(head.in_features, min(head.out_features, _HEAD_WORDS))], _HEAD_MANY))
    return sorted(shapes)


def _both_ways(sizes: Iterable[tuple[int, ...]], many: int) -> Iterator[_Shape]:
    """Forward through a weight's transpose, and backward through the weight."""
    for inner, outer in sizes:
        yield _Shape(inner, outer, "transposed", many)
        yield _Shape(outer, inner, "plain", many)


def _operands(shape: _Shape, dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor]:
    """Rows and a matrix whose products are close to 0, so that any change in the order of summation shows.

    Most numbers of a row appear twice, shuffled, with weights of opposite signs and of varied magnitude; the others are
    small, so that a sum is much smaller than its terms. With ordinary numbers, the rounding of the result would hide
    most differences.
    """
    generator = torch.Generator().manual_seed(shape.inner)
    half = shape.inner * 7 // 16
    rest = shape.inner - 2 * half
    sizes = torch.exp2(torch.randint(-4, 5, (rows, half), generator=generator))
    numbers = torch.randn(rows, half, generator=generator) * sizes
    small = torch.randn(rows, rest, generator=generator) * 2**-10
    weights = torch.randn(half, shape.outer, generator=generator)
    others = torch.randn(rest, shape.outer, generator=generator)
    order = torch.randperm(shape.inner, generator=generator)
    x = torch.cat([numbers, numbers, small], dim=1)[:, order]
    matrix = torch.cat([weights, -weights, others])[order]
    matrix = matrix.T.contiguous().to(dtype).T if shape.layout == "transposed" else matrix.to(dtype)
    return x.to(dtype), matrix


def _differing(shape: _Shape, dtype: torch.dtype) -> list[int]:
    x, matrix = _operands(shape, dtype, shape.many)
    full = x @ matrix
    return [count for count in _COUNTS if count < shape.many and not torch.equal(x[:count] @ matrix, full[:count])]


def _same_everywhere(shape: _Shape, dtype: torch.dtype, tile: int) -> bool:
    """Whether a row's result has the same bits at every position in a tile."""
    x, matrix = _operands(shape, dtype, tile)
    full = x @ matrix
    return all(torch.equal(x.roll(by, 0) @ matrix, full.roll(by, 0)) for by in (1, 2, tile // 2 + 1, tile - 5))


def _batches_differ(shapes: Iterable[_Shape], dtype: torch.dtype, least: int = 1) -> bool:
    """Whether batched products of at least `least` rows depend on the size of the batch or on the number of rows."""
    for shape in shapes:
        if min(shape.inner, shape.outer) > _LEAST[-1]:
            continue  # not an adapter's product: those have a small rank
        x, matrix = _operands(shape, dtype, _HEAD_MANY)
        both = x.expand(_TRIALS, -1, -1).contiguous(), matrix.expand(_TRIALS, -1, -1)
        full = torch.bmm(*both)
        few = (torch.bmm(both[0][:, :rows], both[1]) for rows in _COUNTS if least <= rows < _HEAD_MANY)
        if any(not torch.equal(each, full[:, : each.shape[1]]) for each in few):
            return True
        if not torch.equal(torch.bmm(both[0][:1], both[1][:1]), full[:1]):
            return True
    heads, rows, size, keys = _ATTENTION
    x, matrix = _operands(_Shape(size, keys, "transposed", rows), dtype, rows)
    one = torch.bmm(x.expand(heads, -1, -1), matrix.expand(heads, -1, -1))
    many = torch.bmm(x.expand(heads * _TRIALS, -1, -1), matrix.expand(heads * _TRIALS, -1, -1))
    return not torch.equal(many[-heads:], one)


def _read(path: Path) -> KernelChoice | None:
    try:
        return KernelChoice.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
