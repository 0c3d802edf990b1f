"""What a run costs: time, from this machine's measured speed, and memory, from `footprint`.

Pure arithmetic, so that a form can answer at once while settings change; `engine.speed` takes the measurements.
"""

from __future__ import annotations

from collections.abc import Mapping

from pairtune.config import RunConfig
from pairtune.footprint import MOST_TRIALS, Fit, ModelShape, PairLengths, fit, remedies, usable
from pairtune.run.records import Part

# Opening the model and its tables, checking the reference, writing the report.
_SECONDS_AROUND = 20.0
# Tokens of the rows by which a split's reference is checked twice, and pairs whose rounding is measured.
_CHECKED, _ROUNDED = 512, 8
_ANSWERING = 0.1  # of the training; `--samples` aims at this share
# Full training multiplies a second time in the backward pass, for the weights' gradients, and updates all weights.
_FULL = 1.6
# How far off times were, from best to worst.
_UNCERTAINTY = 1.2


class LayerSpeed(Part):
    """Seconds of some work that grows with the number of decoder layers, measured with one layer and with several.

    Attributes:
        first: of a model with a single layer.
        further: of each layer more.
    """

    first: float
    further: float

    def seconds(self, layers: float) -> float:
        """Seconds for a model with this many layers."""
        return self.first + (layers - 1) * self.further


class Times(Part):
    """The times of a model's layers, its output embedding and a run's adapters on a machine, in seconds per token.

    Attributes:
        method: what was trained.
        forward: the base model, forward.
        training: one trial, forward and backward.
        beside: each of four trials side by side; the same as `training` with `--method full`.
        update: an optimizer step of one trial; not per token.
        head_forward: the output embedding, for each token of an answer.
        head_training: the same with its gradient.
        waiting: the share of the time that the measurement waited for CPUs that other programs used.
    """

    method: str
    forward: LayerSpeed
    training: LayerSpeed
    beside: LayerSpeed
    update: LayerSpeed
    head_forward: float
    head_training: float
    waiting: float = 0.0

    def per_token(self, layers: int, width: int) -> float:
        """Seconds per token and trial in training with some trials side by side.

        A part of a trial's time does not depend on the others, the rest is shared by all.
        """
        alone = self.training.seconds(layers)
        among_four = min(alone, self.beside.seconds(layers))  # slower ones were disturbed while they were measured
        own = (MOST_TRIALS * among_four - alone) / (MOST_TRIALS - 1)
        return own + (alone - own) / width


class Speed(Part):
    """What a machine does with a model.

    Attributes:
        dtype: the dtype of the base weights that a run would choose.
        memory_free: free bytes.
        times: what was measured, in this dtype; None for models whose layers cannot be built alone or are too large,
            and for accelerators, whose speed with few layers says little.
    """

    dtype: str
    memory_free: float
    times: Times | None


class Cost(Part):
    """The estimated cost of a run.

    Attributes:
        trials: number of trials.
        steps: optimizer steps of all trials.
        seconds: the time, from best to worst guess; None if it cannot be told.
        step_seconds: one optimizer step of a trial.
        evaluation_seconds: one evaluation of a trial.
        fit: what was chosen for it to fit, and its memory.
        limit: the bytes that may be used.
        remedies: what would make the run fit, if it does not, in words.
    """

    trials: int
    steps: int
    seconds: tuple[float, float] | None
    step_seconds: float
    evaluation_seconds: float
    fit: Fit
    limit: float
    remedies: tuple[str, ...] = ()

    @property
    def memory_gb(self) -> float:
        """The peak in GB."""
        return self.fit.bytes / 2**30


def estimate(
    config: RunConfig, pairs: Mapping[str, int], lengths: PairLengths, shape: ModelShape, speed: Speed
) -> Cost:
    """The cost of a run on this machine.

    Args:
        config: its settings.
        pairs: the number of pairs by split.
        lengths: what the pairs are like.
        shape: the model.
        speed: this machine.
    """
    trials = config.trials()
    count = config.trial_count or len(trials)
    train, held_out, test = (pairs.get(split, 0) for split in ("train", "validation", "test"))
    limit = usable(config, speed.memory_free)
    found = fit(config, lengths, shape, speed.dtype, limit)
    epochs = count / len(trials) * sum(trial.epochs for trial in trials)
    step = evaluation = 0.0
    seconds = None
    if speed.times:
        forward, training = _pair_seconds(config, lengths, shape, found, speed.times)
        step, evaluation = training * min(config.batch_size, train), held_out * forward
        # Before training the reference's log-probs, and for KL its states of validation and test pairs.
        again = _ROUNDED + sum(2 * min(count, _CHECKED / lengths.whole) for count in (train, held_out, test))
        total = epochs * (train * training + evaluation) + (train + 2 * held_out + 3 * test + again) * forward
        total = total * (1 + (_ANSWERING if config.samples != 0 else 0)) + _SECONDS_AROUND
        seconds = (total / _UNCERTAINTY, total * _UNCERTAINTY)
    return Cost(
        trials=count,
        steps=round(count / len(trials) * sum(-(-train // trial.batch_size) * trial.epochs for trial in trials)),
        seconds=seconds,
        step_seconds=step,
        evaluation_seconds=evaluation,
        fit=found,
        limit=limit,
        remedies=() if found.fits else remedies(config, lengths, shape, speed.dtype, limit),
    )


def _pair_seconds(
    config: RunConfig, lengths: PairLengths, shape: ModelShape, found: Fit, times: Times
) -> tuple[float, float]:
    """Seconds of a pair in one trial: forward alone, and in training."""
    tokens = lengths.whole if shape.packed else 2 * lengths.prompt + lengths.answers
    once = tokens * times.forward.seconds(shape.layers)
    training = tokens * times.per_token(shape.layers, found.side_by_side) + lengths.answers * times.head_training
    trained = float(shape.layers)
    if times.method == "full":  # the embeddings are updated too
        trained *= shape.parameters / max(1, shape.parameters - shape.vocabulary * shape.hidden)
    training += times.update.seconds(trained) / config.batch_size
    if found.checkpointing:
        training += once
    if config.method == "full" and times.method != "full":
        training *= _FULL
    return once + lengths.answers * times.head_forward, training
