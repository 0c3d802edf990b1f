"""The data of a run: read, checked, tokenized, split and cached, with every row accounted for.

Prepared data is kept in the user cache under a fingerprint of everything that it depends on: the bytes of the sources,
the settings, the tokenizer and its chat template. A second run only memory-maps it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pairtune.config import RunConfig
from pairtune.data.earlier import Earlier
from pairtune.data.preference import BadRow, PreferencePair, RowCount
from pairtune.data.source_reader import SourceReader, stop_at
from pairtune.data.sources import BUNDLED, SourceRow, bundled_source
from pairtune.data.splits import Prompt, draw_splits, find_leaks
from pairtune.data.table import PairTable, write_table
from pairtune.data.tokens import PairTokenizer, TokenizedPair, decode_pair
from pairtune.errors import BadInput, plural
from pairtune.files import fill_folder, fingerprint, forget_oldest, mark_used, read_json, user_cache, write_json
from pairtune.run.examples import PairIndex
from pairtune.run.records import DataRecord, DecodedPair, SplitRecord
from pairtune.run.schema import from_json, to_json

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)

_CACHE_FORMAT = "6"
_CACHE_BYTES = 4 << 30
_RECORD, _PAIRS, _ROWS = "data.json", "pairs.arrow", "splits.npz"
_PROMPTS = "prompts of "


@dataclass(frozen=True)
class PreparedData:
    """The training, validation and test splits of a run.

    Attributes:
        train: pairs to train on.
        validation: pairs that select epoch and trial; none of their conversations is in `train`.
        test: pairs that have no part in the selection; empty if there are none.
        prompts: hashes of the prompts of each split, by its name, in the order of its pairs.
        record: row counts, fingerprints of the splits and one decoded example, for `data.json`.
        from_cache: whether an earlier run prepared the data.
    """

    train: PairTable
    validation: PairTable
    test: PairTable
    prompts: dict[str, np.ndarray]
    record: DataRecord
    from_cache: bool

    def index(self) -> PairIndex:
        """An index of which pairs are in which split."""
        splits = zip(SPLITS, (self.train, self.validation, self.test), strict=True)
        return PairIndex.of(
            {name: (pairs.columns("origin")["origin"], self.prompts[name], pairs.lengths()) for name, pairs in splits}
        )

    @classmethod
    def open(cls, folder: Path, *, from_cache: bool) -> PreparedData:
        """Open the prepared data in a cache folder."""
        with np.load(folder / _ROWS) as rows:
            record = from_json(DataRecord, read_json(folder / _RECORD), str(folder / _RECORD))
            train, validation, test = (
                PairTable.open(folder / _PAIRS, rows[name], record.max_length) for name in SPLITS
            )
            prompts = {name: rows[_PROMPTS + name] for name in SPLITS}
        return cls(train, validation, test, prompts, record, from_cache)


def prepare_data(
    config: RunConfig,
    tokenizer: Any,
    on_progress: Callable[[int], None] = lambda rows: None,
    earlier: Earlier | None = None,
) -> PreparedData:
    """Read, check, tokenize and split all data of a run.

    Args:
        config: the settings of the run.
        tokenizer: a transformers tokenizer with a chat template.
        on_progress: called with the number of rows read so far.
        earlier: the prompts of earlier rounds, which stay in their splits.

    Raises:
        BadInput: a source or row cannot be used, or no pair is left for training or validation.
    """
    parts = _open_all(config)
    encoder = PairTokenizer(tokenizer, config.max_length)
    folder = user_cache() / "data" / _cache_key(config, parts, encoder, earlier or {})
    from_cache = (folder / _RECORD).is_file()
    if not from_cache:
        fill_folder(
            folder, lambda target: _Preparation(config, encoder, parts, on_progress, earlier or {}).write(target)
        )
        forget_oldest(folder.parent, _CACHE_BYTES)
    mark_used(folder)
    return PreparedData.open(folder, from_cache=from_cache)


@dataclass(eq=False)
class _SourcePart:
    """One source's part in the run.

    Attributes:
        split: the split of its pairs; None if splits are drawn for them.
        kept: number of its pairs.
        dropped: counts of its other rows by reason.
        dropped_further: how many of these were pairs after the first of their row.
    """

    reader: SourceReader
    split: int | None
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_further: int = 0

    @property
    def name(self) -> str:
        return self.reader.source.name

    @property
    def weight(self) -> float | None:
        return self.reader.config.weight


def content_hash(pair: PreferencePair) -> bytes:
    """An 8-byte hash of a pair's content, independent of its origin."""
    digest = hashlib.blake2b(digest_size=8)
    turns = (f"{turn['role']}\0{turn['content']}" for turn in pair.prompt)
    for part in (*turns, pair.chosen, pair.rejected, *filter(None, pair.thinking)):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


