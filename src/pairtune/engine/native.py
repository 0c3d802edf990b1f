"""`--engine pairtune`: trials trained by this project's own engine.

The numbers are those of `--engine trl`, step by step (tests/test_engine_native.py); the work is less: reference
log-probs are kept, prompts are shared by their two answers, and only answer tokens meet the vocabulary.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pairtune.config import TrialConfig
from pairtune.data.table import PairTable
from pairtune.engine.lora import LoraSettings, add_adapters, peft_config, peft_tensors
from pairtune.engine.losses import LossSettings, PairLogps, pair_loss
from pairtune.engine.optimize import AdapterWeights, FullWeights, TrialOptimizer
from pairtune.engine.packing import Pack
from pairtune.engine.policy import EVALUATION_TOKENS, TRAIN_TOKENS, Policy
from pairtune.engine.records import ExampleRecord, TrialFailed, TrialResult
from pairtune.engine.reference import reference_fingerprint, reference_logps
from pairtune.engine.trial import (
    Busy,
    Log,
    TrialInputs,
    check_first_step,
    epoch_order,
    finish_trial,
    not_shown,
    record_evaluation,
    start_trial,
    wants_checkpointing,
)
from pairtune.models.save import save_adapter, save_best
from pairtune.runs import TrialFolder

_TABLE_ROWS = 256


def run_trial(
    trial: TrialConfig, inputs: TrialInputs, folder: TrialFolder, log: Log, busy: Busy = not_shown
) -> TrialResult:
    """Train one trial from pristine weights, evaluate it at every epoch and keep its best epoch.

    Raises:
        RunFailed: the trial did not start at the base model; the run's results would not be comparable.
    """
    model, result = start_trial(trial, inputs)
    training = _Training(trial, inputs, folder, log, busy, result, model)
    try:
        training.run()
    except TrialFailed as failure:
        result.status, result.reason = "failed", str(failure)
    return finish_trial(result, folder, training.seconds, training.pairs, inputs.base.device)


@dataclass
class _Scored:
    """A batch of pairs under one trial: what its loss and its metrics are made of, [pairs] each."""

    losses: Tensor
    pairs: PairLogps
    beta: float
    chosen_logits: Tensor
    rejected_logits: Tensor

    def records(self) -> list[ExampleRecord]:
        """One record a pair, under TRL's names."""
        chosen, rejected = self.beta * self.pairs.chosen_ratio, self.beta * self.pairs.rejected_ratio
        columns = {
            "loss": self.losses,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": self.pairs.chosen,
            "logps/rejected": self.pairs.rejected,
            "logits/chosen": self.chosen_logits,
            "logits/rejected": self.rejected_logits,
        }
        values = {name: column.detach().tolist() for name, column in columns.items()}
        return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


