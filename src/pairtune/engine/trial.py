"""What the engines share: a trial's inputs, its pristine start, and the guards on its first step."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pairtune.config import Select, TrialConfig
from pairtune.data.table import PairTable
from pairtune.engine.kernels import Kernels
from pairtune.engine.processes import Processes
from pairtune.engine.rounding import allowed_margin
from pairtune.engine.summaries import TrialFailed, estimate_in, examples_of, mean_metrics, score
from pairtune.errors import RunFailed
from pairtune.files import saved_fingerprint
from pairtune.models.load import LoadedBase, blank_model, load_model, weights_fingerprint
from pairtune.run.examples import ExampleRecord
from pairtune.run.metrics import Evaluation, evaluation_name
from pairtune.run.paths import TrialPaths
from pairtune.run.records import Rounding, TrialRecord

LN_2 = math.log(2)


def always_false(*_: object) -> bool:
    """Default for the callbacks that ask whether to stop a run or a trial."""
    return False


@dataclass
class BaseOutputs:
    """The base model's outputs for a run's pairs, computed by the first trials for all of them.

    They depend only on weights, pairs and machine, which are the same for the whole grid.

    Attributes:
        logps: reference log-probs by split, [pairs, 2]: chosen and rejected.
        states: last hidden states at some positions of the validation answers; see `divergence.base_states`.
        rounding: how much this machine's rounding changes a pair's margin.
    """

    logps: dict[str, Tensor] = field(default_factory=dict)
    states: Tensor | None = None
    rounding: Rounding | None = None


@dataclass(frozen=True)
class TrialInputs:
    """What all trials of a run share.

    Attributes:
        base: the base model; each trial reloads its weights. With LoRA, `base.dtype` is the dtype of the base weights;
            with `--method full`, that of the matrix products.
        base_fingerprint: fingerprint of the base weights; a trial that starts from others is stopped.
        train: the training pairs.
        validation: the validation pairs.
        select: the rule that picks a trial's best epoch.
        probed: how products are computed on this machine, if it was probed before.
        base_outputs: filled by the first trials and read by all others.
        checkpoint_steps: number of steps between checkpoints; one is also written after every epoch.
        stopping: called between steps; whether to interrupt the run.
        hopeless: called after each evaluation of a trial; whether to prune it, ignored after its last epoch.
    """

    base: LoadedBase
    base_fingerprint: str
    train: PairTable
    validation: PairTable
    select: Select
    probed: Kernels | None = None
    base_outputs: BaseOutputs = field(default_factory=BaseOutputs)
    checkpoint_steps: int = 50
    stopping: Callable[[], bool] = always_false
    hopeless: Callable[[TrialRecord], bool] = always_false

    @property
    def splits(self) -> dict[str, PairTable]:
        """Training and validation pairs by name."""
        return {"train": self.train, "validation": self.validation}

    @cached_property
    def start_fingerprint(self) -> str:
        """Fingerprint of what the trials start from: the base weights and the adapter that is trained further."""
        adapter = self.base.adapter
        return f"{self.base_fingerprint}+{saved_fingerprint(adapter)}" if adapter else self.base_fingerprint

    @cached_property
    def kernels(self) -> Kernels:
        """How products are computed on this machine."""
        return self.probed or Kernels(blank_model(self.base.source), self.base.device)

    @cached_property
    def processes(self) -> Processes:
        """The processes that share the work."""
        return Processes(self.base.device)


def load_start(trial: TrialConfig, base: LoadedBase, *, packed: bool = True, divided: bool = False) -> PreTrainedModel:
    """The weights a trial starts from.

    Full training keeps them in float32: bfloat16 has 8 bits of precision, so small updates would be rounded away.

    Args:
        trial: the trial.
        base: the base model.
        packed: see `load_model`.
        divided: leave the weights of full training on the CPU, since several processes will divide them.
    """
    if trial.method == "full":
        return load_model(base.source, torch.float32, torch.device("cpu") if divided else base.device)
    return load_model(base.source, base.dtype, base.device, packed=packed)


def epoch_order(pairs: int, seed: int, epoch: int) -> list[int]:
    """The order of the pairs in an epoch; the same for all trials with the same seed, in every engine."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(pairs, generator=generator).tolist()


def start_trials(
    trials: Sequence[TrialConfig], inputs: TrialInputs, *, packed: bool = True
) -> tuple[PreTrainedModel, list[TrialRecord]]:
    """Load the pristine weights that trials start from, and create their records.

    Args:
        trials: the trials.
        inputs: what the trials of the run share.
        packed: see `load_model`.

    Raises:
        RunFailed: the weights are not the base model's; the run's results would not be comparable.
    """
    model = load_start(trials[0], inputs.base, packed=packed, divided=inputs.processes.count > 1)
    found = weights_fingerprint(model)
    if found != inputs.base_fingerprint:
        raise RunFailed(
            f"trial {trials[0].name}: its starting weights ({found}) are not the base model's "
            f"({inputs.base_fingerprint}); trials would not be comparable, so the run stops"
        )
    return model, [TrialRecord(trial=trial, base_fingerprint=found, side_by_side=len(trials)) for trial in trials]