def _open_all(config: RunConfig) -> list[_SourcePart]:
    train_split = None
    evaluation, test = config.eval_data, config.test_data
    if evaluation is None and test is None and [source.source for source in config.data] == [BUNDLED]:
        train_split, evaluation, test = TRAIN, [bundled_source("validation")], [bundled_source("test")]
    if evaluation is not None:
        train_split = TRAIN
    given = (
        (config.data, "--data", train_split),
        (evaluation or [], "--eval-data", VALIDATION),
        (test or [], "--test-data", TEST),
    )
    return [
        _SourcePart(SourceReader.open(source, flag, config.reading, config.row_limit(SPLITS[split or TRAIN])), split)
        for sources, flag, split in given
        for source in sources
    ]


def _cache_key(config: RunConfig, parts: Sequence[_SourcePart], encoder: PairTokenizer, earlier: Earlier) -> str:
    settings = (config.on_bad_row, config.seed, config.validation_share, config.test_share, config.unpaired)
    content = [_CACHE_FORMAT, encoder.fingerprint(), *map(str, settings)]
    for part in parts:
        reading = part.reader.parser.reading
        columns = sorted(reading.columns.items())
        content += [part.name, part.reader.fingerprint()]
        content += map(str, (part.split, part.reader.limit, part.weight, columns, reading.pairing, reading.min_gap))
        content.append(str(reading.prompts))
    for name in sorted(earlier):
        content += [name, fingerprint([earlier[name].tobytes()])]
    return fingerprint(content)


@dataclass(frozen=True)
class _Kept:
    """What is kept in memory of a pair after its batch is written."""

    part: _SourcePart
    prompt: Prompt
    content: bytes
    further: bool
    shortened: bool
    desirable: bool  # for single answers: which kind


