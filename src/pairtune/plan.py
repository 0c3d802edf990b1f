"""`pairtune plan`: what a run would read, how long it would take, and how much memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pairtune.config import RunConfig, SourceConfig
from pairtune.cost import PairLengths, Speed, estimate
from pairtune.data.inspect_source import inspect_source
from pairtune.data.inspection import Inspection, Plan
from pairtune.data.preference import PreferencePair
from pairtune.data.source_reader import SourceReader
from pairtune.data.sources import BUNDLED
from pairtune.engine.memory import shape_of
from pairtune.models.load import blank_model, free_bytes, pick_device, pick_dtype, read_config
from pairtune.models.resolve import ModelSource
from pairtune.models.start import open_start

_LAYERS, _TOKENS = 2, 512
_HEAD_TOKENS, _HEAD_WORDS = 128, 4096
_ROUNDS = 3

Say = Callable[[str], None]


def plan_run(config: RunConfig, say: Say = lambda what: None) -> Plan:
    """Inspect a run's data, measure this machine with its model's layers, and estimate the run's cost.

    Raises:
        BadInput: the model or a source cannot be used.
    """
    start = open_start(config.model, config.dtype, config.on_top, config.reference, config.method)
    source, tokenizer = start.base.source, start.base.tokenizer
    found = [_inspect(config, each, tokenizer, say) for each in config.data]
    pairs = _pairs(config, sum(each.kept for each in found))
    lengths = _lengths(found)
    say("measuring this machine")
    shape, speed = shape_of(blank_model(source)), measure_speed(source)
    cost = estimate(config, pairs, lengths, shape, speed) if lengths and speed else None
    return Plan(inspections=found, pairs=pairs, lengths=lengths, shape=shape, speed=speed, cost=cost)


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

    longest = max(
        min(
            each.max_length + max(part.max for part in parts[1:]) // 2,
            sum(part.max for part in parts),
        )
        for each in kept
        if (parts := [part for name in _PARTS if (part := each.lengths[name])])
    )
    prompt, chosen, rejected = (mean(part) for part in _PARTS)
    if any(each.single for each in kept):
        # A single answer costs no second one, but its mismatched answer is scored without gradients, with the prompt:
        # a third of what the same tokens cost in training.
        counts = [sum(_answers_of(each, part) for each in kept) for part in _PARTS[1:]]
        chosen = (counts[0] * chosen + counts[1] * rejected) / sum(counts)
        rejected = (prompt + chosen) / 3
    return PairLengths(prompt=prompt, chosen=chosen, rejected=rejected, longest=longest)


def _answers_of(found: Inspection, part: str) -> int:
    """How many rows have a part: all, or of single answers those of one kind."""
    if found.single is None or part == "prompt":
        return found.kept
    return found.single[0 if part == "chosen" else 1]


_PARTS = ("prompt", "chosen", "rejected")


def measure_speed(source: ModelSource) -> Speed | None:
    """Measure this machine's speed with a model's layers, in the dtype that a run would choose; takes a second or two.

    None for models whose layers cannot be built alone, and for accelerators, which a bare loop does not measure.
    """
    device = pick_device()
    if device.type != "cpu":
        return None
    try:
        return _measured(source, pick_dtype(device), free_bytes(device))
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError):  # whatever an unusual model lacks
        return None


def _measured(source: ModelSource, dtype: torch.dtype, memory_free: float) -> Speed:
    model = _few_layers(source).to(dtype)
    ids = torch.zeros(1, _TOKENS, dtype=torch.long)
    embedded = model.get_input_embeddings()(ids).detach()

    def forward() -> None:
        with torch.no_grad():
            model(inputs_embeds=embedded, use_cache=False)

    def training() -> None:
        start = embedded.clone().requires_grad_()
        model(inputs_embeds=start, use_cache=False).logits.sum().backward()

    hidden = torch.ones(_HEAD_TOKENS, model.config.hidden_size, dtype=dtype)
    words = torch.ones(_HEAD_WORDS, model.config.hidden_size, dtype=dtype)
    head = _fastest(lambda: torch.nn.functional.linear(hidden, words)) / _HEAD_TOKENS / _HEAD_WORDS
    whole = read_config(source)
    each = _LAYERS * _TOKENS
    return Speed(
        dtype=str(dtype).removeprefix("torch."),
        bytes_per_number=dtype.itemsize,
        layer_forward=_fastest(forward) / each,
        layer_training=_fastest(training) / each,
        head_forward=head * whole.vocab_size,
        memory_free=float(memory_free),
    )


def _few_layers(source: ModelSource) -> PreTrainedModel:
    """A model with random weights, a few of the source's layers and hardly any vocabulary."""
    config = read_config(source)
    config.num_hidden_layers, config.vocab_size = _LAYERS, 64
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:_LAYERS]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few rounds, after one to warm up."""
    work()
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
