"""Tokenized pairs on disk: one Arrow file, memory-mapped, so that its size is not the memory's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pairtune.data.preference import PreferencePair
from pairtune.data.splits import Prompt, group_prompts
from pairtune.data.tokens import PairTokenizer, TokenizedPair
from pairtune.files import fingerprint

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("origin", pa.string()),
        ("prompt", pa.list_(_MESSAGE)),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("turns_cut", pa.int32()),
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
    ]
)
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class TokenIds(NamedTuple):
    """The ids of one pair; what `TokenizedPair` says of them holds."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class PairTable(Sequence[PreferencePair]):
    """A choice of the rows of a table of tokenized pairs, in the table's order.

    Args:
        table: with `SCHEMA`'s columns.
        rows: the numbers of the chosen rows; all without.
    """

    def __init__(self, table: pa.Table, rows: np.ndarray | None = None) -> None:
        self._table = table
        self._rows = np.arange(table.num_rows) if rows is None else rows

    @classmethod
    def open(cls, path: Path, rows: np.ndarray | None = None) -> PairTable:
        """A table that `write_table` wrote, memory-mapped."""
        return cls(pa.ipc.open_file(pa.memory_map(str(path))).read_all(), rows)

    @classmethod
    def of(cls, pairs: Sequence[PreferencePair], tokenizer: Any) -> PairTable:
        """Pairs at hand, tokenized in memory at their full length.

        Raises:
            BadRow: a pair that the chat template refuses.
        """
        encoded = PairTokenizer(tokenizer).encode(pairs)
        for result in encoded:
            if not isinstance(result, TokenizedPair):
                raise result
        return cls(pa.Table.from_batches([_batch(encoded)]))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...
    @overload
    def __getitem__(self, index: slice) -> PairTable: ...
    def __getitem__(self, index: int | slice) -> PreferencePair | PairTable:
        if isinstance(index, slice):
            return PairTable(self._table, self._rows[index])
        return _pair(self._table.slice(int(self._rows[index]), 1).to_pylist()[0])

    def __iter__(self) -> Iterator[PreferencePair]:
        for start in range(0, len(self), 256):
            block = self.columns("origin", "prompt", "chosen", "rejected", start=start, count=256)
            yield from map(_pair, block.to_pylist())

    def columns(self, *names: str, start: int = 0, count: int | None = None) -> pa.Table:
        """Some columns of some of the rows, copied into memory."""
        stop = None if count is None else start + count
        return self._table.select(list(names)).take(self._rows[start:stop])

    def tokens(self, rows: Sequence[int]) -> list[TokenIds]:
        """The ids of some of the rows, by their place in this table."""
        found = self._table.select(list(ID_COLUMNS)).take(self._rows[list(rows)]).to_pylist()
        return [TokenIds(*(row[name] for name in ID_COLUMNS)) for row in found]

    def ids_fingerprint(self) -> str:
        """Of all ids in their order."""
        ids = self.ids()
        return fingerprint(
            chunk.flatten().to_numpy().tobytes() + chunk.value_lengths().to_numpy().tobytes()
            for name in ID_COLUMNS
            for chunk in ids[name].chunks
        )

    @cached_property
    def groups(self) -> np.ndarray:
        """A number for each pair: those whose prompts belong together (`splits.group_prompts`) share one, [pairs]."""
        prompts = [Prompt.of(prompt) for prompt in self.columns("prompt")["prompt"].to_pylist()]
        return np.array(group_prompts(prompts), np.int64)

    def longest(self) -> int:
        """Tokens of the longest pair: its prompt and both answers."""
        return int(np.max(sum(each.astype(np.int64) for each in self.lengths().values()), initial=0))

    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens of `prompt`, `chosen` and `rejected`, each as `tokens/…`, [pairs]; answers with their end token."""
        ids = self.ids()
        return {
            f"tokens/{name.removesuffix('_ids')}": pc.list_value_length(ids[name]).to_numpy() for name in ID_COLUMNS
        }

    def ids(self) -> pa.Table:
        """`prompt_ids`, `chosen_ids` and `rejected_ids` of all rows, copied into memory."""
        return self.columns(*ID_COLUMNS)


def write_table(path: Path, batches: Iterable[Sequence[TokenizedPair]]) -> None:
    """Write pairs batch by batch; no more than one is in memory."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for batch in batches:
            if batch:
                writer.write_batch(_batch(batch))


def _batch(pairs: Sequence[TokenizedPair]) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {
        "origin": [each.pair.origin for each in pairs],
        "prompt": [each.prompt for each in pairs],
        "chosen": [each.pair.chosen for each in pairs],
        "rejected": [each.pair.rejected for each in pairs],
        "turns_cut": [each.turns_cut for each in pairs],
        "prompt_ids": [each.prompt_ids for each in pairs],
        "chosen_ids": [each.chosen_ids for each in pairs],
        "rejected_ids": [each.rejected_ids for each in pairs],
    }
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def _pair(row: dict[str, Any]) -> PreferencePair:
    return PreferencePair(tuple(row["prompt"]), row["chosen"], row["rejected"], row["origin"])
