"""Measures this machine's speed with a model's layers: a few steps of a run's own engine, on few layers."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import ValidationError
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, PreTrainedModel

from pairtune.config import TrialConfig
from pairtune.cost import LayerSpeed, Speed, Times
from pairtune.data.table import TokenIds
from pairtune.engine.compact import CompactOptimizer, CompactWeights
from pairtune.engine.kernels import Kernels
from pairtune.engine.logps import token_logps
from pairtune.engine.lora import add_adapters, settings_of
from pairtune.engine.optimize import AdapterWeights, FullWeights, TrialOptimizer
from pairtune.engine.packing import Pack
from pairtune.engine.policy import EVALUATION_TOKENS, Policy, cast_parameters
from pairtune.engine.products import PLAIN
from pairtune.environment import processor
from pairtune.files import fingerprint, user_cache, write_json
from pairtune.footprint import MOST_TRIALS, ROW_TOKENS, USABLE, PairLengths
from pairtune.models.load import blank_model, free_bytes, pick_device, read_config
from pairtune.models.nf4 import named_weights, pack_linears
from pairtune.models.resolve import ModelSource
from pairtune.run.records import dump
from pairtune.track.starved import STARVED, CpuWait

# The number of layers that are compared with a single one.
_LAYERS = 3
_ROUNDS = 5
_LONG = 1.0  # seconds
# The pair that is measured is shorter for larger layers: weights times tokens, and the least tokens.
_PRODUCTS, _FEWEST_TOKENS = 4e9, 64
# What is measured of the output embedding.
_HEAD_TOKENS, _HEAD_WORDS = 128, 8192
_WORDS = 64  # of the models with few layers
# What a weight of these may take: with all weights trained, its value, gradient and moments in float32, and a copy.
_BYTES_EACH = 20


def measure_speed(
    source: ModelSource, trial: TrialConfig, lengths: PairLengths, dtype: torch.dtype, *, known: bool = False
) -> Speed:
    """Measure this machine's speed, or read what was measured before; takes a few seconds.

    It has no times for models of which a few layers cannot be built, or would not fit into memory.

    Args:
        source: the model; only its config is read.
        trial: a trial of the run, for its method and adapter.
        lengths: what the pairs are like.
        dtype: dtype of the base weights.
        known: whether to use what was measured earlier for the same model, settings and machine, if anything was.
    """
    device = pick_device()
    name = str(dtype).removeprefix("torch.")
    times = _times(source, trial, lengths, dtype, known) if device.type == "cpu" else None
    return Speed(dtype=name, memory_free=float(free_bytes(device)), times=times)


def _times(
    source: ModelSource, trial: TrialConfig, lengths: PairLengths, dtype: torch.dtype, known: bool
) -> Times | None:
    file = user_cache() / "speed" / f"{_name(source, trial, lengths, dtype)}.json"
    if known and (found := _read(file)):
        return found
    wait = CpuWait()
    try:
        blank = blank_model(source)
        weights = sum(each.numel() for _, each in named_weights(blank)) // blank.config.num_hidden_layers
        if _LAYERS * weights * _BYTES_EACH > USABLE * free_bytes(torch.device("cpu")):
            return None
        measured = _measured(source, blank, trial, _pair(lengths, weights), dtype)
    # Whatever an unusual model lacks, or an optimizer that is not installed.
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError):
        return None
    measured = measured.model_copy(update={"waiting": wait.share()})
    if measured.waiting < STARVED:  # a machine that was busy says little about the next run
        with suppress(OSError):  # a full or read-only cache only costs time
            write_json(file, dump(measured))
    return measured


def _name(source: ModelSource, trial: TrialConfig, lengths: PairLengths, dtype: torch.dtype) -> str:
    """A fingerprint of what the measurement depends on; lengths that are nearly the same count as the same."""
    shape = read_config(source).to_json_string() + (source.kind if source.kind == "nf4" else "")
    settings = [trial.method, trial.optimizer, str(trial.lora_rank), str(trial.lora_targets)]
    near = [str(round(each / 32)) for each in (lengths.prompt, lengths.chosen, lengths.rejected)]
    machine = [processor(), torch.__version__, str(torch.get_num_threads()), str(dtype)]
    return fingerprint([shape, *settings, *near, *machine])


def _read(file: Path) -> Times | None:
    with suppress(OSError, ValidationError):
        return Times.model_validate_json(file.read_text(encoding="utf-8"))
    return None


def _measured(
    source: ModelSource, blank: PreTrainedModel, trial: TrialConfig, pair: TokenIds, dtype: torch.dtype
) -> Times:
    probed = Kernels(blank, torch.device("cpu"))
    kernels = probed if probed.is_known(dtype) else None  # a plan does not wait for what the run will find out
    found: dict[str, dict[int, float]] = {name: {} for name in ("forward", "training", "update", "beside")}
    for layers in (1, _LAYERS):
        found["forward"][layers] = _forward(source, layers, pair, dtype, kernels)
        alone = _training(source, layers, trial, 1, pair, dtype, kernels)
        found["training"][layers], found["update"][layers] = alone
        several = (
            alone if trial.method == "full" else _training(source, layers, trial, MOST_TRIALS, pair, dtype, kernels)
        )
        found["beside"][layers] = several[0]
    head_forward, head_training = _head(source, dtype, kernels)
    return Times(
        method=trial.method,
        head_forward=head_forward,
        head_training=head_training,
        **{name: _layer_speed(seconds) for name, seconds in found.items()},
    )


def _layer_speed(seconds: dict[int, float]) -> LayerSpeed:
    further = max(0.0, seconds[_LAYERS] - seconds[1]) / (_LAYERS - 1)
    return LayerSpeed(first=seconds[1], further=further)


def _pair(lengths: PairLengths, weights: int) -> TokenIds:
    """A pair of mean length, or as much shorter as keeps the measurement of a large model short.

    Args:
        lengths: what the run's pairs are like.
        weights: those of one layer.
    """
    scale = min(1.0, max(_FEWEST_TOKENS, min(ROW_TOKENS, _PRODUCTS / weights)) / lengths.whole)
    parts = (lengths.prompt, lengths.chosen, lengths.rejected)
    return TokenIds(*([1] * max(1, round(each * scale)) for each in parts))


def _few_layers(source: ModelSource, layers: int) -> PreTrainedModel:
    """A model with random weights, a few of the source's layers and hardly any vocabulary."""
    config = read_config(source)
    config.num_hidden_layers, config.vocab_size = layers, _WORDS
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if source.kind == "nf4":
        pack_linears(model)
    return model.eval()


