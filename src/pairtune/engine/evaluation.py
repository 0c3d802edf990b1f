"""Saved weights judged on held-out pairs, with the kernels that trained them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from pairtune.config import TrialConfig
from pairtune.data.table import PairTable
from pairtune.engine.divergence import BaseStates, base_states
from pairtune.engine.lora import add_adapters, load_peft_tensors, settings_of
from pairtune.engine.policy import EVALUATION_TOKENS, Policy
from pairtune.engine.processes import Processes
from pairtune.engine.records import ExampleRecord
from pairtune.engine.reference import reference_fingerprint, reference_logps
from pairtune.engine.scoring import score_pairs
from pairtune.models.load import LoadedBase, load_model, weights_fingerprint


def evaluate_weights(
    trial: TrialConfig,
    weights: Path,
    base: LoadedBase,
    pairs: PairTable,
    reference_file: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> list[ExampleRecord]:
    """Records of pairs under weights that a trial has saved.

    Args:
        trial: whose loss and beta count.
        weights: a folder with an adapter, or with a whole model.
        base: that the trial started from.
        pairs: N of them.
        reference_file: where the run keeps the base's log-probs of these pairs.
        progress: told how many pairs are done.

    Returns:
        N records, in the order of the pairs.
    """
    processes = Processes(base.device)
    model = load_model(base.source, base.dtype, base.device)
    name = reference_fingerprint(weights_fingerprint(model), base.device, base.dtype, pairs)
    reference = reference_logps(lambda: Policy(model), name, pairs, reference_file, processes).to(base.device)
    head = model.get_output_embeddings()
    base_places = BaseStates(base_states(lambda: Policy(model), name, pairs, processes), head.weight, head.bias)
    if trial.method == "lora":
        adapted = add_adapters(model, settings_of(trial), [trial.seed])
        load_peft_tensors(adapted, 0, load_file(weights / "adapter_model.safetensors"))
        policy = Policy(model, adapted)
    else:
        policy = Policy(load_model(weights, base.dtype, base.device))
    policy.train(False)
    records: list[ExampleRecord] = []
    with torch.no_grad():
        rows = processes.share(range(len(pairs)))
        for (scored,) in score_pairs(policy, [trial], pairs, rows, reference, EVALUATION_TOKENS, base=base_places):
            records += scored.records()
            progress(len(records) * processes.count)
    return processes.gather(records)
