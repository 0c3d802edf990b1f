"""What a run costs: memory and time from a model's shape, its pairs' lengths and this machine's measured speed.

Pure arithmetic, so that a form can answer at once while settings change; `pairtune.plan` takes the measurements.
"""

from __future__ import annotations

from collections.abc import Mapping

from pairtune.config import RunConfig, TrialConfig
from pairtune.run.records import Part

# A trained weight, its gradient and AdamW's two moments, all float32.
BYTES_PER_WEIGHT = 16
# Pairs share a row of at least this many tokens in training; see `engine.policy`.
ROW_TOKENS = 512
# Libraries, the tokenizer, and the temporary results of one row.
_PROGRAM_BYTES = 700e6
# Time of the engine's step over that of bare layers: adapters, attention masks, tiled products, the optimizer.
_ADAPTERS = 1.3
# Full training multiplies a second time in the backward pass, for the weights' gradients, and updates all weights.
_FULL = 1.6
# A trial beside others shares the base's products.
_BESIDE = 0.85
# Opening the model, probing products, writing the report.
_SECONDS_AROUND = 30.0
_ANSWERING = 0.1  # of the training; `--samples` aims at this share
# Layers measured alone say how long a run takes to about this factor.
_UNCERTAINTY = 1.4


class ModelShape(Part):
    """The sizes of a model.

    Attributes:
        parameters: all of them, the embeddings included.
        layers: decoder layers.
        hidden: size of the hidden states.
        widest: outputs of the largest linear layer.
        adapter_weights: weights of an adapter of rank 1 on every linear layer.
        vocabulary: words of the output embedding.
    """

    parameters: int
    layers: int
    hidden: int
    widest: int
    adapter_weights: int
    vocabulary: int


class Speed(Part):
    """The speed of this machine with a model's layers, in seconds per token.

    Attributes:
        dtype: the dtype that was measured, which is the one that a run would choose.
        bytes_per_number: its size.
        layer_forward: one decoder layer, forward.
        layer_training: one decoder layer, forward and backward, its weights frozen.
        head_forward: the output embedding.
        memory_free: free bytes when this was measured.
    """

    dtype: str
    bytes_per_number: int
    layer_forward: float
    layer_training: float
    head_forward: float
    memory_free: float


class PairLengths(Part):
    """What the pairs are like: mean tokens of their parts, and the tokens of the longest pair."""

    prompt: float
    chosen: float
    rejected: float
    longest: int

    @property
    def answers(self) -> float:
        """Mean tokens of both answers together."""
        return self.chosen + self.rejected

    @property
    def whole(self) -> float:
        """Mean tokens of a pair, whose prompt is computed once."""
        return self.prompt + self.answers


class Cost(Part):
    """The estimated cost of a run.

    Attributes:
        trials: number of trials.
        side_by_side: how many of them are trained at once.
        steps: optimizer steps of all trials.
        seconds: the time, from best to worst guess.
        memory: bytes by part, at the peak.
        fits: whether the memory that is free now is enough.
    """

    trials: int
    side_by_side: int
    steps: int
    seconds: tuple[float, float]
    memory: dict[str, float]
    fits: bool

    @property
    def memory_gb(self) -> float:
        """The peak in GB."""
        return sum(self.memory.values()) / 2**30


def lockstep_memory(
    shape: ModelShape, trial: TrialConfig, number_size: int, longest: int, width: int, *, checkpointing: bool
) -> dict[str, float]:
    """Bytes of LoRA trials side by side: the base's weights, the adapters, and activations for the backward pass.

    Args:
        shape: the model.
        trial: any of the trials, for its adapter and batch.
        number_size: bytes of one number of the base.
        longest: tokens of the longest pair.
        width: number of trials.
        checkpointing: whether layers keep only their inputs.
    """
    # A layer of transformers keeps its input, q, k, v, the attention output and both norms (about 8 times the hidden
    # size) and the MLP's three products and their input (4 times the larger size); the backward pass needs half as much
    # again. The engine's own layers keep less (`engine.layers`), and attention's weights are not counted.
    kept = shape.hidden if checkpointing else 12 * shape.hidden + 6 * shape.widest
    tokens = width * max(longest, min(ROW_TOKENS, trial.batch_size * longest))
    return {
        "weights": float(shape.parameters * number_size),
        "adapters and optimizer": float(width * trial.lora_rank * shape.adapter_weights * BYTES_PER_WEIGHT),
        "activations": float(tokens * shape.layers * kept * number_size),
    }


def estimate(
    config: RunConfig, pairs: Mapping[str, int], lengths: PairLengths, shape: ModelShape, speed: Speed
) -> Cost:
    """The cost of a run on the CPU of this machine.

    Args:
        config: its settings.
        pairs: the number of pairs by split.
        lengths: what the pairs are like.
        shape: the model.
        speed: this machine.
    """
    trials = config.trials()
    count = config.trial_count or len(trials)
    train, held_out = pairs.get("train", 0), pairs.get("validation", 0)
    whole, answers = lengths.whole, lengths.answers
    forward = whole * shape.layers * speed.layer_forward + answers * speed.head_forward
    training = whole * shape.layers * speed.layer_training + 3 * answers * speed.head_forward
    training *= _FULL if config.method == "full" else _ADAPTERS
    beside = _BESIDE if count > 1 and config.method == "lora" else 1.0
    epochs = count / len(trials) * sum(trial.epochs for trial in trials)
    seen, evaluated = train * epochs, held_out * epochs + pairs.get("test", 0)
    seconds = beside * (seen * training + evaluated * forward * _ADAPTERS) + (train + held_out) * forward
    seconds = seconds * (1 + (_ANSWERING if config.samples != 0 else 0)) + _SECONDS_AROUND
    width, memory = _memory(config, trials, lengths.longest, shape, speed)
    return Cost(
        trials=count,
        side_by_side=width,
        steps=round(count / len(trials) * sum(-(-train // trial.batch_size) * trial.epochs for trial in trials)),
        seconds=(seconds / _UNCERTAINTY, seconds * _UNCERTAINTY),
        memory=memory,
        fits=sum(memory.values()) <= speed.memory_free,
    )


def _memory(
    config: RunConfig, trials: list[TrialConfig], longest: int, shape: ModelShape, speed: Speed
) -> tuple[int, dict[str, float]]:
    """How many trials run side by side, and their bytes."""
    if config.method == "full":
        size = speed.bytes_per_number
        one = lockstep_memory(shape, trials[0], size, longest, 1, checkpointing=config.checkpointing == "on")
        one |= {"weights": float(shape.parameters * size), "adapters and optimizer": 0.0}
        one["gradients and optimizer"] = float(shape.parameters * BYTES_PER_WEIGHT)
        del one["adapters and optimizer"]
        return 1, one | {"program": _PROGRAM_BYTES}
    most = min(len(trials), config.side_by_side or 4)
    widths = range(1, most + 1)
    needs = [
        lockstep_memory(
            shape, trials[0], speed.bytes_per_number, longest, width, checkpointing=config.checkpointing == "on"
        )
        for width in widths
    ]
    fitting = [
        width for width, need in zip(widths, needs, strict=True) if sum(need.values()) <= 0.7 * speed.memory_free
    ]
    width = most if config.side_by_side else max(fitting, default=1)
    return width, needs[width - 1] | {"program": _PROGRAM_BYTES}
