"""`--engine trl`: trains one trial with TRL's own `DPOTrainer`.

TRL does the arithmetic. This module gives it pristine weights, extracts exact per-example metrics, and saves the
weights of the best epoch right when they are evaluated, so that the saved weights are those that the results describe.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from pairtune.config import TrialConfig
from pairtune.engine.lora import draw_starts
from pairtune.engine.summaries import TrialFailed
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
from pairtune.errors import Interrupted
from pairtune.models.load import load_model
from pairtune.models.save import save_best
from pairtune.run.examples import ExampleRecord
from pairtune.run.folder import Run
from pairtune.run.metrics import EXAMPLE_METRICS, Evaluation, TrainingStep
from pairtune.run.records import TrialRecord
from pairtune.track.sinks import Sink


def run_trials(trials: Sequence[TrialConfig], inputs: TrialInputs, run: Run, sink: Sink) -> list[TrialRecord]:
    """Train a trial from pristine weights, evaluate it after every epoch and keep its best epoch.

    An interrupted trial starts over. TRL does not report the progress of its reference pass and evaluations.

    Args:
        trials: a single trial.
        inputs: what the trials of the run share.
        run: the run that the results are written to.
        sink: receives every step and evaluation.

    Raises:
        RunFailed: the trial did not start at the base model; the run's results would not be comparable.
    """
    (trial,) = trials
    reset_peak_memory(inputs.base.device)
    model, (result,) = start_trials(trials, inputs, packed=False)  # PEFT would keep what is unpacked as well
    continued = inputs.base.adapter is not None
    if inputs.base.adapter:  # TRL takes a frozen copy of this adapter for the reference
        model = PeftModel.from_pretrained(model, inputs.base.adapter, is_trainable=True)
    with tempfile.TemporaryDirectory(prefix="pairtune-") as scratch, _quiet():
        trainer = _Trainer(
            reference=inputs.base_outputs.logps,
            model=model,
            args=_arguments(trial, inputs, Path(scratch)),
            train_dataset=Dataset(inputs.train.ids()),
            eval_dataset=Dataset(inputs.validation.ids()),
            processing_class=inputs.base.tokenizer,
            peft_config=_lora(trial) if trial.method == "lora" and not continued else None,
            ref_model=_reference(inputs),
        )
        trainer.remove_callback(PrinterCallback)
        sink.start(trial.name, math.ceil(len(inputs.train) / trial.batch_size) * trial.epochs, 0, 0)
        keeper = _Keeper(trainer, trial, inputs, run, partial(sink.log, trial.name), result)
        trainer.add_callback(keeper)
        try:
            trainer.train()
        except TrialFailed as failure:
            result.status, result.reason = "failed", str(failure)
    result.peak_memory_mb = peak_memory_mb(inputs.base.device)
    sink.flush()
    run.write_trial(result)
    sink.finish(trial.name, result.status, result.best_epoch)
    return [result]


def checkpointed(run: Run) -> list[TrialRecord]:
    """Empty: this engine writes no checkpoints."""
    return []


def width(trial: TrialConfig, inputs: TrialInputs, asked: int | None) -> int:
    """One trial at a time."""
    return 1


def _arguments(trial: TrialConfig, inputs: TrialInputs, scratch: Path) -> DPOConfig:
    on_cpu = inputs.base.device.type == "cpu"
    arguments = DPOConfig(
        output_dir=str(scratch),
        # One pair per pass, in training and evaluation: less padding, memory that does not grow with the batch, TRL's
        # batch means are exact per-example records, and a pair's reference and policy log-probs are always computed
        # with the same padding, so that equal weights give equal bits and margins start at 0.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=trial.batch_size,
        per_device_eval_batch_size=1,
        num_train_epochs=trial.epochs,
        learning_rate=trial.learning_rate,
        beta=trial.beta,
        loss_type=[trial.loss],
        label_smoothing=trial.label_smoothing,
        discopop_tau=trial.discopop_tau,
        precompute_ref_log_probs=True,  # a third of a LoRA step's work, identical in every epoch and trial
        max_length=None,  # pairs that are too long have already been truncated or dropped
        max_grad_norm=trial.max_grad_norm,
        seed=trial.seed,
        use_cpu=on_cpu,
        bf16=trial.method == "full" and inputs.base.dtype == torch.bfloat16,
        gradient_checkpointing=_wants_checkpointing(trial, inputs.base.device),
        dataloader_pin_memory=not on_cpu,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,  # the default would log NaN as 0, which looks like success
        disable_tqdm=True,
        report_to=[],
    )
    # Several GPUs would each get a share through DataParallel, so that a pass would no longer be one pair.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _wants_checkpointing(trial: TrialConfig, device: torch.device) -> bool:
    """Whether activations are checkpointed; "auto" does it on accelerators, where memory is scarce."""
    return device.type != "cpu" if trial.checkpointing == "auto" else trial.checkpointing == "on"


def _reference(inputs: TrialInputs) -> PreTrainedModel | None:
    """The reference model; None: the policy at its start."""
    source = inputs.base.reference
    return None if source is None else load_model(source, inputs.base.dtype, inputs.base.device)


def _lora(trial: TrialConfig) -> LoraConfig:
    return LoraConfig(
        r=trial.lora_rank,
        lora_alpha=trial.lora_alpha,
        lora_dropout=trial.lora_dropout,
        use_rslora=trial.rslora,
        target_modules=list(trial.lora_targets) if trial.lora_targets else "all-linear",
        task_type="CAUSAL_LM",
    )


# TRL's columns of reference log-probs.
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


class _EpochOrder(Sampler[int]):
    """The order of the pairs that both engines share, epoch by epoch."""

    def __init__(self, pairs: int, seed: int) -> None:
        self.pairs, self.seed, self.epoch = pairs, seed, 0

    def __len__(self) -> int:
        return self.pairs

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(epoch_order(self.pairs, self.seed, self.epoch))


class _Trainer(DPOTrainer):
    """TRL's trainer, which shares reference log-probs between trials and records its evaluations pair by pair.

    TRL caches reference log-probs on disk under a hash of the tokenizer's state, among others; here they are kept in
    memory during the sweep, whose trials share base weights, pairs and order.
    """

    def __init__(self, *args: Any, reference: dict[str, Tensor], **kwargs: Any) -> None:
        self.example_records: list[ExampleRecord] = []
        self._reference = reference
        super().__init__(*args, **kwargs)
        if kwargs["peft_config"] is None:
            return  # all weights are trained, or an adapter that has its values
        factors = [weights for name, weights in self.model.named_parameters() if ".lora_A." in name]
        for weights, start in zip(factors, draw_starts(factors, self.args.seed), strict=True):
            weights.data.copy_(start)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> _EpochOrder:
        return _EpochOrder(len(self.train_dataset), self.args.seed)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # already tokenized, to the same ids that TRL would produce (a test compares them)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if name not in self._reference:
            computed = super()._precompute_ref_logps(dataset, name, batch_size)
            columns = computed.with_format("torch")
            self._reference[name] = torch.stack([columns[column][:] for column in _REFERENCE], dim=1)
        logps = Dataset.from_dict(dict(zip(_REFERENCE, self._reference[name].numpy().T, strict=True)))
        return concatenate_datasets([dataset, logps], axis=1)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        numbers = {name: values[-1] for name, values in self._metrics["eval"].items() if name in EXAMPLE_METRICS}
        self.example_records.append(
            {"loss": loss.item(), **numbers, "logps/margins_per_token": self._per_token(numbers)}
        )
        return loss, logits, labels

    def _per_token(self, numbers: dict[str, float]) -> float:
        """The difference of the log-ratios per token for the pair being evaluated."""
        ids = self.eval_dataset[len(self.example_records)]
        beta = float(self.beta)
        chosen, rejected = (
            numbers[f"rewards/{answer}"] / beta / len(ids[f"{answer}_ids"]) for answer in ("chosen", "rejected")
        )
        return chosen - rejected


@dataclass
class _Keeper(TrainerCallback):
    """Guards a trial's first step, logs every step, records every evaluation and saves the best epoch."""

    trainer: _Trainer
    trial: TrialConfig
    inputs: TrialInputs
    run: Run
    log: Callable[[TrainingStep | Evaluation], None]
    result: TrialRecord
    _losses: list[float] = field(default_factory=list)
    _step_started: float = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = self.trainer.model
        if isinstance(model, PeftModel) and self.inputs.base.adapter is None:
            factors = (weights for name, weights in model.named_parameters() if ".lora_B." in name)
            check_adapters_are_zero([self.trial.name], factors)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self._step_started
        self.result.train_seconds += seconds
        self.result.own_seconds += seconds
        if self.inputs.stopping():
            raise Interrupted(f"interrupted; `pairtune resume {self.run.root}` restarts this trial")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return  # an evaluation (see on_evaluate) or the final summary
        if state.global_step == 1 and self.inputs.base.reference is None:
            check_first_step(self.trial, logs["loss"], logs["rewards/margins"])
        if not math.isfinite(logs["loss"]):
            raise TrialFailed(
                f"the loss became {logs['loss']} at step {state.global_step}; lower the learning rate "
                f"({self.trial.learning_rate:g}), or use --dtype float32"
            )
        if logs.get("grad_norm") == 0:
            if state.global_step == 1:
                raise TrialFailed("the gradient of step 1 is 0: nothing would be learned")
            self.result.steps_without_gradient += 1
        total = len(self.inputs.train)
        pairs = min(self.trial.batch_size, total - self.result.train_pairs % total)
        self.result.train_pairs += pairs
        self._losses += [logs["loss"]] * pairs
        self.log(TrainingStep.model_validate({"step": state.global_step, **logs}))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        records = list(self.trainer.example_records)
        self.trainer.example_records.clear()
        loss = math.fsum(self._losses) / len(self._losses)
        self._losses.clear()
        paths, epoch = self.run.paths.trial(self.trial.name), round(state.epoch)
        self.log(
            record_evaluation(self.result, self.inputs, paths, epoch, state.global_step, loss, records, self._save)
        )
        prune_hopeless(self.result, self.inputs)
        control.should_training_stop = patience_is_over(self.result) or self.result.status == "pruned"

    def _save(self) -> str:
        base, paths = self.inputs.base, self.run.paths.trial(self.trial.name)
        return save_best(self.trainer.model, base.tokenizer, paths.best, base.source)


class _quiet:
    """Hides other libraries' progress bars and warnings during a trial, so that they do not disturb the live view."""

    names = ("transformers", "trl", "accelerate", "datasets", "peft")

    def __enter__(self) -> None:
        disable_progress_bar()
        self.tqdm = os.environ.get("TQDM_DISABLE")
        os.environ["TQDM_DISABLE"] = "1"  # checked by TRL before it shows the progress bar of its reference pass
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.simplefilter("ignore", FutureWarning)  # renamed arguments, for these libraries to sort out
        self.levels = {name: logging.getLogger(name).level for name in self.names}
        for name in self.names:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.warnings.__exit__(None, None, None)
        if self.tqdm is None:
            os.environ.pop("TQDM_DISABLE", None)
        for name, level in self.levels.items():
            logging.getLogger(name).setLevel(level)
