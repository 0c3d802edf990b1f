"""Saved weights judged on held-out pairs, with the kernels that trained them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from pairtune.config import TrialConfig
from pairtune.data.table import PairTable
from pairtune.engine.divergence import BaseStates, base_states
from pairtune.engine.kernels import Kernels
from pairtune.engine.lora import add_adapters, load_peft_tensors, settings_of
from pairtune.engine.policy import EVALUATION_TOKENS, Policy, cast_parameters
from pairtune.engine.processes import Processes
from pairtune.engine.records import ExampleRecord
from pairtune.engine.reference import check_reference, reference_fingerprint, reference_logps
from pairtune.engine.scoring import score_pairs
from pairtune.models.load import LoadedBase, load_model, weights_fingerprint


def evaluate_weights(
    trial: TrialConfig,
    weights: Path,
    base: LoadedBase,
    pairs: PairTable,
    reference_file: Path,
    kernels: Kernels | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[ExampleRecord]:
    """Records of pairs under weights that a trial has saved.

    Args:
        trial: whose loss and beta count.
        weights: a folder with an adapter, or with a whole model.
        base: that the trial started from.
        pairs: N of them.
        reference_file: where the run keeps the base's log-probs of these pairs.
        kernels: how products are computed on this machine; found out where they are not given.
        progress: told how many pairs are done.

    Returns:
        N records, in the order of the pairs.
    """
    processes = Processes(base.device)
    dtype = getattr(torch, trial.eval_dtype) if trial.eval_dtype else base.dtype
    model = load_model(base.source, base.dtype, base.device)
    base_fingerprint = weights_fingerprint(model)
    cast_parameters(model, dtype)
    kernels = kernels or Kernels(model, base.device)
    before = Policy(model, kernels=kernels)
    name = reference_fingerprint(base_fingerprint, before, pairs)
    reference = reference_logps(before, name, pairs, reference_file, processes).to(base.device)
    check_reference(before, pairs, reference)
    head = model.get_output_embeddings()
    base_places = BaseStates(base_states(before, name, pairs, processes), head.weight, head.bias)
    if trial.method == "lora":
        adapted = add_adapters(model, settings_of(trial), [trial.seed])
        load_peft_tensors(adapted, 0, load_file(weights / "adapter_model.safetensors"))
        policy = Policy(model, adapted, kernels=kernels)
    else:
        tuned = load_model(weights, base.dtype, base.device)
        cast_parameters(tuned, dtype)
        policy = Policy(tuned, kernels=kernels)
    policy.train(False)
    records: list[ExampleRecord] = []
    with torch.no_grad():
        rows = processes.share(range(len(pairs)))
        for (scored,) in score_pairs(policy, [trial], pairs, rows, reference, EVALUATION_TOKENS, base=base_places):
            records += scored.records()
            progress(len(records) * processes.count)
    return processes.gather(records)
