"""The prompts of earlier rounds by split, so that a prompt stays in its split in every round.

A model that goes on from a tuned one has seen that one's training prompts, and its held-out prompts show what it has
forgotten: neither may change sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from pairtune.files import write_atomic
from pairtune.run.examples import PairIndex
from pairtune.run.folder import Run

# Hashes of prompts (`splits.Prompt.whole`) by the name of their split.
Earlier = Mapping[str, NDArray[np.uint64]]

_FILE = "prompts.npz"


def prompts_of_round(run: Run) -> Earlier:
    """The prompts of a run and of the rounds before it."""
    own = PairIndex.read(run.paths.pairs).prompts() if run.paths.pairs.is_file() else {}
    before = prompts_before(run)
    return {
        name: np.unique(np.concatenate([np.asarray(each.get(name, []), np.uint64) for each in (own, before)]))
        for name in {*own, *before}
    }


def prompts_before(run: Run) -> Earlier:
    """The prompts of the rounds before a run, of which it keeps a list; empty if there were none."""
    file = run.paths.start / _FILE
    if not file.is_file():
        return {}
    with np.load(file) as found:
        return {name: found[name] for name in found.files}


def keep_prompts(run: Run, earlier: Earlier) -> None:
    """Write the prompts of the rounds before a new run."""
    if earlier:
        content = BytesIO()
        np.savez(content, **earlier)  # type: ignore[arg-type]
        write_atomic(run.paths.start / _FILE, content.getvalue())