def _forward(source: ModelSource, layers: int, pair: TokenIds, dtype: torch.dtype, kernels: Kernels | None) -> float:
    """Seconds per token of the base model's forward pass."""
    model = _few_layers(source, layers)
    cast_parameters(model, dtype)
    policy = Policy(model, kernels=kernels)
    (pack,) = policy.rows([pair], EVALUATION_TOKENS)
    with torch.no_grad():
        return _fastest(lambda: policy.answer_logps(pack)) / _tokens(pack)


def _training(
    source: ModelSource,
    layers: int,
    trial: TrialConfig,
    width: int,
    pair: TokenIds,
    dtype: torch.dtype,
    kernels: Kernels | None,
) -> tuple[float, float]:
    """Seconds per token and trial, forward and backward, and seconds of one trial's update."""
    model, adapted = _few_layers(source, layers), {}
    first: FullWeights | CompactWeights | AdapterWeights
    optimizer: TrialOptimizer | CompactOptimizer
    if trial.method == "full":
        cast_parameters(model, torch.float32)  # the config may name another dtype, and masters are in float32
        if trial.optimizer == "adamw-8bit":
            first = CompactWeights(model, dtype)
            optimizer = CompactOptimizer(trial, first, 1000)
        else:
            first = FullWeights(model, dtype)
            optimizer = TrialOptimizer(trial, first.tensors, 1000)
        cast_parameters(model, dtype)
    else:
        cast_parameters(model, dtype)
        adapted = add_adapters(model, settings_of(trial), [trial.seed] * width)
        owners = [AdapterWeights(adapted, index) for index in range(width)]
        first, optimizer = owners[0], TrialOptimizer(trial, owners[0].tensors, 1000)
    policy = Policy(model, adapted, width, kernels)
    (pack,) = policy.rows([pair], EVALUATION_TOKENS)

    def learn() -> None:
        (-logsigmoid(policy.answer_logps(pack).logps)).sum().backward()
        first.collect_gradients()

    def update() -> None:
        first.take_gradients()
        optimizer.clip()
        optimizer.update()
        first.updated()

    learning = _fastest(learn)
    compact = first.grads if isinstance(first, CompactWeights) else []
    kept = [tensor.grad for tensor in first.summed]

    def update_again() -> None:
        if isinstance(first, CompactWeights):
            first.grads = list(compact)
        for tensor, grad in zip(first.summed, kept, strict=True):
            tensor.grad = grad
        update()

    return learning / _tokens(pack) / width, _fastest(update_again)


def _tokens(pack: Pack) -> int:
    """Tokens without padding, whose time is thereby counted as theirs."""
    return int(pack.input_ids.numel() if pack.mask is None else pack.mask.sum())


def _head(source: ModelSource, dtype: torch.dtype, kernels: Kernels | None) -> tuple[float, float]:
    """Seconds per token of the output embedding, without and with its gradient."""
    config = read_config(source)
    products, targets = kernels.products(dtype) if kernels else PLAIN, torch.zeros(_HEAD_TOKENS, dtype=torch.long)
    hidden = torch.ones(_HEAD_TOKENS, config.hidden_size, dtype=dtype)
    words = torch.ones(min(_HEAD_WORDS, config.vocab_size), config.hidden_size, dtype=dtype)
    learning = hidden.clone().requires_grad_()

    def both() -> None:
        token_logps(learning, words, None, targets, products=products)[0].sum().backward()

    with torch.no_grad():
        forward = _fastest(lambda: token_logps(hidden, words, None, targets, products=products))
    scale = config.vocab_size / len(words) / _HEAD_TOKENS
    return forward * scale, _fastest(both) * scale


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few rounds, after one to warm up, which counts only for work that takes long."""
    rounds = [_timed(work)]
    if rounds[0] < _LONG:
        rounds = []
    while len(rounds) < _ROUNDS and sum(rounds) < _LONG:
        rounds.append(_timed(work))
    return min(rounds)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
