"""Reference log-probs: computed once for a base model and a set of pairs, and kept.

They depend on weights, tokens and kernels only, not on learning rate, beta, loss, epochs or seed, so that all trials,
epochs, resumed and later runs share them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pairtune.data.table import PairTable
from pairtune.engine.policy import EVALUATION_TOKENS, Policy
from pairtune.engine.processes import Processes
from pairtune.errors import RunFailed
from pairtune.runs import fingerprint, user_cache, write_atomic

# Other kernels, other last bits: changed whenever the engine's arithmetic changes.
_KERNELS = "2"
_TABLE_ROWS = 256


def reference_fingerprint(base_fingerprint: str, device: torch.device, dtype: torch.dtype, pairs: PairTable) -> str:
    """Of everything that reference log-probs depend on, down to the last bit."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    how = (_KERNELS, torch.__version__, device.type, machine, str(dtype))
    return fingerprint([base_fingerprint, *how, pairs.ids_fingerprint()])


def reference_logps(
    policy: Callable[[], Policy],
    name: str,
    pairs: PairTable,
    run_file: Path,
    processes: Processes,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """The reference log-probs of pairs, from the run folder, from the user cache, or computed.

    Args:
        policy: opens the base model; only called when there is something to compute.
        name: the fingerprint, see `reference_fingerprint`.
        pairs: N of them.
        run_file: the run's own copy.
        processes: that share the work; the first one reads and writes.
        progress: told how many pairs are done.

    Returns:
        [N, 2], float32: chosen and rejected.

    Raises:
        RunFailed: the run's copy belongs to other weights, pairs or kernels.
    """
    cached = user_cache() / "reference" / f"{name}.safetensors"
    result = processes.from_first(_find(run_file, cached, name, len(pairs)) if processes.first else None)
    if result is None:
        result = compute_logps(policy(), pairs, processes, progress)
        if processes.first:
            _write(cached, name, result)
    if processes.first and not run_file.is_file():
        _write(run_file, name, result)
    return result


def _find(run_file: Path, cached: Path, name: str, pairs: int) -> Tensor | None:
    if run_file.is_file():
        return load_reference(run_file, name, pairs)
    try:
        return load_reference(cached, name, pairs)
    except (RunFailed, OSError):
        return None


@torch.no_grad()
def compute_logps(
    policy: Policy, pairs: PairTable, processes: Processes, progress: Callable[[int], None] = lambda done: None
) -> Tensor:
    """Log-probs of all pairs under a policy's first trial, [N, 2]."""
    results: list[list[float]] = []
    share = processes.share(range(len(pairs)))
    for start in range(0, len(share), _TABLE_ROWS):
        for pack in policy.rows(pairs.tokens(share[start : start + _TABLE_ROWS]), EVALUATION_TOKENS):
            results += policy.answer_logps(pack).logps[0].view(-1, 2).tolist()
            progress(len(results) * processes.count)
    return torch.tensor(processes.gather(results), dtype=torch.float32).view(-1, 2)


def load_reference(path: Path, name: str, pairs: int) -> Tensor:
    """Read a file of reference log-probs.

    Raises:
        OSError: there is no such file.
        RunFailed: it is damaged, or belongs to something else than `name` says.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="pt") as file:
            found, result = (file.metadata() or {}).get("fingerprint"), file.get_tensor("logps")
    except (SafetensorError, KeyError) as error:
        raise RunFailed(f"{path}: the reference log-probs are damaged; remove the file to compute them anew") from error
    if found != name or result.shape != (pairs, 2):
        raise RunFailed(
            f"{path}: these reference log-probs ({found}) are of another model, other pairs or another machine than "
            f"this run's ({name}); start a new run, or remove the file to compute them anew"
        )
    logps: Tensor = result
    return logps


def _write(path: Path, name: str, logps: Tensor) -> None:
    write_atomic(path, save({"logps": logps.contiguous()}, metadata={"fingerprint": name}))