@dataclass
class _Training:
    """One trial while it is trained."""

    trial: TrialConfig
    inputs: TrialInputs
    folder: TrialFolder
    log: Log
    busy: Busy
    result: TrialResult
    model: Any
    seconds: float = 0.0
    pairs: int = 0
    step: int = 0

    def run(self) -> None:
        """All epochs."""
        trial, train = self.trial, self.inputs.train
        torch.manual_seed(trial.seed)  # for dropout, which is all that is drawn besides the order and the adapters
        if trial.method == "full":
            self.weights: FullWeights | AdapterWeights = FullWeights(self.model, self.inputs.base.dtype)
        self.model.to(self.inputs.base.dtype)
        references = {name: self._reference(name, pairs) for name, pairs in self._splits.items()}
        self.references = references
        if trial.method == "lora":
            self.policy = Policy(self.model, add_adapters(self.model, _lora_settings(trial), [trial.seed]))
            self.weights = AdapterWeights(self.policy.adapted, 0)
        else:
            self.policy = Policy(self.model)
        if wants_checkpointing(trial, self.inputs.base.device):
            self.policy.checkpoint_activations()
        steps = math.ceil(len(train) / trial.batch_size) * trial.epochs
        self.optimizer = TrialOptimizer(trial, self.weights.tensors, steps)
        for epoch in range(1, trial.epochs + 1):
            order = epoch_order(len(train), trial.seed, epoch)
            losses = []
            for start in range(0, len(order), trial.batch_size):
                started = time.perf_counter()
                records = self._train_step(order[start : start + trial.batch_size])
                self.seconds += time.perf_counter() - started
                losses += [record["loss"] for record in records]
            self._evaluate(epoch, math.fsum(losses) / len(losses))

    @property
    def _splits(self) -> dict[str, PairTable]:
        return {"train": self.inputs.train, "validation": self.inputs.validation}

    def _reference(self, split: str, pairs: PairTable) -> Tensor:
        """The base's log-probs of a split; all trials of a run share them."""
        if split not in self.inputs.reference:
            base, folder = self.inputs.base, self.inputs.reference_folder
            name = reference_fingerprint(self.inputs.base_fingerprint, base.device, base.dtype, pairs)
            run_file = folder / f"{split}.safetensors" if folder else None
            what = f"reference log-probs of the {split} pairs"
            self.inputs.reference[split] = reference_logps(
                lambda: Policy(self.model), name, pairs, run_file, lambda done: self.busy(what, done, len(pairs))
            )
        logps: Tensor = self.inputs.reference[split].to(self.inputs.base.device)
        return logps

    def _train_step(self, rows: list[int]) -> list[ExampleRecord]:
        """One update from the pairs of some rows; a batch's loss is its mean over pairs."""
        self.step += 1
        self.policy.train(True)
        records: list[ExampleRecord] = []
        for pack in self.policy.rows(self.inputs.train.tokens(rows), TRAIN_TOKENS):
            some = rows[len(records) : len(records) + pack.pairs]
            scored = self._score(pack, self.references["train"][some])
            (scored.losses.sum() / len(rows)).backward()
            records += scored.records()
        self.pairs += len(rows)
        means = {name: math.fsum(record[name] for record in records) / len(rows) for name in records[0]}
        if self.step == 1:
            check_first_step(self.trial, means, self.policy.slack)
        self.weights.take_gradients()
        rate, norm = self.optimizer.learning_rate, self.optimizer.clip()
        self._guard(means["loss"], norm, rows)
        self.optimizer.update()
        self.weights.updated()
        epoch = self.pairs / len(self.inputs.train)
        self.log({"step": self.step, **means, "grad_norm": norm, "learning_rate": rate, "epoch": epoch})
        return records

    def _score(self, pack: Pack, reference: Tensor) -> _Scored:
        answers = self.policy.answer_logps(pack)
        (logps,), (logits,) = answers.logps, answers.logits
        tokens = pack.answer_tokens
        pairs = PairLogps(logps[0::2], logps[1::2], reference[:, 0], reference[:, 1], tokens[0::2], tokens[1::2])
        trial = self.trial
        settings = LossSettings(
            trial.beta, trial.label_smoothing, trial.simpo_gamma, trial.discopop_tau, trial.sft_weight
        )
        losses = pair_loss(trial.loss, pairs, settings)
        return _Scored(losses, pairs, trial.beta, logits[0::2], logits[1::2])

    def _guard(self, loss: float, norm: float, rows: list[int]) -> None:
        """Stop the trial before an update that would ruin it, or that would do nothing; keep what led to it."""
        if math.isfinite(loss) and math.isfinite(norm) and (norm > 0 or self.step > 1):
            self.result.steps_without_gradient += norm == 0
            return
        origins = ", ".join(self.inputs.train[row].origin for row in rows)
        self._save(self.folder.failed)
        if norm == 0:
            raise TrialFailed(f"the gradient of step {self.step} is 0 (pairs {origins}): nothing would be learned")
        raise TrialFailed(
            f"the loss became {loss} and the gradient norm {norm} at step {self.step} (pairs {origins}); lower the "
            f"learning rate ({self.trial.learning_rate:g}), or use --dtype float32. The weights before it are in "
            f"{self.folder.failed}"
        )

    def _evaluate(self, epoch: int, train_loss: float) -> None:
        """Judge the weights on the validation pairs, and keep them when they are the best so far."""
        validation = self.inputs.validation
        self.policy.train(False)
        records: list[ExampleRecord] = []
        with torch.no_grad():
            for start in range(0, len(validation), _TABLE_ROWS):
                rows = range(start, min(start + _TABLE_ROWS, len(validation)))
                for pack in self.policy.rows(validation.tokens(rows), EVALUATION_TOKENS):
                    reference = self.references["validation"][len(records) : len(records) + pack.pairs]
                    records += self._score(pack, reference).records()
                    self.busy("evaluating", len(records), len(validation))
        row = {"epoch": epoch, "step": self.step, "loss": train_loss}
        self.log(
            record_evaluation(self.result, self.inputs, self.folder, row, records, lambda: self._save(self.folder.best))
        )

    def _save(self, folder: Path) -> str:
        tokenizer, source = self.inputs.base.tokenizer, self.inputs.base.source
        if self.trial.method == "full":
            return save_best(self.model, tokenizer, folder, source.published_as)
        adapted = self.policy.adapted
        config = peft_config(adapted, _lora_settings(self.trial))
        return save_adapter(peft_tensors(adapted, 0), config, tokenizer, folder, source.published_as)


def _lora_settings(trial: TrialConfig) -> LoraSettings:
    return LoraSettings(trial.lora_rank, trial.lora_alpha, trial.lora_dropout, trial.rslora)
