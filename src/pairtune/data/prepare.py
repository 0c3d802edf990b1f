"""The data of a run: read, checked, split by prompt, measured in tokens, and every row accounted for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pairtune.config import RunConfig
from pairtune.data.formats import BadRow, parse_row
from pairtune.data.pairs import PreferencePair, RowCount
from pairtune.data.sources import BUNDLED, bundled_source, read_rows
from pairtune.errors import BadInput
from pairtune.runs import fingerprint

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class PreparedData:
    """What trials train on, what they are judged by, and what is kept back until the choice is made.

    Attributes:
        train: pairs to train on.
        validation: pairs that choose epoch and trial; no prompt of theirs is in `train`.
        test: pairs that have no part in the choice; empty where the source has no third split.
        counts: the account of every row read.
        max_length: pairs longer than this many tokens were dropped.
        seed: of the split.
    """

    train: list[PreferencePair]
    validation: list[PreferencePair]
    test: list[PreferencePair]
    counts: list[RowCount]
    max_length: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """For `data.json`."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            "sources": [count.as_dict() for count in self.counts],
            "splits": {
                name: {"pairs": len(pairs), "fingerprint": pairs_fingerprint(pairs)} for name, pairs in splits.items()
            },
            "max_length": self.max_length,
            "split_seed": self.seed,
        }


def prepare_data(config: RunConfig, tokenizer: Any) -> PreparedData:
    """Read and check all data of a run.

    Raises:
        BadInput: a source or row cannot be used, or nothing is left to train on or to judge by.
    """
    train, train_count = _load(config, config.data, "--data", "train")
    counts = [train_count]
    test: list[PreferencePair] = []
    if config.eval_data is not None:
        validation, validation_count = _load(config, config.eval_data, "--eval-data", "validation")
        counts.append(validation_count)
    elif config.data == BUNDLED:
        validation, validation_count = _load(config, bundled_source("validation"), "--data", "validation")
        test, test_count = _load(config, bundled_source("test"), "--data", "test")
        counts += [validation_count, test_count]
    else:
        validation_count = RowCount(config.data, "validation")
        train, validation = split_by_prompt(train, HELD_OUT_SHARE, config.seed)
        moved = len(validation)
        train_count.rows_in, train_count.kept = train_count.rows_in - moved, train_count.kept - moved
        validation_count.rows_in = validation_count.kept = moved
        counts.append(validation_count)

    train = _drop_long(train, train_count, tokenizer, config.max_length)
    validation = _drop_long(validation, validation_count, tokenizer, config.max_length)
    validation = _drop_shared(validation, train, validation_count)
    if test:
        test = _drop_long(test, test_count, tokenizer, config.max_length)
        test = _drop_shared(test, [*train, *validation], test_count)
    for pairs, count in ((train, train_count), (validation, validation_count)):
        if not pairs:
            reasons = ", ".join(f"{rows} {reason}" for reason, rows in count.dropped.items()) or "it is empty"
            raise BadInput(f"{count.source}: no pair is left for {count.split} ({reasons}); give more or other rows")
    return PreparedData(train, validation, test, counts, config.max_length, config.seed)


def split_by_prompt(
    pairs: Sequence[PreferencePair], share: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Hold out about `share` of the prompts with all their pairs, at least one prompt.

    The choice depends on each prompt's own hash and the seed, so added rows do not move the others about.
    """
    keys = {prompt_key(pair) for pair in pairs}
    drawn = sorted(keys, key=lambda key: hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest())
    held = set(drawn[: max(1, round(len(drawn) * share))])
    return (
        [pair for pair in pairs if prompt_key(pair) not in held],
        [pair for pair in pairs if prompt_key(pair) in held],
    )


def prompt_key(pair: PreferencePair) -> str:
    """What makes two prompts the same: roles and words; case and white space do not count."""
    return "\n".join(f"{turn['role']}: {' '.join(turn['content'].casefold().split())}" for turn in pair.prompt)


def pairs_fingerprint(pairs: Sequence[PreferencePair]) -> str:
    """A fingerprint of the pairs' content in their order; where they came from does not count."""
    return fingerprint(
        part
        for pair in pairs
        for part in (*(f"{turn['role']}\0{turn['content']}" for turn in pair.prompt), pair.chosen, pair.rejected)
    )


def token_lengths(pair: PreferencePair, tokenizer: Any) -> tuple[int, int]:
    """Tokens of prompt and chosen together, and of prompt and rejected, in the model's chat template."""
    chosen, rejected = (
        len(
            tokenizer.apply_chat_template([*pair.prompt, {"role": "assistant", "content": answer}], return_dict=True)[
                "input_ids"
            ]
        )
        for answer in (pair.chosen, pair.rejected)
    )
    return chosen, rejected


def _load(config: RunConfig, source: str, flag: str, split: str) -> tuple[list[PreferencePair], RowCount]:
    count, pairs = RowCount(source, split), []
    for number, row in islice(read_rows(source, flag), config.row_limit(split)):
        count.rows_in += 1
        try:
            pairs.append(parse_row(row, f"{source}:{number}"))
            count.kept += 1
        except BadRow as fault:
            if config.on_bad_row == "stop":
                named = f" field {fault.field}" if fault.field else ""
                raise BadInput(f"{source}: row {number}:{named} {fault} (or --on-bad-row skip)") from None
            count.dropped[fault.reason] += 1
    return pairs, count


def _drop_long(pairs: list[PreferencePair], count: RowCount, tokenizer: Any, limit: int) -> list[PreferencePair]:
    kept = [pair for pair in pairs if max(token_lengths(pair, tokenizer)) <= limit]
    if len(kept) < len(pairs):
        count.drop(f"longer than {limit} tokens", len(pairs) - len(kept))
    return kept


def _drop_shared(pairs: list[PreferencePair], others: list[PreferencePair], count: RowCount) -> list[PreferencePair]:
    seen = {prompt_key(pair) for pair in others}
    kept = [pair for pair in pairs if prompt_key(pair) not in seen]
    if len(kept) < len(pairs):
        count.drop("prompt is in another split", len(pairs) - len(kept))
    return kept
