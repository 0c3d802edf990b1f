"""`--engine pairtune`: trains trials with this project's own engine, several at a time.

The results match those of `--engine trl` step by step (tests/test_equivalence.py), with less work: reference log-probs
are cached, the two answers of a pair share their prompt, only answer tokens go through the output embedding, and LoRA
trials that see the same pairs in the same order run in lockstep, their adapters side by side on one frozen base model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from pairtune.config import TrialConfig, source_name
from pairtune.data.table import PairTable
from pairtune.engine.checkpoint import (
    CheckpointedTrial,
    CheckpointState,
    read_checkpoint,
    read_state,
    write_checkpoint,
)
from pairtune.engine.compact import CompactOptimizer, CompactWeights
from pairtune.engine.divergence import PAIRS, BaseStates, base_states
from pairtune.engine.lora import LoraLinear, add_adapters, load_adapter, peft_config, peft_tensors, settings_of
from pairtune.engine.losses import Objective
from pairtune.engine.memory import lockstep_width
from pairtune.engine.optimize import (
    AdapterWeights,
    FlatAdapterWeights,
    FullWeights,
    TrialOptimizer,
)
from pairtune.engine.out_of_memory import in_smaller_rows
from pairtune.engine.policy import TRAIN_TOKENS, TRAIN_TOKENS_THERE, Policy, cast_parameters
from pairtune.engine.reference import (
    check_reference,
    fingerprint_of_reference,
    open_reference,
    reference_fingerprint,
    reference_logps,
)
from pairtune.engine.rounding import measure_rounding
from pairtune.engine.scoring import Scored, Scorer, records_of
from pairtune.engine.sharding import ShardedOptimizer, ShardedWeights
from pairtune.engine.summaries import TrialFailed, batch_means
from pairtune.engine.trial import (
    TrialInputs,
    check_adapters_are_zero,
    check_first_step,
    epoch_order,
    patience_is_over,
    peak_memory_mb,
    prune_hopeless,
    record_evaluation,
    reset_peak_memory,
    start_trials,
)
from pairtune.errors import Interrupted, RunFailed
from pairtune.files import fingerprint
from pairtune.models.load import give_memory_back, load_model
from pairtune.models.save import save_adapter, save_best
from pairtune.run.examples import ExampleRecord
from pairtune.run.folder import Run
from pairtune.run.metrics import Evaluation, TrainingStep
from pairtune.run.paths import TrialPaths
from pairtune.run.records import SweepRecord, TrialRecord
from pairtune.track.sinks import Sink

R = TypeVar("R")

Weights = FullWeights | CompactWeights | ShardedWeights | AdapterWeights | FlatAdapterWeights


def run_trials(trials: Sequence[TrialConfig], inputs: TrialInputs, run: Run, sink: Sink) -> list[TrialRecord]:
    """Train trials side by side from pristine weights, evaluate them after every epoch and keep each one's best epoch.

    If the run's checkpoint holds these trials, they resume from it, bit for bit on a CPU.

    Args:
        trials: trials with equal `sweep.groups.lockstep_key`; with `--method full` a single one.
        inputs: what the trials of the run share.
        run: the run that their results are written to.
        sink: receives every step and evaluation.

    Raises:
        RunFailed: the trials did not start at the base model (the run's results would not be comparable), or a
            checkpoint cannot be written or read.
        Interrupted: the run was asked to stop; the checkpoint holds everything up to that point.
    """
    lockstep = _TrialGroup(trials, inputs, run, sink)
    lockstep.run_to_end()
    return lockstep.results


def checkpointed(run: Run) -> list[TrialRecord]:
    """The records of the trials in the run's checkpoint, as of that checkpoint."""
    state = read_state(run.paths.checkpoint)
    return [member.result for member in state.members] if state else []


def width(trial: TrialConfig, inputs: TrialInputs, asked: int | None) -> int:
    """How many trials like this one run side by side: the number asked for, or as many as fit in memory."""
    if trial.method == "full":
        return 1
    return asked or inputs.processes.from_first(lockstep_width(trial, inputs))


@dataclass(eq=False)
class _TrialState:
    """One of the trials that run together."""

    result: TrialRecord
    paths: TrialPaths
    weights: Weights
    optimizer: TrialOptimizer | CompactOptimizer
    losses: list[float] = field(default_factory=list)  # of the training pairs seen in the current epoch
    lines: int = 0  # in its metrics.jsonl

    @property
    def trial(self) -> TrialConfig:
        return self.result.trial


def _identity(trial: TrialConfig) -> str:
    """A trial's settings; those that older checkpoints do not know are left out at their defaults."""
    later = ("desirable_weight", "undesirable_weight", "row_tokens", "optimizer")
    same = {name for name in later if getattr(trial, name) == TrialConfig.model_fields[name].default}
    return trial.model_dump_json(exclude=same)


class _TrialGroup:
    """Trials that are trained together."""

    def __init__(self, trials: Sequence[TrialConfig], inputs: TrialInputs, run: Run, sink: Sink) -> None:
        self.inputs, self.run, self.sink = inputs, run, sink
        self.shared = trials[0]  # stands for the settings that all trials share
        self.device = inputs.base.device
        reset_peak_memory(self.device)
        self.model, self.results = start_trials(trials, inputs)
        self._pairs_fingerprint = fingerprint(pairs.ids_fingerprint() for pairs in inputs.splits.values())
        self.epoch, self.step, self.seen = 1, 0, 0  # seen: pairs of the current epoch
        usual = TRAIN_TOKENS if self.device.type == "cpu" else TRAIN_TOKENS_THERE
        self.row_tokens = run.choices.row_tokens or self.shared.row_tokens or usual
        self.members: list[_TrialState] = []
        # Order matters: float32 master weights are taken before the model is cast, and the reference's outputs are
        # computed before the model has the trials' adapters.
        masters = self._masters() if self.shared.method == "full" else None
        sharded = masters if isinstance(masters, ShardedWeights) else None
        if not sharded:
            cast_parameters(self.model, inputs.base.dtype)
        # Whether a pass is needed at all depends on caches, and with shares all processes would have to make it.
        whole = load_model(inputs.base.source, inputs.base.dtype, self.device) if sharded else self.model
        opened = open_reference(inputs.base, whole, settings_of(self.shared), inputs.kernels)
        self.references, self.base_states = self._base_outputs(opened)
        adapted = opened.adapted
        del opened, whole
        give_memory_back()  # of the reference's rows, which are longer than those of training, and of its own weights
        adapted = self._add_adapters(trials, adapted) if masters is None else {}
        self.policy = Policy(self.model, adapted, len(trials), inputs.kernels, sharded=sharded)
        if self.shared.checkpointing == "on":  # "auto" is decided by memory before a run starts
            self.policy.checkpoint_activations()
        batches = math.ceil(len(inputs.train) / self.shared.batch_size)
        flat = self.policy.flat
        for index, result in enumerate(self.results):
            weights = masters or (FlatAdapterWeights(flat, index) if flat else AdapterWeights(adapted, index))
            optimizer = self._optimizer(result.trial, weights, batches * result.trial.epochs)
            self.members.append(_TrialState(result, run.paths.trial(result.trial.name), weights, optimizer))
        if [result.trial.name for result in checkpointed(run)] == [trial.name for trial in trials]:
            self._restore()
        for member in self.members:
            sink.start(member.trial.name, member.optimizer.steps, self.step, member.lines)

    def _masters(self) -> FullWeights | CompactWeights | ShardedWeights:
        """All weights of the model, for full training."""
        dtype, processes = self.inputs.base.dtype, self.inputs.processes
        if processes.count > 1:
            return ShardedWeights(self.model, dtype, self.device, processes)
        return (CompactWeights if self.shared.optimizer == "adamw-8bit" else FullWeights)(self.model, dtype)

    def _optimizer(self, trial: TrialConfig, weights: Weights, steps: int) -> TrialOptimizer | CompactOptimizer:
        if isinstance(weights, ShardedWeights):
            return ShardedOptimizer(trial, weights, steps, self.inputs.processes)
        if isinstance(weights, CompactWeights):
            return CompactOptimizer(trial, weights, steps)
        return TrialOptimizer(trial, weights.tensors, steps, weights.shapes)

    def _add_adapters(self, trials: Sequence[TrialConfig], adapted: dict[str, LoraLinear]) -> dict[str, LoraLinear]:
        """The trials' adapters at their start: new ones, or copies of the one that is trained further.

        Args:
            trials: the trials.
            adapted: the layers, if the model has them already because the reference is that very adapter.
        """
        start = self.inputs.base.adapter
        if adapted:
            for layer in adapted.values():
                layer.keep([0] * len(trials))
            return adapted
        adapted = add_adapters(self.model, settings_of(self.shared), [trial.seed for trial in trials])
        if start:
            load_adapter(adapted, start)
        else:
            check_adapters_are_zero([trial.name for trial in trials], (layer.lora_b for layer in adapted.values()))
        return adapted

    def run_to_end(self) -> None:
        """Train all trials to their last epoch."""
        while self._retire():
            self._train_epoch()
            if self.members:
                self._evaluate()
                self.epoch, self.seen = self.epoch + 1, 0
                self._pause(checkpoint=True)  # before a finished trial is recorded: recorded trials are not run again
        if self.inputs.processes.first:
            self.run.paths.checkpoint.unlink(missing_ok=True)

    def _train_epoch(self) -> None:
        """Make the remaining steps of the epoch."""
        order = epoch_order(len(self.inputs.train), self.shared.seed, self.epoch)
        while self.seen < len(order) and self.members:
            started = time.perf_counter()
            self._train_step(order[self.seen : self.seen + self.shared.batch_size])
            seconds = time.perf_counter() - started
            for member in self.members:
                member.result.train_seconds += seconds
                member.result.own_seconds += seconds / len(self.members)
            self._retire()
            self._pause(checkpoint=self.step % self.inputs.checkpoint_steps == 0)

    def _retire(self) -> bool:
        """Record the trials that have failed or ended, and drop them from the group.

        Returns:
            Whether any trial is left.
        """
        kept = [index for index, member in enumerate(self.members) if not self._ended(member.result)]
        staying = [self.members[index] for index in kept]
        for member in self.members:
            if member not in staying:
                member.result.peak_memory_mb = peak_memory_mb(self.device)
                if self.inputs.processes.first:
                    self.sink.flush()
                    self.run.write_trial(member.result)
                self.sink.finish(member.trial.name, member.result.status, member.result.best_epoch)
        if 0 < len(staying) < len(self.members):
            self.policy.keep(kept)
            for index, member in enumerate(staying):
                member.weights.assign(index)
        self.members = staying
        return bool(staying)

    def _ended(self, result: TrialRecord) -> bool:
        between_epochs = self.seen == 0
        over = self.epoch > result.trial.epochs or patience_is_over(result)
        return result.status != "finished" or (between_epochs and over)

    def _pause(self, *, checkpoint: bool) -> None:
        """Between two steps: write a checkpoint if one is due, and stop if asked to."""
        stopping = self.inputs.processes.any(self.inputs.stopping())
        if self.members and (checkpoint or stopping):
            state = self._state()  # in all processes, which may have to gather it
            if self.inputs.processes.first:
                self.sink.flush()
                write_checkpoint(self.run.paths.checkpoint, *state)
        if stopping:
            raise Interrupted(
                f"interrupted at step {self.step}; `pairtune resume {self.run.root}` continues from there"
            )

    def _state(self) -> tuple[CheckpointState, dict[str, Tensor]]:
        members, tensors = [], dict[str, Tensor]()
        for index, member in enumerate(self.members):
            members.append(
                CheckpointedTrial(
                    result=member.result, losses=member.losses, lines=member.lines, updates=member.optimizer.step
                )
            )
            tensors |= {f"{index}.{name}": tensor for name, tensor in member.optimizer.state().items()}
        state = CheckpointState(
            of=self._fingerprint(), epoch=self.epoch, step=self.step, seen=self.seen, members=members
        )
        return state, tensors

    def _restore(self) -> None:
        state, tensors = read_checkpoint(self.run.paths.checkpoint)
        if state.of != self._fingerprint():
            raise RunFailed(
                f"{self.run.paths.checkpoint}: belongs to other settings, other pairs or another base model than this "
                "run's; remove it, and `pairtune resume` restarts its trials from epoch 1"
            )
        self.epoch, self.step, self.seen = state.epoch, state.step, state.seen
        for index, (member, kept) in enumerate(zip(self.members, state.members, strict=True)):
            member.result = self.results[index] = kept.result
            member.losses, member.lines = kept.losses, kept.lines
            start = f"{index}."
            own = {name.removeprefix(start): each for name, each in tensors.items() if name.startswith(start)}
            member.optimizer.restore(kept.updates, own)
            member.weights.updated()

    def _fingerprint(self) -> str:
        trials = [_identity(member.trial) for member in self.members]
        return fingerprint([self.inputs.start_fingerprint, self._pairs_fingerprint, *trials])

    def _base_outputs(self, base: Policy) -> tuple[dict[str, Tensor], BaseStates]:
        """The reference model's outputs for the pairs, checked before anything is trained; all trials share them.

        Args:
            base: the reference model, by default the base.

        Returns:
            Its log-probs for every split, and its hidden states at some positions of the validation answers.
        """
        outputs = self.inputs.base_outputs
        references = {"train": self._reference("train", base)}
        check_reference(base, self.inputs.train, references["train"])
        if outputs.rounding is None:
            name = self._reference_name(base, self.inputs.train)
            outputs.rounding = measure_rounding(base, len(self.results), self.inputs.train, name)
            if self.inputs.processes.first:  # before any trial's record: it is not measured again once all have ended
                known = self.run.sweep
                self.run.write(SweepRecord(trials=known.trials if known else [], rounding=outputs.rounding))
        with base.computing_in(self._evaluation_dtype):
            references["validation"] = self._reference("validation", base)
            check_reference(base, self.inputs.validation, references["validation"])
            return references, self._states_of(base)

    @property
    def _evaluation_dtype(self) -> torch.dtype:
        return getattr(torch, self.shared.eval_dtype) if self.shared.eval_dtype else self.inputs.base.dtype

    def _reference_name(self, base: Policy, pairs: PairTable) -> str:
        against = fingerprint_of_reference(self.inputs.base, self.inputs.base_fingerprint)
        return reference_fingerprint(against, base, pairs)

    def _reference(self, split: str, base: Policy) -> Tensor:
        """The reference model's log-probs for a split."""
        pairs = self.inputs.splits[split]
        logps = self.inputs.base_outputs.logps
        if split not in logps:
            what = f"reference log-probs of the {split} pairs"

            def compute(tokens: int) -> Tensor:
                return reference_logps(
                    base,
                    self._reference_name(base, pairs),
                    pairs,
                    self.run.paths.reference / f"{split}.safetensors",
                    self.inputs.processes,
                    lambda done: self._report_progress(what, done, len(pairs)),
                    tokens,
                )

            def told(tokens: int) -> None:
                self.sink.notice(f"memory ran out: the {what} are computed with rows of {tokens} tokens")

            logps[split] = self._in_smaller_rows(compute, base.evaluation_tokens, told)
        return logps[split].to(self.device)

    def _states_of(self, base: Policy) -> BaseStates:
        """The reference model's states for the validation pairs, from which the trials' KL divergence is measured."""
        pairs = self.inputs.validation
        outputs = self.inputs.base_outputs
        if outputs.states is None:
            outputs.states = base_states(
                base,
                self._reference_name(base, pairs),
                pairs,
                self.inputs.processes,
                lambda done: self._report_progress("base model on validation pairs", done, min(PAIRS, len(pairs))),
            )
        head = base.head
        if self.shared.method == "full" and base.model is self.model:
            head = deepcopy(head)  # keeps the base model's head while the policy's is trained
        return BaseStates(outputs.states, head.weight, head.bias)

    def _report_progress(self, what: str, done: int, total: int) -> None:
        self.sink.on_progress([member.trial.name for member in self.members], what, done, total)
        if self.inputs.stopping() and self.inputs.processes.count == 1:  # several processes can only stop together
            self._pause(checkpoint=False)

    def _train_step(self, rows: Sequence[int]) -> None:
        """One optimizer step of every trial on the pairs of some rows; a batch's loss is the mean over its pairs."""
        self.step += 1
        self.policy.train(True)
        weights = self.members[0].weights  # the adapters of all trials lie in the same stacks
        records = self._in_smaller_rows(partial(self._accumulate, rows), self.row_tokens, self._shorten_rows)
        self.inputs.processes.add_gradients(weights.summed)
        for member, mine in zip(self.members, records, strict=True):
            try:
                self._update(member, self.inputs.processes.gather(mine), rows)
            except TrialFailed as failure:
                member.result.status, member.result.reason = "failed", str(failure)
        weights.forget_gradients()
        self.seen += len(rows)

    def _accumulate(self, rows: Sequence[int], tokens: int) -> list[list[ExampleRecord]]:
        """Add up the gradients of a batch, one row of at most so many tokens at a time; every trial's records."""
        weights = self.members[0].weights
        weights.forget_gradients()  # of an earlier try, which memory did not suffice for
        parts: list[list[Scored]] = [[] for _ in self.members]
        for scored in self._scorer("train").batch(rows, tokens):
            losses = torch.stack([each.losses.sum() for each in scored])
            (losses.sum() / len(rows)).backward()  # the sum does not mix the adapters' gradients
            weights.collect_gradients()
            for mine, each in zip(parts, scored, strict=True):
                mine.append(each)
        return records_of(parts)

    def _in_smaller_rows(self, work: Callable[[int], R], tokens: int, told: Callable[[int], None]) -> R:
        """See `in_smaller_rows`; several processes would have to agree, so that there the first error ends the run."""
        return work(tokens) if self.inputs.processes.count > 1 else in_smaller_rows(work, tokens, told)

    def _shorten_rows(self, tokens: int) -> None:
        """Use shorter rows in training from now on, in a resumed run as well."""
        self.row_tokens = tokens
        self.policy.forget_graphs()
        self.run.remember(row_tokens=tokens)
        self.sink.notice(
            f"memory ran out at step {self.step}: the step is repeated, and all later ones are made, with rows of "
            f"{tokens} tokens; this changes the results only by rounding"
        )

    def _scorer(self, split: str) -> Scorer:
        """Scores the pairs of a split under every trial."""
        return Scorer(
            self.policy,
            [Objective.of(member.trial) for member in self.members],
            self.inputs.splits[split],
            self.references[split],
            self.inputs.processes,
            (self.shared.seed, self.step),
            self.base_states if split == "validation" else None,
        )

    def _update(self, member: _TrialState, records: list[ExampleRecord], rows: Sequence[int]) -> None:
        """Check the gradients of a step, and update a trial's weights."""
        member.result.train_pairs += len(rows)
        means = batch_means(records, unpaired=self.inputs.train.unpaired)
        if self.step == 1 and self.inputs.base.reference is None:
            margin = math.fsum(record["rewards/margins"] for record in records) / len(records)
            check_first_step(member.trial, means["loss"], margin, self.inputs.base_outputs.rounding)
        member.weights.take_gradients()
        rate, norm = member.optimizer.learning_rate, member.optimizer.clip()
        self._guard(member, means["loss"], norm, rows)
        member.optimizer.update()
        member.weights.updated()
        epoch = self.epoch - 1 + (self.seen + len(rows)) / len(self.inputs.train)
        line = {"step": self.step, "epoch": epoch, **means, "grad_norm": norm, "learning_rate": rate}
        self._log(member, TrainingStep.model_validate(line))
        member.losses += [record["loss"] for record in records]

    def _guard(self, member: _TrialState, loss: float, norm: float, rows: Sequence[int]) -> None:
        """Stop a trial before an update that would ruin it or do nothing; save the weights before it."""
        if math.isfinite(loss) and math.isfinite(norm) and (norm > 0 or self.step > 1):
            member.result.steps_without_gradient += norm == 0
            return
        origins = ", ".join(source_name(self.inputs.train[row].origin) for row in rows)  # published with the run
        self._save(member, member.paths.failed)
        if norm == 0:
            raise TrialFailed(f"the gradient of step {self.step} is 0 (pairs {origins}): nothing would be learned")
        raise TrialFailed(
            f"the loss became {loss} and the gradient norm {norm} at step {self.step} (pairs {origins}); lower the "
            f"learning rate ({member.trial.learning_rate:g}), or use --dtype float32. The weights before that step are "
            f"in {member.paths.failed.relative_to(self.run.root)}"
        )

    def _evaluate(self) -> None:
        """Evaluate every trial on the validation pairs, and save the weights that are the trial's best so far."""
        self.policy.train(False)
        total = len(self.inputs.validation)

        def evaluate(tokens: int) -> list[list[ExampleRecord]]:
            return self._scorer("validation").all_records(
                tokens, lambda done: self._report_progress("evaluating", done, total)
            )

        def told(tokens: int) -> None:
            self.sink.notice(f"memory ran out in the evaluation: it is repeated with rows of {tokens} tokens")

        with self.policy.computing_in(self._evaluation_dtype):
            records = self._in_smaller_rows(evaluate, self.policy.evaluation_tokens // len(self.members), told)
        for member, mine in zip(self.members, records, strict=True):
            loss = math.fsum(member.losses) / len(member.losses)
            member.losses.clear()
            save = partial(self._save, member, member.paths.best)
            try:
                evaluation = record_evaluation(
                    member.result, self.inputs, member.paths, self.epoch, self.step, loss, mine, save
                )
                self._log(member, evaluation)
            except TrialFailed as failure:
                member.result.status, member.result.reason = "failed", str(failure)
        for member in self.members:
            if member.result.status == "finished":
                prune_hopeless(member.result, self.inputs)

    def _log(self, member: _TrialState, line: TrainingStep | Evaluation) -> None:
        self.sink.log(member.trial.name, line)
        member.lines += 1

    def _save(self, member: _TrialState, folder: Path) -> str:
        """Save a trial's current weights; see `save_best`."""
        tokenizer, source = self.inputs.base.tokenizer, self.inputs.base.source
        # All processes must take part in gathering a model, of which the first one then has all.
        model = member.weights.whole(source) if isinstance(member.weights, ShardedWeights) else self.model
        if not self.inputs.processes.first or model is None:
            return ""
        if self.shared.method == "full":
            saved = save_best(model, tokenizer, folder, source)
            if model is not self.model:
                del model
                give_memory_back()
            return saved
        adapted = self.policy.adapted
        config = peft_config(adapted, settings_of(self.shared))
        tensors = peft_tensors(adapted, self.members.index(member))
        return save_adapter(tensors, config, tokenizer, folder, source)
