"""How far a tuned model is from its base: the KL divergence at some places of held-out answers.

It needs both models' distributions over the whole vocabulary. The base's last hidden states are computed once for a set
of pairs and kept, so that an evaluation costs one more product with the head at these places, and no pass of the base.
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
from pairtune.engine.policy import EVALUATION_TOKENS, Policy
from pairtune.engine.processes import Processes
from pairtune.files import user_cache, write_atomic

# Pairs that are looked at: enough for a mean, and their states stay small (512 pairs of a 135M model are 9 MB).
PAIRS = 512


@dataclass(frozen=True)
class BaseStates:
    """The base at some places of the answers of the first pairs of a table.

    Attributes:
        states: last hidden states, [pairs, 2 * STATES, size]; first those of the chosen answer.
        head: [vocabulary, size], the base's output embedding.
        bias: [vocabulary], or None.
    """

    states: Tensor
    head: Tensor
    bias: Tensor | None

    def kl(self, policy: Policy, states: Tensor, rows: list[int]) -> Tensor:
        """KL(policy || base) per token, in nats: the mean over a pair's places.

        Args:
            policy: whose head is used.
            states: the policy's, [pairs, 2 * STATES, size].
            rows: the pairs' numbers.

        Returns:
            [pairs]; NaN for pairs that have no states.
        """
        result = torch.full((len(rows),), torch.nan, device=states.device)
        known = [place for place, row in enumerate(rows) if row < len(self.states)]
        if known:
            base = self.states[[rows[place] for place in known]].to(states.device)
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
    """The states that `BaseStates` holds, from the user cache or computed.

    Args:
        policy: the base, without adapters.
        name: the fingerprint of weights, pairs and kernels, see `reference.reference_fingerprint`.
        pairs: of which the first ones are taken.
        processes: that share the work.
        on_progress: told how many pairs are done.

    Returns:
        [pairs, 2 * STATES, size]
    """
    cached = user_cache() / "reference" / f"{name}-states.safetensors"
    states = processes.from_first(_find(cached) if processes.first else None)
    if states is None:
        found: list[Tensor] = []
        rows = processes.shard(range(min(PAIRS, len(pairs))))
        for pack in policy.rows(pairs.tokens(rows), EVALUATION_TOKENS):
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