def record_evaluation(
    result: TrialRecord,
    inputs: TrialInputs,
    paths: TrialPaths,
    epoch: int,
    step: int,
    loss: float,
    records: Sequence[ExampleRecord],
    save: Callable[[], str],
) -> Evaluation:
    """Record one evaluation of the validation pairs, and save the weights if they are the best so far.

    Args:
        result: the trial's record, which the evaluation is added to.
        inputs: what the trials of the run share.
        paths: the trial's paths.
        epoch: the epoch that has ended.
        step: the last step of the epoch.
        loss: mean loss over the epoch's training pairs.
        records: one per validation pair, in order.
        save: saves the weights just evaluated, in the first process, and returns the fingerprint of their files.

    Returns:
        The evaluation: the means over pairs.

    Raises:
        TrialFailed: a mean is not a finite number.
    """
    examples = examples_of(inputs.validation, records)
    means = mean_metrics(examples)
    if not all(math.isfinite(value) for value in (loss, *means.values())):
        raise TrialFailed(f"an evaluation metric of epoch {epoch} is not a finite number; lower the learning rate")
    means |= {evaluation_name(name): value for name, value in estimate_in(records).items()}
    evaluation = Evaluation.model_validate({"epoch": epoch, "step": step, "loss": loss, **means})
    if inputs.processes.first:
        examples.write(paths.examples(epoch))
    if not result.epochs or score(evaluation, inputs.select) > score(result.best, inputs.select):
        result.best_epoch = epoch
        result.best_fingerprint = save()
    result.epochs.append(evaluation)
    return evaluation


def prune_hopeless(result: TrialRecord, inputs: TrialInputs) -> None:
    """Stop a trial that was just evaluated and is unlikely to become the best."""
    last = result.epochs[-1].epoch == result.trial.epochs
    if inputs.hopeless(result) and not last:
        result.status = "pruned"
        result.reason = f"not among the better half after epoch {len(result.epochs)}"


def patience_is_over(result: TrialRecord) -> bool:
    """Whether a trial's last `patience` evaluations brought no improvement."""
    patience = result.trial.patience
    return patience is not None and len(result.epochs) - (result.best_epoch or 0) >= patience


def check_adapters_are_zero(names: Sequence[str], factors: Iterable[Tensor]) -> None:
    """Check that the adapters' factors B are 0 before the first step, so that trials start exactly at the base model.

    Raises:
        RunFailed: they are not.
    """
    if any(bool(factor.any()) for factor in factors):
        raise RunFailed(f"trial {', '.join(names)}: factor B of an adapter is not zero before the first step")


def check_first_step(trial: TrialConfig, loss: float, margin: float, rounding: Rounding | None = None) -> None:
    """Check that policy and reference are the same model before the first update: margins 0, sigmoid loss ln 2.

    Args:
        trial: the trial.
        loss: the first step's mean loss over pairs.
        margin: the first step's mean reward margin.
        rounding: how much this machine's rounding changes a pair's margin; None: not at all.

    Raises:
        RunFailed: they differ by more than rounding explains.
    """
    room = trial.beta * allowed_margin(rounding) if rounding else 0.0
    plain = trial.loss == "sigmoid" and not trial.sft_weight
    if not abs(margin) <= room or (plain and not abs(loss - LN_2) <= 1e-6 + room):
        expected = f"{LN_2:.6f} and 0" if plain else "a margin of 0"
        measured = (
            f"; on this machine a pair's margin differs by {trial.beta * rounding.between_rows:.6f} between rows "
            f"(root mean square, {rounding.pairs} pairs), so {room:.6f} is allowed"
            if rounding
            else ""
        )
        raise RunFailed(
            f"trial {trial.name}: the first step has loss {loss:.6f} and reward margin {margin:.6f} instead of "
            f"{expected}: policy and reference are not the same model at the start{measured}"
        )


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak memory, so that a trial's peak is not an earlier trial's. On a CPU, Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets the peak resident set size


def peak_memory_mb(device: torch.device) -> int:
    """Peak memory since `reset_peak_memory`: of this process's tensors on a GPU, else its resident set size.

    Where the system cannot reset the peak, it is that of the whole life of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) // 2**10
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset) // 2**20
    import resource

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident // 2**20 if sys.platform == "darwin" else resident // 2**10
