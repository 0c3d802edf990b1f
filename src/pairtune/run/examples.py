"""Tables with one row per pair: `pairs.parquet`, and the per-example records of an evaluation.

Both are Parquet. `origin` names the source and row of a pair, so that the tables can be joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pairtune.errors import BadInput, one_line
from pairtune.files import replacing
from pairtune.run.metrics import EXAMPLE_METRICS, KL
from pairtune.run.records import AccuracyOf

Numbers = NDArray[np.float64]
PARTS = ("prompt", "chosen", "rejected")

# The metrics of one evaluated pair by name: EXAMPLE_METRICS, and optionally `kl`, None if it was not measured.
ExampleRecord = dict[str, float]

_TOKENS = "tokens/"
_GROUP = "group"
_ACCURACY_OF = "accuracy_of"


@dataclass(frozen=True)
class _PairTable:
    """A table with one row per pair."""

    table: pa.Table

    @classmethod
    def read(cls, path: Path) -> Self:
        """The table that `write` wrote.

        Raises:
            BadInput: the file is missing or damaged.
        """
        try:
            return cls(pq.ParquetFile(path).read())  # `read_table` would take a folder for an empty table
        except (OSError, pa.ArrowException) as error:
            raise BadInput(f"{path}: cannot be read as Parquet ({one_line(error, 120)})") from error

    def write(self, path: Path) -> None:
        """Write the table atomically."""
        with replacing(path) as temporary:
            pq.write_table(self.table, temporary)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def origins(self) -> list[str]:
        """Source and row of each pair."""
        origins: list[str] = self.table["origin"].to_pylist()
        return origins

    def tokens(self, part: str) -> NDArray[np.int64]:
        """Token counts of a part (prompt, chosen, rejected), [pairs]."""
        return _array(self.table[_TOKENS + part])


class Examples(_PairTable):
    """One evaluation, pair by pair: `origin`, `group` (shared by pairs with related prompts), token counts of the
    pair's parts, EXAMPLE_METRICS, and `kl` if it was measured.
    """

    @classmethod
    def of(
        cls,
        origins: pa.ChunkedArray | pa.Array,
        groups: Sequence[int] | NDArray[np.int64],
        lengths: Mapping[str, pa.Array],
        records: Sequence[Mapping[str, float | None]],
        accuracy_of: AccuracyOf = "pairs",
    ) -> Examples:
        """Build the table from the results of an evaluation, all in the order of the pairs.

        Args:
            origins: source and row of each pair.
            groups: group number of each pair.
            lengths: token counts of the pairs' parts, as `tokens/prompt` and so on.
            records: the metrics of each pair.
            accuracy_of: what accuracies count; see `ExampleSummary`.
        """
        columns = {"origin": origins, _GROUP: pa.array(groups), **lengths}
        columns |= {name: pa.array([row[name] for row in records], pa.float64()) for name in EXAMPLE_METRICS}
        if any(KL in row for row in records):
            columns[KL] = pa.array([row[KL] for row in records], pa.float64())
        return cls(pa.table(columns, metadata={_ACCURACY_OF: accuracy_of}))

    @property
    def accuracy_of(self) -> AccuracyOf:
        """What accuracies count: pairs, or single answers within prompts or among all of the evaluation."""
        kept = (self.table.schema.metadata or {}).get(_ACCURACY_OF.encode(), b"pairs").decode()
        return cast(AccuracyOf, kept)

    @property
    def unpaired(self) -> bool:
        """Whether these are single answers; then what is defined for the other kind of answers is missing."""
        return self.accuracy_of != "pairs"

    @property
    def cases(self) -> int | None:
        """Of single answers, the number of those of the rarer kind; None for pairs."""
        good = int((self.tokens("chosen") > 0).sum())
        return min(good, len(self) - good) if self.unpaired else None

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """Group number of each pair, [pairs]; None in files written before groups were recorded."""
        return self.table[_GROUP].to_numpy() if _GROUP in self.table.column_names else None

    def metric(self, name: str) -> Numbers:
        """One of EXAMPLE_METRICS or `kl` for each pair, [pairs]; NaN where it was not measured."""
        return _array(self.table[name]).astype(np.float64)

    @cached_property
    def metrics(self) -> Numbers:
        """All of EXAMPLE_METRICS, [pairs, metrics], for statistics.

        Of single answers, each value is what the answer contributes to the metric of the whole evaluation, of which a
        plain mean is taken like that over pairs: see `contributions`.
        """
        values = [self.metric(name) for name in EXAMPLE_METRICS]
        if self.unpaired:
            desirable = self.tokens("chosen") > 0
            # Of metrics of one kind only that kind has values; margins and the area under the curve are a sum and a
            # mean over both kinds.
            kinds: dict[str, Literal["sum", "mean"]] = {"rewards/margins": "sum", "logps/margins_per_token": "sum"}
            if self.accuracy_of == "auc":
                kinds["rewards/accuracies"] = "mean"
            values = [
                each if name == "loss" else contributions(each, desirable, kinds.get(name, "known"))
                for name, each in zip(EXAMPLE_METRICS, values, strict=True)
            ]
        return np.stack(values, axis=1)

    @property
    def has_kl(self) -> bool:
        """Whether the KL divergence from the base model was measured."""
        return KL in self.table.column_names

    def columns(self) -> dict[str, Numbers]:
        """All numeric columns by their names on disk, each [pairs]."""
        names = (name for name in self.table.column_names if name not in ("origin", _GROUP))
        return {name: _array(self.table[name]).astype(np.float64) for name in names}


class PairIndex(_PairTable):
    """Which pair is in which split: `split`, `origin`, `prompt` (a hash), and token counts of its parts."""

    @classmethod
    def of(
        cls,
        splits: Mapping[str, tuple[pa.ChunkedArray | pa.Array, NDArray[np.uint64], Mapping[str, pa.Array]]],
    ) -> PairIndex:
        """Build the index from origins, prompt hashes and lengths, by split."""
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

    @property
    def splits(self) -> list[str]:
        """The split of each pair."""
        splits: list[str] = self.table["split"].to_pylist()
        return splits

    def of_split(self, split: str) -> PairIndex:
        """The pairs of one split."""
        return PairIndex(self.table.filter(pc.equal(self.table["split"], split)))

    def prompts(self) -> dict[str, list[int]]:
        """The prompt hashes of each split."""
        found: dict[str, list[int]] = {}
        for split, prompt in zip(self.splits, self.table["prompt"].to_pylist(), strict=True):
            found.setdefault(split, []).append(prompt)
        return found


def _array(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.asarray(column.to_numpy())


def contributions(values: Numbers, desirable: NDArray[np.bool_], how: Literal["known", "sum", "mean"]) -> Numbers:
    """What each single answer contributes to a metric: values whose mean is the metric, and whose spread is its own.

    The metric is a mean over some of the answers, or the sum or mean of the means over both kinds, of which there may
    be different numbers. A plain mean of the contributions equals it, and the variance of that mean is the metric's, so
    that intervals and tests for means hold (for the area under the ROC curve, DeLong, DeLong and Clarke-Pearson 1988).

    Args:
        values: [answers]; NaN where the metric is not defined.
        desirable: the kind of each answer, [answers].
        how: the mean over the answers with values, or the sum or mean of those over either kind.

    Returns:
        [answers]
    """
    kinds = [~np.isnan(values)] if how == "known" else [desirable, ~desirable]
    means = [values[kind].mean() for kind in kinds if kind.any()]
    metric = float(np.mean(means) if how == "mean" else np.sum(means))
    found = np.full(len(values), metric)
    for kind, mean in zip([kind for kind in kinds if kind.any()], means, strict=True):
        found[kind] += len(values) / kind.sum() * (values[kind] - mean)
    return found
