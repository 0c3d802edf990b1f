"""Reference log-probs: computed once per base model and set of pairs, and cached.

They depend only on weights, tokens and kernels, not on learning rate, beta, loss, epochs or seed, so that all trials
and epochs, and resumed and later runs, share them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from pairtune.data.table import PairTable
from pairtune.engine.kernels import Kernels
from pairtune.engine.lora import LoraSettings, add_adapters, load_adapter
from pairtune.engine.policy import Policy
from pairtune.engine.processes import Processes
from pairtune.engine.row_layout import takes_whole_rows
from pairtune.errors import RunFailed
from pairtune.files import fingerprint, saved_fingerprint, user_cache, write_atomic
from pairtune.models.load import LoadedBase, load_model

# Version of the engine's arithmetic: bumped whenever a change alters the last bits of log-probs.
_ARITHMETIC = "4"
_TABLE_ROWS = 256
# The first pairs, up to this many tokens, get a row of their own, which can be recomputed to the same bits.
_WITNESS_TOKENS = 512
# Entries of a model's configuration that do not affect its outputs.
_IGNORED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def open_reference(
    base: LoadedBase, model: PreTrainedModel, lora: LoraSettings, kernels: Kernels | None = None
) -> Policy:
    """The model that policies are measured against, ready for log-probs.

    Args:
        base: the base model of the run.
        model: its loaded weights. If they are the reference's, they are used: with an adapter added, if it has one.
        lora: the settings of that adapter.
        kernels: how products are computed on this machine.

    Raises:
        BadInput: another model is the reference, and cannot be loaded.
    """
    if base.reference and base.reference.folder != base.source.folder:
        other = load_model(base.reference, model.dtype, base.device, packed=True)
        return Policy(other, kernels=kernels)
    if base.reference_adapter is None:
        return Policy(model, kernels=kernels)
    adapted = add_adapters(model, lora, [0])  # its initial values are replaced at once
    load_adapter(adapted, base.reference_adapter)
    policy = Policy(model, adapted, kernels=kernels)
    policy.train(False)
    return policy


def fingerprint_of_reference(base: LoadedBase, base_fingerprint: str) -> str:
    """Fingerprint of the weights that policies are measured against.

    Args:
        base: the base model of the run.
        base_fingerprint: that of its whole weights; see `models.load.weights_fingerprint`.
    """
    if base.reference and base.reference.folder != base.source.folder:
        return fingerprint([saved_fingerprint(base.reference.folder), str(base.dtype)])
    adapter = base.reference_adapter
    return f"{base_fingerprint}+{saved_fingerprint(adapter)}" if adapter else base_fingerprint


def reference_fingerprint(base_fingerprint: str, policy: Policy, pairs: PairTable) -> str:
    """Fingerprint of everything that reference log-probs depend on, down to the last bit.

    It has two parts: the weights, their configuration and the pairs; and how the log-probs are computed.
    """
    model, dtype = policy.model, policy.model.dtype
    config = {name: value for name, value in model.config.to_dict().items() if name not in _IGNORED}
    settings = json.dumps(config, sort_keys=True, default=str)
    bits = policy.kernels.probe(dtype).bits if policy.kernels else ""
    versions = (torch.__version__, transformers.__version__)
    rows = "whole" if takes_whole_rows(policy.model.device) else "packed"
    how = (_ARITHMETIC, *versions, str(dtype), rows if policy.packed else "padded", bits)
    return f"{fingerprint([base_fingerprint, settings, pairs.ids_fingerprint()])}-{fingerprint(how)}"


def reference_logps(
    policy: Policy,
    name: str,
    pairs: PairTable,
    run_file: Path,
    processes: Processes,
    on_progress: Callable[[int], None] = lambda done: None,
    max_tokens: int | None = None,
) -> Tensor:
    """The reference log-probs of pairs, from the run folder, from the user cache, or newly computed.

    A run resumed on a machine whose kernels give other bits recomputes them: policy and reference must use the same
    kernels.

    Args:
        policy: the base model.
        name: the fingerprint, see `reference_fingerprint`.
        pairs: N of them.
        run_file: the run's own copy.
        processes: the processes that share the work; the first one reads and writes.
        on_progress: called with the number of pairs done.
        max_tokens: the most tokens of a row; by default those of an evaluation.

    Returns:
        [N, 2], float32: chosen and rejected.

    Raises:
        RunFailed: the run's copy belongs to other weights or pairs.
    """
    cached = user_cache() / "reference" / f"{name}.safetensors"
    result = processes.from_first(_find(run_file, cached, name, len(pairs)) if processes.first else None)
    if result is None:
        result = compute_logps(policy, pairs, processes, on_progress, max_tokens)
        if processes.first:
            _write(cached, name, result)
    if processes.first and _name_of(run_file) != name:
        _write(run_file, name, result)
    return result


def _find(run_file: Path, cached: Path, name: str, pairs: int) -> Tensor | None:
    known = _name_of(run_file)
    if known is not None and (known == name or known.partition("-")[0] != name.partition("-")[0]):
        return load_reference(run_file, name, pairs)
    try:
        return load_reference(cached, name, pairs)
    except (RunFailed, OSError):
        return None


def _name_of(run_file: Path) -> str | None:
    """The fingerprint of a run's own copy; None if there is no copy, or an older engine wrote it."""
    if not run_file.is_file():
        return None
    try:
        with safe_open(run_file, framework="pt") as file:
            found = (file.metadata() or {}).get("fingerprint", "")
    except SafetensorError:
        return "damaged"
    return found if "-" in found else None


