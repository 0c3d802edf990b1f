"""`pairtune plan`: what a run would read, how long it would take, and how much memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pairtune.budget import check_divided
from pairtune.config import RunConfig, SourceConfig
from pairtune.cost import Speed, estimate
from pairtune.data.inspect_source import inspect_source
from pairtune.data.inspection import Inspection, Plan
from pairtune.data.preference import PreferencePair
from pairtune.data.source_reader import SourceReader
from pairtune.data.sources import BUNDLED
from pairtune.engine.memory import fit_run, shape_of
from pairtune.engine.speed import measure_speed
from pairtune.errors import BadInput
from pairtune.files import typed_path
from pairtune.footprint import PairLengths, of_single_answers
from pairtune.models.load import (
    LoadedBase,
    blank_model,
    free_bytes,
    load_tokenizer,
    pick_device,
    pick_dtype,
    read_config,
)
from pairtune.models.resolve import BUNDLED as BUNDLED_MODEL
from pairtune.models.resolve import NF4, ModelSource, resolve_model
from pairtune.models.start import check_method, open_start
from pairtune.track.starved import STARVED

# Without data, the time is that of this many pairs.
SUPPOSED_PAIRS = 1000

Say = Callable[[str], None]


def plan_run(config: RunConfig, say: Say = lambda what: None, *, has_data: bool = True, processes: int = 1) -> Plan:
    """Inspect a run's data, measure this machine with its model's layers, and estimate the run's cost.

    Args:
        config: the settings. Of a model, a config.json is enough.
        say: called with the current activity.
        has_data: False plans for pairs as long as `max_length` allows instead of those that the settings name.
        processes: the number of processes that share the work, each with a device like this machine's.

    Raises:
        BadInput: the model or a source cannot be used.
    """
    if processes > 1:
        check_divided(config)
    base, notes = _open(config, has_data)
    found: list[Inspection] = []
    if has_data:
        found = [_inspect(config, each, base.tokenizer, say) for each in config.data]
        pairs, lengths = _pairs(config, sum(each.kept for each in found)), _lengths(found)
    else:
        pairs, lengths = {"train": SUPPOSED_PAIRS}, PairLengths.full(config.max_length)
        notes = [*notes, f"no --data: for {SUPPOSED_PAIRS:,} pairs of {config.max_length:,} tokens"]
    shape, speed, cost = shape_of(blank_model(base.source), base.device, processes), None, None
    if processes > 1:
        notes = [*notes, f"memory is that of each of {processes} processes; time depends on what connects them"]
    if lengths:
        dtype = getattr(torch, fit_run(config, base, lengths, processes).dtype)
        if processes > 1:
            speed = Speed(dtype=str(dtype).removeprefix("torch."), memory_free=free_bytes(base.device), times=None)
        else:
            say("measuring this machine")
            speed = measure_speed(base.source, config.trials()[0], lengths, dtype)
        cost = estimate(config, pairs, lengths, shape, speed)
        if speed.times and speed.times.waiting > STARVED:
            notes = [
                *notes,
                f"other programs used this machine's CPUs {speed.times.waiting:.0%} of the time: alone, a "
                "run is faster than the time below",
            ]
    return Plan(
        inspections=found, pairs=pairs, lengths=lengths, shape=shape, speed=speed, cost=cost, notes=tuple(notes)
    )


def _open(config: RunConfig, has_data: bool) -> tuple[LoadedBase, list[str]]:
    """The model, of which only the config and, if there is data, a tokenizer is needed."""
    check_method(config.model, config.method)
    path = typed_path(config.model.removesuffix(NF4))
    file = path / "config.json" if path.is_dir() else path
    if file.suffix != ".json" or not file.is_file() or any(file.parent.glob("*.safetensors")):
        start = open_start(config.model, config.dtype, config.on_top, config.reference, config.method)
        return start.base, []
    folder, device = file.parent.resolve(), pick_device()
    packed = config.model.endswith(NF4)
    source = ModelSource(config.model, file.resolve(), "nf4" if packed else "folder", str(folder))
    read_config(source)
    dtype = pick_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    base, notes = LoadedBase(source, None, dtype, device), [f"{config.model}: planned from its config alone"]
    if not has_data:
        return base, notes
    if any(folder.glob("tokenizer*")):
        return replace(base, tokenizer=load_tokenizer(folder)), notes
    try:
        tokenizer = load_tokenizer(resolve_model(BUNDLED_MODEL))
    except BadInput as error:
        raise BadInput(
            f"--model {config.model}: has no tokenizer, so --data cannot be counted in its tokens; put the tokenizer's "
            "files beside the config, or omit --data"
        ) from error
    return replace(base, tokenizer=tokenizer), [
        *notes,
        f"it has no tokenizer: lengths are counted with {BUNDLED_MODEL}'s",
    ]


def _inspect(config: RunConfig, source: SourceConfig, tokenizer: Any, say: Say) -> Inspection:
    reader = SourceReader.open(source, "--data", config.reading, config.row_limit("train"))
    return inspect_source(reader, tokenizer, config.max_length, lambda rows: say(f"reading: {rows:,} rows"))


def _pairs(config: RunConfig, kept: int) -> dict[str, int]:
    """The number of pairs by split; those held out from the training data are not in its count."""
    found = {"train": kept}
    bundled = BUNDLED in {each.source for each in config.data}
    for split, sources, share in (
        ("validation", config.eval_data, config.validation_share),
        ("test", config.test_data, config.test_share),
    ):
        if sources:
            found[split] = sum(_count(config, each, split) for each in sources)
        elif bundled:
            found[split] = _count(config, SourceConfig(source=f"{BUNDLED}@{split}"), split)
        else:
            found[split] = round(kept * share)
            found["train"] -= found[split]
    return found


def _count(config: RunConfig, source: SourceConfig, split: str) -> int:
    reader = SourceReader.open(source, "--eval-data", config.reading, config.row_limit(split))
    return sum(isinstance(pair, PreferencePair) for _, pair in reader.parsed())


def _lengths(found: list[Inspection]) -> PairLengths | None:
    """Mean lengths over all sources, and the longest pair that fits."""
    kept = [each for each in found if each.kept and each.lengths["prompt"]]
    if not kept:
        return None

    def mean(part: str) -> float:
        counted = [(_answers_of(each, part), summary.mean) for each in kept if (summary := each.lengths[part])]
        return sum(count * length for count, length in counted) / max(1, sum(count for count, _ in counted))

    means = {part: mean(part) for part in _PARTS}
    if any(each.single for each in kept):
        counts = {part: sum(_answers_of(each, part) for each in kept) for part in _PARTS[1:]}
        answer = sum(counts[part] * means[part] for part in counts) / sum(counts.values())
        means = of_single_answers(means["prompt"], answer)
    return PairLengths(**means, longest=max(each.longest for each in kept))


def _answers_of(found: Inspection, part: str) -> int:
    """How many rows have a part: all, or of single answers those of one kind."""
    if found.single is None or part == "prompt":
        return found.kept
    return found.single[0 if part == "chosen" else 1]


_PARTS = ("prompt", "chosen", "rejected")
