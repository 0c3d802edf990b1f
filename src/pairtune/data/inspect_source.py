"""Data inspection: what a source contains, what is wrong with it, and what a model would see of it.

Reads every row once, and does not stop at faulty ones. Only hashes and lengths of the pairs are kept in memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pairtune.chat_templates import special_tokens
from pairtune.data.column_names import is_label
from pairtune.data.inspection import (
    DataFinding,
    DroppedRows,
    Inspection,
    LengthSummary,
    LongerWins,
    PromptCounts,
    SpecialTokens,
    Verdict,
    odd_lengths,
)
from pairtune.data.preference import BadRow, LeftOut
from pairtune.data.source_reader import SourceReader, describe_fault
from pairtune.data.sources import SourceRow
from pairtune.data.splits import Prompt, group_prompts
from pairtune.data.tokens import PairTokenizer, TokenizedPair, decode_pair
from pairtune.errors import plural
from pairtune.run.records import Level
from pairtune.statistics import longer_wins

# Upper bounds of the length histogram, in tokens; the last bin is open.
BINS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_PLACES = 5
EXAMPLES = 3

# Thresholds of the warnings, as a share of the pairs unless noted.
MANY_DUPLICATES = 0.01
MANY_TOO_LONG = 0.05
UNBALANCED = 4 / 3  # of one kind of single answers over the other; the KTO paper balances beyond it
LENGTH_BIAS = 0.1  # distance from 0.5 of the accuracy of "the longer answer wins"
FEW_PAIRS = 100
UNUSABLE = 0.5  # of the rows


def inspect_source(
    reader: SourceReader, tokenizer: Any, max_length: int, on_progress: Callable[[int], None] = lambda rows: None
) -> Inspection:
    """Inspect a source.

    Args:
        reader: the opened source.
        tokenizer: the tokenizer of the model that would be tuned.
        max_length: as for training, in tokens.
        on_progress: called with the number of rows read so far.

    Raises:
        BadInput: the source is so damaged that its rows cannot be separated.
    """
    encoder = PairTokenizer(tokenizer, max_length)
    seen = _Seen(_special_tokens(tokenizer))
    for batch in reader.encoded(encoder.encode_whole):
        whole = [result for _, result in batch]
        for (row, _), result, used in zip(batch, whole, encoder.fit(whole), strict=True):
            seen.take(row, result, used)
        on_progress(seen.rows)
    found = seen.summary(reader, tokenizer, encoder)
    findings = list(_findings(found))
    levels = {finding.level for finding in findings}
    reading = reader.parser.reading
    verdict: Verdict = "not usable" if "error" in levels else "ok with warnings" if "warning" in levels else "ok"
    if verdict != "not usable" and (reading.columns or reader.config.columns) and not reading.confirmed:
        verdict = "not confirmed"
    return found.model_copy(update={"findings": findings, "verdict": verdict})


def _special_tokens(tokenizer: Any) -> re.Pattern[str]:
    tokens = sorted((token for token in special_tokens(tokenizer) if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


@dataclass
class _Seen:
    """What has been collected from a source so far."""

    special: re.Pattern[str]
    rows: int = 0
    further: int = 0
    kept: int = 0
    dropped: dict[str, DroppedRows] = field(default_factory=dict)
    lengths: list[tuple[int, int, int]] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    answers: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    longest: int = 0
    shortened: int = 0
    with_special: list[str] = field(default_factory=list)
    single: Counter[bool] = field(default_factory=Counter)  # single answers, by whether they are desirable
    odd: Counter[str] = field(default_factory=Counter)
    examples: list[TokenizedPair] = field(default_factory=list)

    def take(self, row: SourceRow, whole: TokenizedPair | BadRow, used: TokenizedPair | BadRow) -> None:
        """Record a row: its lengths as it is in the source, everything else as it would be used."""
        self.rows += not row.further
        self.further += row.further
        if isinstance(whole, TokenizedPair):
            self.lengths.append((len(whole.prompt_ids), len(whole.chosen_ids), len(whole.rejected_ids)))
        if isinstance(used, TokenizedPair):
            self._keep(used)
        else:
            self._drop(row, used)

    def _drop(self, row: SourceRow, fault: BadRow) -> None:
        known = self.dropped.get(fault.reason)
        places = known.places if known else []
        if len(places) < _PLACES:
            places = [*places, describe_fault(row, fault)]
        rows = known.rows + 1 if known else 1
        self.dropped[fault.reason] = DroppedRows(rows=rows, stops=not isinstance(fault, LeftOut), places=places)

    def _keep(self, result: TokenizedPair) -> None:
        pair = result.pair
        self.kept += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(result)
        self.shortened += result.turns_cut > 0
        chosen, rejected = len(result.chosen_ids), len(result.rejected_ids)
        self.longest = max(self.longest, len(result.prompt_ids) + chosen + rejected)
        self.odd.update(odd_lengths(chosen or rejected, rejected or chosen))
        self.single.update([bool(chosen)] if pair.single else [])
        prompt = Prompt.of(pair.prompt)
        self.prompts.append(prompt)
        self.answers[prompt.whole[0], hash(pair.chosen), hash(pair.rejected)] += 1
        texts = (*(turn["content"] for turn in pair.prompt), pair.chosen, pair.rejected)
        if any(self.special.search(text) for text in texts):
            self.with_special.append(pair.origin)

    def summary(self, reader: SourceReader, tokenizer: Any, encoder: PairTokenizer) -> Inspection:
        """The inspection, still without findings and verdict."""
        lengths = np.array(self.lengths, dtype=np.int64).reshape(-1, 3)
        prompt, chosen, rejected = lengths.T
        longer = prompt + np.maximum(chosen, rejected)
        of_parts = {
            "prompt": prompt,
            "chosen": chosen[chosen > 0],
            "rejected": rejected[rejected > 0],
            "prompt and longer answer": longer,
        }
        swapped = {(prompt_hash, worse, better) for prompt_hash, better, worse in self.answers} & self.answers.keys()
        return Inspection(
            source=reader.source.name,
            format=reader.format,
            better=reader.better,
            max_length=encoder.max_length,
            rows_in=self.rows,
            further=self.further,
            kept=self.kept,
            dropped=self.dropped,
            unused=dict(reader.parser.unused),
            notes=dict(reader.parser.notes),
            lengths={name: _length_summary(values) for name, values in of_parts.items()},
            longest=self.longest,
            lengths_up_to=BINS,
            longer_wins=_longer_wins(chosen, rejected),
            shortened=self.shortened,
            prompts=PromptCounts(
                different=len({prompt.whole for prompt in self.prompts}),
                unrelated=len(set(group_prompts(self.prompts))),
            ),
            duplicates=sum(times - 1 for times in self.answers.values()),
            conflicts=sum(self.answers[key] for key in swapped),
            special_tokens=SpecialTokens(pairs=len(self.with_special), places=self.with_special[:_PLACES]),
            single=(self.single[True], self.single[False]) if self.single else None,
            odd_pairs=dict(self.odd),
            examples=[decode_pair(tokenizer, each) for each in self.examples],
            template_warnings=encoder.warnings,
        )


def _length_summary(values: np.ndarray) -> LengthSummary | None:
    if not len(values):
        return None
    counts, _ = np.histogram(values, bins=[0, *(edge + 1 for edge in BINS), np.iinfo(np.int64).max])
    middle, high = np.percentile(values, [50, 95])
    return LengthSummary(
        mean=round(float(values.mean()), 1),
        median=round(float(middle), 1),
        p95=round(float(high), 1),
        max=int(values.max()),
        histogram=counts.tolist(),
    )


def _longer_wins(chosen: np.ndarray, rejected: np.ndarray) -> LongerWins | None:
    found = longer_wins(chosen, rejected)
    if found.value is None:
        return None
    low, high = found.interval
    return LongerWins(
        accuracy=round(found.value, 4),
        interval=(round(low, 4), round(high, 4)),
        same_length=int((chosen == rejected).sum()),
    )


def _findings(found: Inspection) -> Iterator[DataFinding]:
    """What the user should know before training."""

    def finding(level: Level, message: str) -> DataFinding:
        return DataFinding(level=level, message=message)

    rows, kept = found.rows_in, found.kept
    faulty = {reason: entry for reason, entry in found.dropped.items() if entry.stops}
    left_out = {reason: entry for reason, entry in found.dropped.items() if not entry.stops}
    if not kept:
        yield finding("error", "no row is a usable pair" if rows else "the source is empty")
    faults = sum(entry.rows for entry in faulty.values())
    if faults:
        level: Level = "error" if faults > UNUSABLE * rows else "warning"
        yield finding(
            level, f"faulty rows: {_share(faults, rows)}; tune stops at the first one unless --on-bad-row is skip"
        )
    if left_out:
        what = ", ".join(f"{entry.rows:,} {reason}" for reason, entry in left_out.items())
        yield finding("note", f"rows without a usable preference are left out: {what}")
    if not kept:
        return
    yield from _of_fields(found)
    yield from _of_kinds(*found.single) if found.single else ()
    yield from (finding("warning", message) for message in found.template_warnings)
    if kept < FEW_PAIRS:
        yield finding("warning", f"only {plural(kept, found.noun)}: too few to measure what a tuned model gains")
    if found.conflicts:
        same = "same answer, opposite label" if found.single else "same answers, opposite choice"
        yield finding("warning", f"{found.conflicts:,} {found.noun}s contradict another one: {same}")
    if found.duplicates:
        level = "warning" if found.duplicates > MANY_DUPLICATES * kept else "note"
        yield finding(level, f"{found.noun}s that repeat another one: {_share(found.duplicates, kept)}")
    if found.prompts.unrelated < found.prompts.different:
        yield finding(
            "note",
            f"{found.prompts.different:,} distinct prompts form {plural(found.prompts.unrelated, 'group')}: those that "
            "continue a conversation or are nearly the same stay in one split",
        )
    limit = found.max_length
    fitting = left_out.get(f"longer than {limit} tokens")
    too_long, cut = fitting.rows if fitting else 0, found.shortened
    if too_long + cut:
        level = "warning" if too_long + cut > MANY_TOO_LONG * rows else "note"
        what = f"prompts that lose their oldest turns: {_share(cut, rows)}"
        yield finding(
            level, f"at --max-length {limit}, {what}; {found.noun}s that do not fit: {_share(too_long, rows)}"
        )
    if (longer := found.longer_wins) and abs(longer.accuracy - 0.5) > LENGTH_BIAS and not _spans(longer.interval, 0.5):
        which = "longer" if longer.accuracy > 0.5 else "shorter"
        better = max(longer.accuracy, 1 - longer.accuracy)
        wins = "is the desirable one" if found.single else "wins"
        yield finding("warning", f"the {which} answer {wins} {better:.0%} of the time: a tuned model must beat that")
    for what, pairs in found.odd_pairs.items():
        yield finding("note", f"{what}: {_share(pairs, kept)} {found.noun}s")
    if found.special_tokens.pairs:
        yield finding(
            "warning",
            f"{plural(found.special_tokens.pairs, found.noun)} with the model's special tokens as text, first at "
            f"{found.special_tokens.places[0]}: the model will read them as turn markers",
        )


def _of_kinds(desirable: int, undesirable: int) -> Iterator[DataFinding]:
    """What single answers are good for, and how their kinds would be balanced."""
    yield DataFinding(
        level="note",
        message=f"single answers, {desirable:,} desirable and {undesirable:,} undesirable: train on them with --loss "
        "kto, bco or apo_zero_unpaired",
    )
    if not (desirable and undesirable):
        missing = "undesirable" if desirable else "desirable"
        yield DataFinding(
            level="warning", message=f"no answer is {missing}: both kinds are needed, perhaps from another source"
        )
    elif max(desirable, undesirable) > UNBALANCED * min(desirable, undesirable):
        rarer = "desirable" if desirable < undesirable else "undesirable"
        weight = max(desirable, undesirable) / min(desirable, undesirable)
        yield DataFinding(
            level="note", message=f"{rarer} answers are few: --{rarer}-weight {weight:.2g} would balance both kinds"
        )


def _of_fields(found: Inspection) -> Iterator[DataFinding]:
    """What was not read, and what was read but should be known."""
    if found.unused:
        listed = ", ".join(f"{name} ({plural(rows, 'row')})" for name, rows in found.unused.items())
        yield DataFinding(level="note", message=f"fields that are not used: {listed}")
        for name in filter(is_label, found.unused):
            yield DataFinding(
                level="warning",
                message=f"{name} is not used, although its name suggests that it says which answer is better",
            )
    for what, rows in found.notes.items():
        yield DataFinding(level="note", message=f"{what}: {plural(rows, 'row')}")


def _spans(interval: tuple[float, float], value: float) -> bool:
    return interval[0] <= value <= interval[1]


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})"