@torch.no_grad()
def compute_logps(
    policy: Policy,
    pairs: PairTable,
    processes: Processes,
    on_progress: Callable[[int], None] = lambda done: None,
    max_tokens: int | None = None,
) -> Tensor:
    """Log-probs of all pairs under a policy's first trial, [N, 2]; see `reference_logps`."""
    max_tokens = max_tokens or policy.evaluation_tokens
    first = witness(policy, pairs)
    results: list[list[float]] = []
    shard = processes.shard(range(len(first), len(pairs)))
    for start in range(0, len(shard), _TABLE_ROWS):
        for pack in policy.rows(pairs.tokens(shard[start : start + _TABLE_ROWS]), max_tokens):
            results += policy.answer_logps(pack).logps[0].view(-1, 2).tolist()
            on_progress(len(first) + len(results) * processes.count)
    rest = torch.tensor(processes.gather(results), dtype=torch.float32).view(-1, 2)
    return torch.cat([first, rest])


@torch.no_grad()
def witness(policy: Policy, pairs: PairTable) -> Tensor:
    """Log-probs of the first few pairs in a row of their own, [some, 2]: the same bits at every computation."""
    pack = next(policy.rows(pairs.tokens(range(min(len(pairs), _TABLE_ROWS))), _WITNESS_TOKENS), None)
    if pack is None:
        return torch.zeros(0, 2)
    return policy.answer_logps(pack).logps[0].view(-1, 2).float().cpu()


def check_reference(policy: Policy, pairs: PairTable, reference: Tensor) -> None:
    """Check that these are the base model's own log-probs.

    The first pairs are recomputed in the same row as for the reference, so that only nondeterminism of the machine may
    change them; that is measured by computing them twice.

    Args:
        policy: the base model.
        pairs: N of them.
        reference: [N, 2].

    Raises:
        RunFailed: they belong to another model or to other pairs.
    """
    if not len(pairs):
        return
    once, again = witness(policy, pairs), witness(policy, pairs)
    apart, allowed = (once - reference[: len(once)].cpu()).abs().max().item(), 4 * (once - again).abs().max().item()
    if not apart <= allowed:
        raise RunFailed(
            f"the reference log-probs are not this base model's: recomputed in the same row, those of the first "
            f"pairs ({len(once)} compared) differ by up to {apart:.6f} nats, while computing them twice changes them "
            f"by {allowed / 4:.6f}; remove the run's reference folder, or start a new run"
        )


def load_reference(path: Path, name: str, pairs: int) -> Tensor:
    """Read a file of reference log-probs.

    Raises:
        OSError: there is no such file.
        RunFailed: it is damaged, or its fingerprint is not `name`.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="pt") as file:
            found, result = (file.metadata() or {}).get("fingerprint"), file.get_tensor("logps")
    except (SafetensorError, KeyError) as error:
        raise RunFailed(f"{path}: the reference log-probs are damaged; remove the file to recompute them") from error
    if found != name or result.shape != (pairs, 2):
        raise RunFailed(
            f"{path}: these reference log-probs ({found}) belong to another model or other pairs than this run's "
            f"({name}); start a new run, or remove the file to recompute them"
        )
    logps: Tensor = result
    return logps


def _write(path: Path, name: str, logps: Tensor) -> None:
    write_atomic(path, save({"logps": logps.contiguous()}, metadata={"fingerprint": name}))