class _Preparation:
    """Reads all sources once, writes the tokenized pairs, then assigns them to splits."""

    def __init__(
        self,
        config: RunConfig,
        encoder: PairTokenizer,
        parts: list[_SourcePart],
        on_progress: Callable[[int], None],
        earlier: Earlier,
    ) -> None:
        self.config = config
        self.encoder = encoder
        self.parts = parts
        self.on_progress = on_progress
        self.known = {int(key): SPLITS.index(name) for name in reversed(SPLITS) for key in earlier.get(name, ())}
        self.kept: list[_Kept] = []
        self.example: DecodedPair | None = None  # the first pair, as the model sees it
        self.left_out: dict[int, str] = {}  # kept pairs that no split uses, each with the reason

    def write(self, target: Path) -> None:
        """Fill a cache folder."""
        write_table(target / _PAIRS, self._batches())
        splits = self._splits()
        counts = self._counts(splits)
        rows = {
            name: np.array([n for n, split in enumerate(splits) if split == number and n not in self.left_out], int)
            for number, name in enumerate(SPLITS)
        }
        for name in SPLITS[:TEST]:
            if not len(rows[name]):
                self._raise_empty(name, counts)
        if self.config.unpaired:
            self._check_kinds(rows)
        prompts = {
            _PROMPTS + name: np.array([self.kept[n].prompt.whole[0] for n in of_split], np.uint64)
            for name, of_split in rows.items()
        }
        np.savez(target / _ROWS, **rows, **prompts)  # type: ignore[arg-type]
        write_json(target / _RECORD, to_json(self._record(counts, rows)))

    def _batches(self) -> Iterator[list[TokenizedPair]]:
        rows = 0
        for part in self.parts:
            for batch in part.reader.encoded(self.encoder.encode):
                yield [pair for row, result in batch if (pair := self._take(part, row, result))]
                rows += sum(not row.further for row, _ in batch)
                self.on_progress(rows)

    def _take(self, part: _SourcePart, row: SourceRow, result: TokenizedPair | BadRow) -> TokenizedPair | None:
        if isinstance(result, BadRow):
            if self.config.on_bad_row == "stop":
                stop_at(row, result)
            part.dropped[result.reason] += 1
            part.dropped_further += row.further
            return None
        prompts = (result.pair.prompt, result.prompt) if result.turns_cut else (result.prompt,)
        content = content_hash(result.pair)
        good = bool(result.chosen_ids)
        self.kept.append(_Kept(part, Prompt.of(*prompts), content, row.further, result.turns_cut > 0, good))
        part.kept += 1
        self.example = self.example or decode_pair(self.encoder.tokenizer, result)
        return result

    def _splits(self) -> list[int]:
        """The split of each kept pair; pairs that no split uses are recorded in `left_out`."""
        self._apply_weights()
        if any(each.part.split is None for each in self.kept):
            return self._drawn_splits()
        splits = [each.part.split or TRAIN for each in self.kept]
        self._drop_leaks(splits)
        return splits

    def _apply_weights(self) -> None:
        """Leave pairs out so that the sources of a split contribute pairs in the ratio of their weights."""
        for split in {part.split for part in self.parts}:
            weights = {part: part.weight for part in self.parts if part.split == split and part.weight}
            unit = min((part.kept / weight for part, weight in weights.items()), default=0)
            for part, weight in weights.items():
                numbers = [number for number, each in enumerate(self.kept) if each.part is part]
                drawn = sorted(numbers, key=lambda number: self._draw(self.kept[number].content, number))
                for number in drawn[round(unit * weight) :]:
                    self.left_out[number] = "left out by weight"

    def _draw(self, content: bytes, number: int) -> bytes:
        return hashlib.sha256(b"%d\0%s\0%d" % (self.config.seed, content, number)).digest()

    def _drawn_splits(self) -> list[int]:
        """Draw splits for the sources without a fixed one; a given test set shares no prompts with the drawn splits."""
        drawn = [n for n, each in enumerate(self.kept) if each.part.split is None and n not in self.left_out]
        shares = (self.config.validation_share, 0.0 if self.config.test_data else self.config.test_share)
        splits = [each.part.split or TRAIN for each in self.kept]
        prompts = [self.kept[n].prompt for n in drawn]
        kinds = [self.kept[n].desirable for n in drawn] if self.config.unpaired else []
        drawn_splits = draw_splits(prompts, shares, self.config.seed, self.known, kinds)
        for number, split in zip(drawn, drawn_splits, strict=True):
            splits[number] = split
        if self.config.test_data:
            self._drop_leaks(splits)
        return splits

    def _drop_leaks(self, splits: list[int]) -> None:
        numbers = [
            [n for n, split in enumerate(splits) if split == wanted and n not in self.left_out]
            for wanted in range(len(SPLITS))
        ]
        trained = {key for key, split in self.known.items() if split == TRAIN}
        for of_split in numbers[VALIDATION:]:
            seen = {n for n in of_split if trained.intersection(self.kept[n].prompt.whole)}
            self.left_out |= dict.fromkeys(seen, "trained on in an earlier round")
            of_split[:] = [n for n in of_split if n not in seen]
        leaks = find_leaks([[self.kept[n].prompt for n in of_split] for of_split in numbers])
        for of_split, found in zip(numbers[VALIDATION:], leaks[VALIDATION:], strict=True):
            self.left_out |= {of_split[at]: reason for at, reason in found.items()}

    def _counts(self, splits: list[int]) -> list[RowCount]:
        counts = {
            (part, split): RowCount(part.name, SPLITS[split])
            for part in self.parts
            for split in (range(len(SPLITS)) if part.split is None else [part.split])
        }
        for part in self.parts:
            count = counts[part, part.split or TRAIN]  # a dropped row has no split of its own
            count.rows_in += part.dropped.total() - part.dropped_further
            count.further += part.dropped_further
            count.dropped += part.dropped
        for number, (each, split) in enumerate(zip(self.kept, splits, strict=True)):
            if reason := self.left_out.get(number):
                counts[each.part, split].drop(reason, further=each.further)
            else:
                counts[each.part, split].keep(each.shortened, further=each.further)
        return [count for count in counts.values() if count.rows_in or count.split == SPLITS[TRAIN]]

    def _raise_empty(self, split: str, counts: list[RowCount]) -> None:
        dropped: Counter[str] = sum((count.dropped for count in counts if count.split == split), Counter())
        drawn = sum(each.part.split is None for each in self.kept)
        one_group = split != SPLITS[TRAIN] and drawn > 1
        nothing = "apart from system messages, all prompts are related" if one_group else "it is empty"
        if split == SPLITS[TRAIN] and self.known and drawn:
            nothing = "an earlier round has held out all of these prompts, so they are not trained on"
        reasons = ", ".join(f"{rows} {reason}" for reason, rows in dropped.items()) or nothing
        named = [count.source for count in counts if count.split == split] or [part.name for part in self.parts]
        raise BadInput(f"{', '.join(named)}: no pair is left for {split} ({reasons}); give more or other rows")

    def _check_kinds(self, rows: Mapping[str, np.ndarray]) -> None:
        """Make sure that every split has answers of both kinds, without which no accuracy is defined.

        Raises:
            BadInput: one has not.
        """
        for name, of_split in rows.items():
            good = sum(self.kept[n].desirable for n in of_split)
            if len(of_split) and good in (0, len(of_split)):
                missing, has = ("undesirable", "desirable") if good else ("desirable", "undesirable")
                number = SPLITS.index(name)
                given = [part.name for part in self.parts if part.split == number]
                drawn = [part.name for part in self.parts if part.split is None]
                other = ", or hold out more (--validation-share, --test-share)" if drawn and number != TRAIN else ""
                raise BadInput(
                    f"{', '.join([*given, *drawn])}: the {plural(len(of_split), 'answer')} for {name} "
                    f"are all {has}; give rows with {missing} answers too{other}"
                )

    def _record(self, counts: list[RowCount], rows: dict[str, np.ndarray]) -> DataRecord:
        return DataRecord(
            sources=[count.account() for count in counts],
            formats={part.name: part.reader.format for part in self.parts},
            better={part.name: part.reader.better for part in self.parts},
            unused={part.name: dict(part.reader.parser.unused) for part in self.parts if part.reader.parser.unused},
            notes={part.name: dict(part.reader.parser.notes) for part in self.parts if part.reader.parser.notes},
            splits={
                name: SplitRecord(pairs=len(of_split), fingerprint=fingerprint(self.kept[n].content for n in of_split))
                for name, of_split in rows.items()
            },
            max_length=self.config.max_length,
            split_seed=self.config.seed,
            template_warnings=self.encoder.warnings,
            example=self.example,
        )
