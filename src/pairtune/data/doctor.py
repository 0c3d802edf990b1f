"""The data doctor: what a source holds, what is wrong with it, and what a model would see of it.

Reads every row once and stops at none. What is kept in memory per pair are hashes and lengths.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pairtune.chat_templates import special_tokens
from pairtune.data.pairs import BadRow, LeftOut
from pairtune.data.reading import Reading, describe_fault
from pairtune.data.sources import SourceRow
from pairtune.data.splits import Prompt, group_prompts
from pairtune.data.tokens import PairTokenizer, TokenizedPair, decode_example

# Upper bounds of the length histogram, in tokens; the last bin is open.
BINS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_PLACES = 5
_Z95 = 1.96

# When a count becomes a warning; a share of the pairs unless said otherwise.
MANY_DUPLICATES = 0.01
MANY_TOO_LONG = 0.05
LENGTH_BIAS = 0.1  # distance of the accuracy of "the longer answer wins" from a half
FEW_PAIRS = 100
UNUSABLE = 0.5  # of the rows


def inspect_source(
    reading: Reading, tokenizer: Any, max_length: int, progress: Callable[[int], None] = lambda rows: None
) -> dict[str, Any]:
    """Examine a source.

    Args:
        reading: the opened source.
        tokenizer: of the model that would be tuned.
        max_length: as for training, in tokens.
        progress: told how many rows have been read.

    Returns:
        Counts, lengths, findings and a `verdict`: "ok", "ok with warnings" or "not usable". Plain JSON.

    Raises:
        BadInput: the source is damaged so that its rows cannot be told.
    """
    encoder = PairTokenizer(tokenizer, max_length)
    seen = _Seen(_special_tokens(tokenizer))
    for batch in reading.encoded(encoder.encode_whole):
        whole = [result for _, result in batch]
        for (row, _), result, used in zip(batch, whole, encoder.fit(whole), strict=True):
            seen.take(row, result, used)
        progress(seen.rows)
    record: dict[str, Any] = {"source": reading.source.name, "format": reading.format, "max_length": max_length}
    record |= {**seen.summary(tokenizer), "template_warnings": encoder.warnings}
    findings = list(_findings(record))
    levels = {finding["level"] for finding in findings}
    verdict = "not usable" if "error" in levels else "ok with warnings" if "warning" in levels else "ok"
    return {**record, "findings": findings, "verdict": verdict}


def _special_tokens(tokenizer: Any) -> re.Pattern[str]:
    tokens = sorted((token for token in special_tokens(tokenizer) if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


@dataclass
class _Seen:
    """What has been seen of a source so far."""

    special: re.Pattern[str]
    rows: int = 0
    kept: int = 0
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)
    lengths: list[tuple[int, int, int]] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    answers: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    shortened: int = 0
    with_special: list[str] = field(default_factory=list)
    example: TokenizedPair | None = None

    def take(self, row: SourceRow, whole: TokenizedPair | BadRow, used: TokenizedPair | BadRow) -> None:
        """Note a row: its lengths as it stands in the source, everything else as it would be used."""
        self.rows += 1
        if isinstance(whole, TokenizedPair):
            self.lengths.append((len(whole.prompt_ids), len(whole.chosen_ids), len(whole.rejected_ids)))
        if isinstance(used, TokenizedPair):
            self._keep(used)
        else:
            self._drop(row, used)

    def _drop(self, row: SourceRow, fault: BadRow) -> None:
        nothing = {"rows": 0, "stops": not isinstance(fault, LeftOut), "places": []}
        entry = self.dropped.setdefault(fault.reason, nothing)
        entry["rows"] += 1
        if len(entry["places"]) < _PLACES:
            entry["places"].append(describe_fault(row, fault))

    def _keep(self, result: TokenizedPair) -> None:
        pair = result.pair
        self.kept += 1
        self.example = self.example or result
        self.shortened += result.turns_cut > 0
        prompt = Prompt.of(pair.prompt)
        self.prompts.append(prompt)
        self.answers[prompt.whole[0], hash(pair.chosen), hash(pair.rejected)] += 1
        texts = (*(turn["content"] for turn in pair.prompt), pair.chosen, pair.rejected)
        if any(self.special.search(text) for text in texts):
            self.with_special.append(pair.origin)

    def summary(self, tokenizer: Any) -> dict[str, Any]:
        lengths = np.array(self.lengths, dtype=np.int64).reshape(-1, 3)
        prompt, chosen, rejected = lengths.T
        longer = prompt + np.maximum(chosen, rejected)
        of_parts = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "prompt and longer answer": longer}
        swapped = {(asked, worse, better) for asked, better, worse in self.answers} & self.answers.keys()
        return {
            "rows_in": self.rows,
            "kept": self.kept,
            "dropped": self.dropped,
            "lengths": {name: _length_summary(values) for name, values in of_parts.items()},
            "lengths_up_to": BINS,
            "longer_wins": _longer_wins(chosen - rejected),
            "shortened": self.shortened,
            "prompts": {
                "different": len({prompt.whole for prompt in self.prompts}),
                "unrelated": len(set(group_prompts(self.prompts))),
            },
            "duplicates": sum(times - 1 for times in self.answers.values()),
            "conflicts": sum(self.answers[key] for key in swapped),
            "special_tokens": {"pairs": len(self.with_special), "places": self.with_special[:_PLACES]},
            "example": self.example and decode_example(tokenizer, self.example),
        }


def _length_summary(values: np.ndarray) -> dict[str, Any] | None:
    """Of token counts. `histogram` counts those up to each of `BINS`, and at last those above."""
    if not len(values):
        return None
    counts, _ = np.histogram(values, bins=[0, *(edge + 1 for edge in BINS), np.iinfo(np.int64).max])
    middle, high = np.percentile(values, [50, 95])
    return {
        "mean": round(float(values.mean()), 1),
        "median": round(float(middle), 1),
        "p95": round(float(high), 1),
        "max": int(values.max()),
        "histogram": counts.tolist(),
    }


def _longer_wins(differences: np.ndarray) -> dict[str, Any] | None:
    """How well "the longer answer is the better one" predicts the labels; answers of one length count half.

    `interval` is the 95 % normal interval of the accuracy.
    """
    count = len(differences)
    if not count:
        return None
    accuracy = float((differences > 0).mean() + (differences == 0).mean() / 2)
    half = _Z95 * math.sqrt(accuracy * (1 - accuracy) / count)
    return {
        "accuracy": round(accuracy, 4),
        "interval": [round(max(0.0, accuracy - half), 4), round(min(1.0, accuracy + half), 4)],
        "same_length": int((differences == 0).sum()),
    }


def _findings(record: dict[str, Any]) -> Iterator[dict[str, str]]:
    """What a person should know before training, worst first within each kind."""

    def finding(level: str, message: str) -> dict[str, str]:
        return {"level": level, "message": message}

    rows, kept = record["rows_in"], record["kept"]
    faulty = {reason: entry for reason, entry in record["dropped"].items() if entry["stops"]}
    left_out = {reason: entry for reason, entry in record["dropped"].items() if not entry["stops"]}
    if not kept:
        yield finding("error", "no row is a usable pair" if rows else "it is empty")
    faults = sum(entry["rows"] for entry in faulty.values())
    if faults:
        level = "error" if faults > UNUSABLE * rows else "warning"
        yield finding(level, f"{_share(faults, rows)} rows have faults; tune stops at the first, or --on-bad-row skip")
    if left_out:
        what = ", ".join(f"{entry['rows']:,} {reason}" for reason, entry in left_out.items())
        yield finding("note", f"rows that hold no usable preference are left out: {what}")
    if not kept:
        return
    yield from (finding("warning", message) for message in record["template_warnings"])
    if kept < FEW_PAIRS:
        yield finding("warning", f"{kept} pairs are few: what a tuned model gains on them will hardly show")
    if record["conflicts"]:
        yield finding("warning", f"{record['conflicts']:,} pairs contradict another one: same answers, opposite choice")
    if record["duplicates"]:
        level = "warning" if record["duplicates"] > MANY_DUPLICATES * kept else "note"
        yield finding(level, f"{_share(record['duplicates'], kept)} pairs repeat another one")
    prompts = record["prompts"]
    if prompts["unrelated"] < prompts["different"]:
        yield finding(
            "note",
            f"{prompts['different']:,} different prompts are {prompts['unrelated']:,} unrelated ones: some continue a "
            "conversation or are nearly the same, and stay in one split",
        )
    limit = record["max_length"]
    too_long = left_out.get(f"longer than {limit} tokens", {}).get("rows", 0)
    cut = record["shortened"]
    if too_long + cut:
        level = "warning" if too_long + cut > MANY_TOO_LONG * rows else "note"
        what = f"{_share(cut, rows)} prompts lose their oldest turns, {_share(too_long, rows)} pairs do not fit"
        yield finding(level, f"at --max-length {limit}, {what}")
    longer = record["longer_wins"]
    low, high = longer["interval"]
    if abs(longer["accuracy"] - 0.5) > LENGTH_BIAS and not low <= 0.5 <= high:
        which = "longer" if longer["accuracy"] > 0.5 else "shorter"
        better = max(longer["accuracy"], 1 - longer["accuracy"])
        yield finding("warning", f"the {which} answer wins {better:.0%} of the time: a tuned model must beat that")
    if record["special_tokens"]["pairs"]:
        yield finding(
            "warning",
            f"{record['special_tokens']['pairs']:,} pairs hold the model's special tokens as text, first "
            f"{record['special_tokens']['places'][0]}: the model will take them for turns",
        )


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})"
