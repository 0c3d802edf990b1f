"""Tokenized pairs on disk: one Arrow file, memory-mapped, so that it may be larger than memory."""

from __future__ import annotations

import json
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
from pairtune.footprint import PairLengths, of_single_answers

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("origin", pa.string()),
        ("prompt", pa.list_(_MESSAGE)),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("tools", pa.string()),
        ("turns_cut", pa.int32()),
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
    ]
)
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class TokenIds(NamedTuple):
    """The token ids of one pair, as described in `TokenizedPair`.

    Of a single answer, `chosen` is the answer and `rejected` the mismatched one (`PairTable.mismatched`).
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class PairTable(Sequence[PreferencePair]):
    """Selected rows of a table of tokenized pairs, in the table's order.

    Args:
        table: a table with the columns of `SCHEMA`.
        rows: the numbers of the selected rows; None for all.
        max_length: the most tokens of a prompt with a mismatched answer, which is cut there; None for no limit.
    """

    def __init__(self, table: pa.Table, rows: np.ndarray | None = None, max_length: int | None = None) -> None:
        self._table = table
        self._rows = np.arange(table.num_rows) if rows is None else rows
        self._max_length = max_length

    @classmethod
    def open(cls, path: Path, rows: np.ndarray | None = None, max_length: int | None = None) -> PairTable:
        """A table that `write_table` wrote, memory-mapped."""
        return cls(pa.ipc.open_file(pa.memory_map(str(path))).read_all(), rows, max_length)

    @classmethod
    def of(cls, pairs: Sequence[PreferencePair], tokenizer: Any) -> PairTable:
        """A table of the given pairs, tokenized in memory at full length.

        Raises:
            BadRow: the chat template refuses a pair.
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
            return PairTable(self._table, self._rows[index], self._max_length)
        return _pair(self._table.slice(int(self._rows[index]), 1).to_pylist()[0])

    def __iter__(self) -> Iterator[PreferencePair]:
        for start in range(0, len(self), 256):
            block = self.columns("origin", "prompt", "chosen", "rejected", "tools", start=start, count=256)
            yield from map(_pair, block.to_pylist())

    def columns(self, *names: str, start: int = 0, count: int | None = None) -> pa.Table:
        """The named columns of `count` rows from `start`, copied into memory."""
        stop = None if count is None else start + count
        return self._table.select(list(names)).take(self._rows[start:stop])

    def tokens(self, rows: Sequence[int]) -> list[TokenIds]:
        """The token ids of the given rows, numbered by position in this `PairTable`."""
        found = self._token_ids(list(rows))
        if not self.unpaired:
            return found
        others = self._token_ids(self.mismatched[list(rows)])
        return [self._with_mismatched(own, other) for own, other in zip(found, others, strict=True)]

    def _token_ids(self, rows: Sequence[int] | np.ndarray) -> list[TokenIds]:
        found = self._table.select(list(ID_COLUMNS)).take(self._rows[rows]).to_pylist()
        return [TokenIds(*(row[name] for name in ID_COLUMNS)) for row in found]

    def _with_mismatched(self, own: TokenIds, other: TokenIds) -> TokenIds:
        answer, mismatched = own.chosen or own.rejected, other.chosen or other.rejected
        room = None if self._max_length is None else max(1, self._max_length - len(own.prompt))
        return TokenIds(own.prompt, answer, mismatched[:room])

    @cached_property
    def unpaired(self) -> bool:
        """Whether the rows are single answers, each desirable or not, instead of pairs."""
        return len(self) > 0 and not all(self._token_ids([0])[0])

    @cached_property
    def desirable(self) -> np.ndarray:
        """Whether each single answer is a desirable one, [answers]."""
        return self.lengths()["tokens/chosen"] > 0

    @cached_property
    def same_prompt(self) -> np.ndarray:
        """A number for each row that rows with the same prompt share, [rows]."""
        keys = [ids.tobytes() for ids in _arrays(self.columns("prompt_ids")["prompt_ids"])]
        numbers: dict[bytes, int] = {}
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)

    @cached_property
    def mismatched(self) -> np.ndarray:
        """For each single answer, the row whose answer to another prompt KTO's KL estimate gives to its prompt, [rows].

        Neighbouring rows with the same prompt get the answers of the neighbours before them in turn, the first ones
        those of the last, so that each answer is used about once, as in TRL, where it is the row before in the batch,
        whatever its prompt. The pairing is the same in every epoch, so that reference log-probs are computed once.
        """
        prompts, count = self.same_prompt, len(self)
        turns = np.flatnonzero(prompts != np.roll(prompts, 1))  # rows whose predecessor has another prompt
        if not len(turns):
            return np.roll(np.arange(count), 1)
        first = turns[0]  # rows are numbered from here, so that none of the neighbours go round
        starts = turns - first
        lengths = np.diff(np.append(starts, count))
        place = np.repeat(np.arange(len(starts)), lengths)
        before = np.roll(np.arange(len(starts)), 1)[place]
        partner = starts[before] + (np.arange(count) - starts[place]) % lengths[before]
        result = np.empty(count, np.int64)
        result[(np.arange(count) + first) % count] = (partner + first) % count
        return result

    def ids_fingerprint(self) -> str:
        """A fingerprint of all token ids that are scored, in order."""
        ids = self.ids()
        parts = [
            chunk.flatten().to_numpy().tobytes() + chunk.value_lengths().to_numpy().tobytes()
            for name in ID_COLUMNS
            for chunk in ids[name].chunks
        ]
        more = (self.mismatched.tobytes(), str(self._max_length).encode()) if self.unpaired else ()
        return fingerprint([*parts, *more])

    @cached_property
    def groups(self) -> np.ndarray:
        """Group number of each pair; pairs with related prompts (see `splits.group_prompts`) share one, [pairs]."""
        prompts = [Prompt.of(prompt) for prompt in self.columns("prompt")["prompt"].to_pylist()]
        return np.array(group_prompts(prompts), np.int64)

    def longest(self) -> int:
        """Number of tokens of the longest pair: its prompt and both answers."""
        return int(np.max(sum(each.astype(np.int64) for each in self.lengths().values()), initial=0))

    def pair_lengths(self) -> PairLengths:
        """What the pairs are like for an estimate of time and memory."""
        means = {name.removeprefix("tokens/"): float(np.mean(each)) for name, each in self.lengths().items()}
        if self.unpaired:
            means = of_single_answers(means["prompt"], means["chosen"] + means["rejected"])
        return PairLengths(**means, longest=self.longest())

    def lengths(self) -> dict[str, np.ndarray]:
        """Token counts of each part as `tokens/prompt` and so on, [pairs]; answers include their end token."""
        ids = self.ids()
        return {
            f"tokens/{name.removesuffix('_ids')}": pc.list_value_length(ids[name]).to_numpy() for name in ID_COLUMNS
        }

    def ids(self) -> pa.Table:
        """`prompt_ids`, `chosen_ids` and `rejected_ids` of all rows, copied into memory."""
        return self.columns(*ID_COLUMNS)


def _arrays(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """The token ids of each row."""
    for chunk in column.chunks:
        values, ends = chunk.flatten().to_numpy(), np.cumsum(chunk.value_lengths().to_numpy())
        yield from np.split(values, ends[:-1]) if len(ends) else ()


def write_table(path: Path, batches: Iterable[Sequence[TokenizedPair]]) -> None:
    """Write pairs batch by batch; only one batch is in memory at a time."""
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
        "tools": [json.dumps(each.pair.tools) if each.pair.tools else None for each in pairs],
        "turns_cut": [each.turns_cut for each in pairs],
        "prompt_ids": [each.prompt_ids for each in pairs],
        "chosen_ids": [each.chosen_ids for each in pairs],
        "rejected_ids": [each.rejected_ids for each in pairs],
    }
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def _pair(row: dict[str, Any]) -> PreferencePair:
    tools = tuple(json.loads(row["tools"])) if row["tools"] else ()
    return PreferencePair(tuple(row["prompt"]), row["chosen"], row["rejected"], row["origin"], tools=tools)
