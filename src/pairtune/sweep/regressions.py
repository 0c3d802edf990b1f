"""Held-out pairs on which tuning hurt: those on which the winner moved towards the rejected answer."""

from __future__ import annotations

from pairtune.data.table import PairTable
from pairtune.run.examples import Examples
from pairtune.run.records import RegressedPair, Regressions

MOST = 8  # enough to see what they have in common; the site shows all of them


def find_regressions(split: str, pairs: PairTable, examples: Examples) -> Regressions:
    """The pairs with the lowest negative reward margins.

    Args:
        split: the split's name.
        pairs: the split's pairs.
        examples: the winner's evaluation of these pairs, in the same order.
    """
    margins = examples.metric("rewards/margins")
    worst = [int(row) for row in margins.argsort(kind="stable") if margins[row] < 0]
    found = []
    for row in worst[:MOST]:
        pair = pairs[row]
        found.append(
            RegressedPair(
                origin=pair.origin,
                margin=float(margins[row]),
                prompt=list(pair.prompt),
                chosen=pair.chosen,
                rejected=pair.rejected,
            )
        )
    return Regressions(split=split, pairs=found, count=len(worst), of=len(pairs))
