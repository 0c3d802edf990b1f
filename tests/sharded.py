"""Full fine-tuning as tests/test_sharding.py compares it: started by torchrun, or called in a single process.

Each case is a run in a folder of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from conftest import make_pair
from torch.distributed.tensor import DTensor

from pairtune.config import TrialConfig
from pairtune.data.table import PairTable
from pairtune.engine import native, sharding
from pairtune.engine.trial import TrialInputs, load_start
from pairtune.errors import Interrupted
from pairtune.models.load import LoadedBase, load_tokenizer, weights_fingerprint
from pairtune.models.resolve import resolve_model
from pairtune.run.folder import Run
from pairtune.track.sinks import JsonlSink, Sink

# By name: the trial's settings, and after how many lines of its log it is interrupted.
CASES: dict[str, tuple[dict, int | None]] = {
    "plain": ({}, None),
    "uneven": (
        {"batch_size": 5, "row_tokens": 16},
        None,
    ),  # one pair a row, three for one process and two for the other
    "checkpointing": ({"checkpointing": "on"}, None),
    "bfloat16": ({"dtype": "bfloat16"}, None),
    "kto": ({"loss": "kto", "batch_size": 5}, None),
    "one held out": ({"batch_size": 5}, None),  # for two processes
    "failing": ({"learning_rate": 1e25}, None),
    "stopped": ({"batch_size": 3}, 5),
}


class Counting(JsonlSink):
    """Counts the lines of the log."""

    lines = 0

    def log(self, *arguments) -> None:
        super().log(*arguments)
        self.lines += 1


def trial(**changes) -> TrialConfig:
    settings = {"learning_rate": 1e-3, "beta": 0.1, "epochs": 2, "dtype": "float32", "method": "full"}
    return TrialConfig(**settings | changes)


def run_case(name: str, model: Path, folder: Path, stop: int | None = None) -> native.TrialRecord:
    """Train a case's trial in a run's folder, or what is left of it, until so many lines are logged or to its end."""
    config = trial(**CASES[name][0])
    source = resolve_model(str(model))
    base = LoadedBase(source, load_tokenizer(source), getattr(torch, config.dtype), torch.device("cpu"))
    tables = []
    for numbers in (range(9), range(20, 21 if name == "one held out" else 25)):
        pairs = [make_pair(number, rejected="No {0}" * (number % 3 + 1)) for number in numbers]
        halves = [pair.halves()[at % 3 == 0] for at, pair in enumerate(pairs)]
        tables.append(PairTable.of(halves if config.loss == "kto" else pairs, base.tokenizer))
    run = Run(folder)
    sink = Counting(run)
    inputs = TrialInputs(
        base,
        weights_fingerprint(load_start(config, base)),
        *tables,
        "eval_loss",
        checkpoint_steps=1,
        stopping=lambda: sink.lines == stop,
    )
    (result,) = native.run_trials([config], inputs, run, sink if inputs.processes.first else Sink())
    return result


def main(model: Path, out: Path, names: Iterable[str]) -> None:
    """Run cases, and write what share of the weights each process held."""
    held: dict[str, list[int]] = {}
    divide = sharding.ShardedWeights.__init__

    def observed(self: sharding.ShardedWeights, *arguments) -> None:
        divide(self, *arguments)
        assert all(isinstance(each, DTensor) for each in self.tensors)
        held[name] = [sum(each.to_local().numel() for each in self.tensors), sum(each.numel() for each in self.tensors)]

    sharding.ShardedWeights.__init__ = observed
    for name in names:
        begun = Run(out / name).paths.checkpoint.is_file()
        try:
            run_case(name, model, out / name, None if begun else CASES[name][1])
        except Interrupted:
            assert not begun
    rank = torch.distributed.get_rank()
    (out / f"held-{rank}.json").write_text(json.dumps(held))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","))
