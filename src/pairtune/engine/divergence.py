"""How far a tuned model is from its base model: the KL divergence at some positions of held-out answers.

It needs both models' distributions over the whole vocabulary. The base model's last hidden states are computed once for
a set of pairs and cached, so that an evaluation costs one more product with the head at these positions, and no forward
pass of the base model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pairtune.data.table import PairTable
from pairtune.engine.logps import token_kl
from pairtune.engine.policy import Policy
from pairtune.engine.processes import Processes
from pairtune.files import user_cache, write_atomic

# Number of pairs measured: enough for a mean, and their states stay small (512 pairs of a 135M model take 9 MB).
PAIRS = 512


@dataclass(frozen=True)
class BaseStates:
    """The base model's hidden states at some positions of the answers, for the first pairs of a table.

    Attributes:
        states: last hidden states, [pairs, 2 * STATES, size]; those of the chosen answer come first.
        head: [vocabulary, size], the base model's output embedding.
        bias: [vocabulary], or None.
    """

    states: Tensor
    head: Tensor
    bias: Tensor | None

    def kl(self, policy: Policy, states: Tensor, rows: list[int]) -> Tensor:
        """KL(policy || base) per token, in nats: the mean over a pair's positions.

        Args:
            policy: the policy, for its head.
            states: the policy's last hidden states, [pairs, 2 * STATES, size], or those at its first positions.
            rows: row numbers of the pairs.

        Returns:
            [pairs]; NaN for pairs without base states.
        """
        result = torch.full((len(rows),), torch.nan, device=states.device)
        known = [index for index, row in enumerate(rows) if row < len(self.states)]
        if known:
            # The head of divided weights is whole here, as each pass without gradients leaves it.
            base = self.states[[rows[index] for index in known], : states.shape[1]].to(states.device)
            kl = token_kl(
                (states[known].flatten(0, 1), policy.head.weight, policy.head.bias),
                (base.flatten(0, 1), self.head, self.bias),
                softcap=policy.softcap,
                products=policy.products,
            )
            result[known] = kl.view(len(known), -1).mean(1)
        return result


@torch.no_grad()
def base_states(
    policy: Policy,
    name: str,
    pairs: PairTable,
    processes: Processes,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """The hidden states for `BaseStates`, from the user cache or newly computed.

    Args:
        policy: the base model, without adapters.
        name: the fingerprint of weights, pairs and kernels, see `reference.reference_fingerprint`.
        pairs: the pairs, of which the first `PAIRS` are used.
        processes: the processes that share the work.
        on_progress: called with the number of pairs done.

    Returns:
        [pairs, 2 * STATES, size]
    """
    cached = user_cache() / "reference" / f"{name}-states.safetensors"
    states = processes.from_first(_find(cached) if processes.first else None)
    if states is None:
        found: list[Tensor] = []
        rows = processes.shard(range(min(PAIRS, len(pairs))))
        for pack in policy.rows(pairs.tokens(rows), policy.evaluation_tokens):
            found += policy.answer_logps(pack, keep_states=True).states[0].cpu()
            on_progress(len(found) * processes.count)
        states = torch.stack(processes.gather(found))
        if processes.first:
            write_atomic(cached, save({"states": states.contiguous()}))
    return states


def _find(path: Path) -> Tensor | None:
    try:
        with safe_open(path, framework="pt") as file:
            states: Tensor = file.get_tensor("states")
            return states
    except (OSError, SafetensorError):
        return None
