"""How much rounding changes a pair's margin on this machine: measured on a run's first pairs, and recorded with it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from pairtune.data.table import PairTable, TokenIds
from pairtune.engine.packing import Pack
from pairtune.engine.policy import Policy
from pairtune.engine.row_layout import takes_whole_rows
from pairtune.files import user_cache, write_json
from pairtune.models.load import free_bytes
from pairtune.run.records import Rounding

# Number of pairs measured; where products are batch-invariant, two show whether attention is.
_PAIRS, _PAIRS_WHERE_EXACT = 8, 2
# Number of pairs in a long row, at most.
_MOST_PAIRS = 256
# The first step's mean margin may be at most this many times the difference of a pair's margin between rows.
_ROOM = 6.0


def allowed_margin(rounding: Rounding) -> float:
    """How far the mean margin of the first step may be from 0, in nats before beta."""
    return _ROOM * rounding.between_rows


@torch.no_grad()
def measure_rounding(policy: Policy, trials: int, pairs: PairTable, name: str) -> Rounding:
    """Compare the margins of a table's first pairs scored alone, scored together, and scored in float32.

    Args:
        policy: the base model.
        trials: number of trials that will be trained side by side.
        pairs: the pairs, of which the first ones are used.
        name: the fingerprint of model, pairs and kernels, under which the comparison with float32 is cached.
    """
    exact = policy.products.exact and policy.needed_only  # else some of a layer is computed by transformers
    some = pairs.tokens(range(min(len(pairs), _PAIRS_WHERE_EXACT if exact else _PAIRS)))
    alone = [margin for pair in some for margin in _margins(policy, _rows(policy, [pair]))]
    among = Policy(policy.model, trials=trials, kernels=policy.kernels)
    if takes_whole_rows(policy.model.device):
        # Libraries choose among kernels by the number of tokens: a row as long as those of the training.
        many = pairs.tokens(range(min(len(pairs), _MOST_PAIRS)))
        together = _margins(among, [next(policy.rows(many, policy.evaluation_tokens // trials))])
    else:
        together = _margins(among, _rows(policy, some))
    between = _rms(alone[: len(together)], together[: len(alone)])
    dtype = str(policy.model.dtype).removeprefix("torch.")
    return Rounding(
        pairs=len(some),
        dtype=dtype,
        between_rows=between if exact else max(between, _resolution(policy, some)),
        from_float32=_from_float32(policy, pairs, name),
    )


def _resolution(policy: Policy, pairs: Sequence[TokenIds]) -> float:
    """The difference between neighbouring float32 numbers of the size of the pairs' log-probs."""
    largest = max(policy.answer_logps(pack).logps.abs().max().item() for pack in _rows(policy, pairs))
    return torch.finfo(torch.float32).eps * largest


def _from_float32(policy: Policy, pairs: PairTable, name: str) -> float | None:
    if policy.model.dtype == torch.float32:
        return 0.0
    cached = user_cache() / "reference" / f"{name}-rounding.json"
    if cached.is_file():
        return float(json.loads(cached.read_text(encoding="utf-8"))["from_float32"])
    if 4 * sum(each.numel() for each in policy.model.parameters()) > free_bytes(policy.model.device):
        return None
    some = pairs.tokens(range(min(len(pairs), _PAIRS)))
    own = _margins(policy, _rows(policy, some))
    with policy.computing_in(torch.float32):
        exact = _margins(policy, _rows(policy, some))
    found = _rms(own, exact)
    write_json(cached, {"from_float32": found, "pairs": len(some)})
    return found


def _rows(policy: Policy, pairs: Sequence[TokenIds]) -> Iterator[Pack]:
    return policy.rows(pairs, policy.evaluation_tokens)


def _margins(policy: Policy, rows: Iterable[Pack]) -> list[float]:
    """Log-prob of the chosen answer minus that of the rejected one, pair by pair, under the first trial."""
    logps = (policy.answer_logps(pack).logps[0].double().view(-1, 2) for pack in rows)
    return [margin for each in logps for margin in (each[:, 0] - each[:, 1]).tolist()]


def _rms(one: Sequence[float], other: Sequence[float]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one))
