"""Work that is repeated in smaller pieces when memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from pairtune.errors import RunFailed

R = TypeVar("R")

# Rows are not made shorter than this: nearly all pairs are longer, and a pair is never divided.
LEAST_TOKENS = 32


def in_smaller_rows(work: Callable[[int], R], tokens: int, told: Callable[[int], None]) -> R:
    """Do some work, with rows half as long each time that memory runs out.

    Args:
        work: gets the most tokens of a row. It may be called again after it was cut off anywhere.
        tokens: the most tokens of a row at first.
        told: called with the new number before each repetition.

    Raises:
        RunFailed: memory runs out with the shortest rows.
    """
    while True:
        try:
            return work(tokens)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if tokens <= LEAST_TOKENS:
                raise RunFailed(
                    "memory ran out with one pair at a time; lower --max-length or --side-by-side, use --checkpointing "
                    "on, close other programs, or choose a smaller model (`pairtune plan` says what fits)"
                ) from error
        # Only here is the error gone, and with it the tensors that its frames held.
        tokens = max(LEAST_TOKENS, tokens // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        told(tokens)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a device, or this machine, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
