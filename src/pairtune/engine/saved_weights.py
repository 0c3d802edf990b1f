"""Evaluates saved weights on held-out pairs, with the kernels that trained them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pairtune.config import TrialConfig
from pairtune.data.table import PairTable
from pairtune.engine.divergence import BaseStates, base_states
from pairtune.engine.kernels import Kernels
from pairtune.engine.lora import LoraSettings, add_adapters, load_adapter, settings_of
from pairtune.engine.losses import Objective
from pairtune.engine.policy import Policy, cast_parameters
from pairtune.engine.processes import Processes
from pairtune.engine.reference import (
    check_reference,
    fingerprint_of_reference,
    open_reference,
    reference_fingerprint,
    reference_logps,
)
from pairtune.engine.scoring import Scorer
from pairtune.models.load import LoadedBase, give_memory_back, load_model, weights_fingerprint
from pairtune.run.examples import ExampleRecord


@dataclass(frozen=True)
class SavedWeights:
    """Weights on disk, and how they are evaluated.

    Attributes:
        folder: the folder of an adapter or of a full model.
        lora: the adapter's settings; None: a full model.
        objective: the objective whose loss and rewards are reported.
        dtype: the dtype for evaluation; None: that of the base model.
    """

    folder: Path
    lora: LoraSettings | None
    objective: Objective
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, trial: TrialConfig, folder: Path) -> SavedWeights:
        """The weights that a trial has saved."""
        dtype = getattr(torch, trial.eval_dtype) if trial.eval_dtype else None
        lora = settings_of(trial) if trial.method == "lora" else None
        return cls(folder, lora, Objective.of(trial), dtype)


def evaluate_weights(
    saved: SavedWeights,
    base: LoadedBase,
    pairs: PairTable,
    reference_file: Path,
    kernels: Kernels | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[ExampleRecord]:
    """Per-example records of pairs under saved weights.

    Args:
        saved: the weights.
        base: the base model that they were tuned from, and what they are measured against.
        pairs: N of them.
        reference_file: the run's file of reference log-probs for these pairs.
        kernels: how products are computed on this machine; probed if not given.
        on_progress: called with the number of pairs done.

    Returns:
        N records, in the order of the pairs.
    """
    processes = Processes(base.device)
    dtype = saved.dtype or base.dtype
    model = load_model(base.source, base.dtype, base.device, packed=True)
    against = fingerprint_of_reference(base, weights_fingerprint(model))
    cast_parameters(model, dtype)
    kernels = kernels or Kernels(model, base.device)
    before = open_reference(base, model, saved.lora or LoraSettings(), kernels)
    name = reference_fingerprint(against, before, pairs)
    reference = reference_logps(before, name, pairs, reference_file, processes).to(base.device)
    check_reference(before, pairs, reference)
    states = BaseStates(base_states(before, name, pairs, processes), before.head.weight, before.head.bias)
    if saved.lora:
        adapted = before.adapted or add_adapters(model, saved.lora, [0])  # its values are replaced at once
        load_adapter(adapted, saved.folder)
        policy = Policy(model, adapted, kernels=kernels)
    else:
        del model, before  # but for the head: there may be no room for two models
        give_memory_back()
        tuned = load_model(saved.folder, base.dtype, base.device)
        cast_parameters(tuned, dtype)
        policy = Policy(tuned, kernels=kernels)
    policy.train(False)
    scorer = Scorer(policy, [saved.objective], pairs, reference, processes, base=states)
    (records,) = scorer.all_records(policy.evaluation_tokens, on_progress)
    return records
