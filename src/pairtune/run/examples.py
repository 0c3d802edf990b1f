"""What is kept of single pairs: `pairs.parquet`, and the per-example records of an evaluation.

Both are Parquet, one row a pair. `origin` names a pair's source and row, so that the tables can be joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pairtune.errors import BadInput, one_line
from pairtune.files import replacing
from pairtune.run.metrics import EXAMPLE_METRICS, KL

Numbers = NDArray[np.float64]
PARTS = ("prompt", "chosen", "rejected")

# Metrics of one evaluated pair by name: EXAMPLE_METRICS, and perhaps `kl`, which is None where it was not measured.
ExampleRecord = dict[str, float]

_TOKENS = "tokens/"
_GROUP = "group"


@dataclass(frozen=True)
class Examples:
    """One evaluation, pair by pair: `origin`, `group` (pairs whose prompts belong together share it), tokens of the
    pair's parts, EXAMPLE_METRICS, and `kl` where it was measured.
    """

    table: pa.Table

    @classmethod
    def of(
        cls,
        origins: pa.ChunkedArray | pa.Array,
        groups: Sequence[int] | NDArray[np.int64],
        lengths: Mapping[str, pa.Array],
        records: Sequence[Mapping[str, float | None]],
    ) -> Examples:
        """Put together what an evaluation found; all in the order of the pairs.

        Args:
            origins: of the pairs.
            groups: of the pairs.
            lengths: tokens of the pairs' parts, as `tokens/prompt` and so on.
            records: one a pair.
        """
        columns = {"origin": origins, _GROUP: pa.array(groups), **lengths}
        columns |= {name: pa.array([row[name] for row in records], pa.float64()) for name in EXAMPLE_METRICS}
        if any(KL in row for row in records):
            columns[KL] = pa.array([row[KL] for row in records], pa.float64())
        return cls(pa.table(columns))

    @classmethod
    def read(cls, path: Path) -> Examples:
        """The examples that `write` wrote.

        Raises:
            BadInput: the file is missing or damaged.
        """
        return cls(_read(path))

    def write(self, path: Path) -> None:
        """Write them, whole or not at all."""
        with replacing(path) as temporary:
            pq.write_table(self.table, temporary)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def origins(self) -> list[str]:
        """Source and row of each pair."""
        origins: list[str] = self.table["origin"].to_pylist()
        return origins

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """Of the pairs, [pairs]; None: they were written before groups were kept."""
        return self.table[_GROUP].to_numpy() if _GROUP in self.table.column_names else None

    def tokens(self, part: str) -> NDArray[np.int64]:
        """Tokens of a part (prompt, chosen, rejected) of each pair, [pairs]."""
        return _array(self.table[_TOKENS + part])

    def metric(self, name: str) -> Numbers:
        """One of EXAMPLE_METRICS or `kl` of each pair, [pairs]; NaN where it was not measured."""
        return _array(self.table[name]).astype(np.float64)

    @cached_property
    def metrics(self) -> Numbers:
        """All of EXAMPLE_METRICS, [pairs, metrics]."""
        return np.stack([self.metric(name) for name in EXAMPLE_METRICS], axis=1)

    @property
    def has_kl(self) -> bool:
        """Whether the divergence from the base was measured."""
        return KL in self.table.column_names

    def columns(self) -> dict[str, Numbers]:
        """All numbers by the names that they have on disk, [pairs] each."""
        names = (name for name in self.table.column_names if name not in ("origin", _GROUP))
        return {name: _array(self.table[name]).astype(np.float64) for name in names}


@dataclass(frozen=True)
class PairIndex:
    """Which pair is in which split: `split`, `origin`, `prompt` (a hash), and the tokens of its parts."""

    table: pa.Table

    @classmethod
    def of(
        cls,
        splits: Mapping[str, tuple[pa.ChunkedArray | pa.Array, NDArray[np.uint64], Mapping[str, pa.Array]]],
    ) -> PairIndex:
        """Put together origins, hashes of the prompts, and lengths, by split."""
        tables = [
            pa.table(
                {
                    "split": pa.array([name] * len(prompts), pa.string()),
                    "origin": origins,
                    "prompt": prompts,
                    **lengths,
                }
            )
            for name, (origins, prompts, lengths) in splits.items()
        ]
        return cls(pa.concat_tables(tables))

    @classmethod
    def read(cls, path: Path) -> PairIndex:
        """The index that `write` wrote.

        Raises:
            BadInput: the file is missing or damaged.
        """
        return cls(_read(path))

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        with replacing(path) as temporary:
            pq.write_table(self.table, temporary)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def splits(self) -> list[str]:
        """Of each pair."""
        splits: list[str] = self.table["split"].to_pylist()
        return splits

    @property
    def origins(self) -> list[str]:
        """Source and row of each pair."""
        origins: list[str] = self.table["origin"].to_pylist()
        return origins

    def tokens(self, part: str, split: str | None = None) -> NDArray[np.int64]:
        """Tokens of a part of each pair, or of the pairs of one split."""
        tokens = _array(self.table[_TOKENS + part])
        return tokens if split is None else tokens[np.array([each == split for each in self.splits], bool)]

    def prompts(self) -> dict[str, list[int]]:
        """Hashes of the prompts by split."""
        found: dict[str, list[int]] = {}
        for split, prompt in zip(self.splits, self.table["prompt"].to_pylist(), strict=True):
            found.setdefault(split, []).append(prompt)
        return found


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"{path}: cannot be read as Parquet ({one_line(error, 120)})") from error


def _array(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.asarray(column.to_numpy())
