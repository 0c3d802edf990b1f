"""The cost of batch invariance: training with the library's products, the chosen ones, and tiles.

    python benchmarks/invariance.py DATA [--pairs 16] [--rounds 3] [--model smollm2-135m] [--dtype bfloat16]

Each round measures `library` (products as PyTorch computes them), `chosen` (what the probe chose for this machine) and
`tiles` (128 rows per product, as needed on machines whose kernels depend on the number of rows, such as AMX), each with
one trial and with four side by side. Prints trial-pairs per second of training and ratios to `library`, and at the end
how much bfloat16 moves a pair's margin.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from engine import prepare

from pairtune.config import TrialConfig
from pairtune.engine import native
from pairtune.engine.kernels import Kernels, Probe
from pairtune.engine.products import PLAIN, Products
from pairtune.engine.trial import TrialInputs, load_start
from pairtune.models.load import blank_model, weights_fingerprint
from pairtune.run.folder import Run
from pairtune.track.sinks import JsonlSink

GRID = ((3e-5, 0.1), (1e-5, 0.1), (3e-5, 0.2), (1e-5, 0.2))


class Fixed(Kernels):
    """Kernels with fixed products instead of probed ones."""

    def __init__(self, products: Products, name: str) -> None:
        self.given = Probe(products, (), name, 0.0)

    def probe(self, dtype: Any) -> Probe:
        return self.given


def train(inputs: TrialInputs, width: int) -> float:
    """Trial-pairs per second of training, over one epoch."""
    trials = [TrialConfig(learning_rate=rate, beta=beta, epochs=1) for rate, beta in GRID[:width]]
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        results = native.run_trials(trials, inputs, run, JsonlSink(run))
    return width * results[0].train_pairs / results[0].train_seconds


def _trials(width: int) -> str:
    return f"{width} trial{'' if width == 1 else 's'}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    base, pairs = prepare(options.data, options.model, options.pairs, options.dtype)
    start = weights_fingerprint(load_start(TrialConfig(learning_rate=1e-5, beta=0.1), base))
    chosen = Kernels(blank_model(base.source), base.device)
    ways = {
        "library": Fixed(PLAIN, "library"),
        "chosen": chosen,
        "tiles": Fixed(Products(tile=128, exact=True), "tiles"),
    }
    print(f"chosen: {chosen.products(base.dtype)}")
    speeds: dict[tuple[str, int], list[float]] = {}
    rounding = None
    for number in range(1, options.rounds + 1):
        for width in (1, len(GRID)):
            for name, kernels in ways.items():
                inputs = TrialInputs(base, start, pairs, pairs[:1], "eval_loss", probed=kernels)
                inputs.base_outputs.rounding = rounding  # measured once
                speed = train(inputs, width)
                rounding = inputs.base_outputs.rounding
                speeds.setdefault((name, width), []).append(speed)
                ratio = speed / speeds["library", width][-1]
                print(f"round {number}: {name}, {_trials(width)}: {speed:.3f} trial-pairs/s ({ratio:.3f})", flush=True)
    for (name, width), found in speeds.items():
        ratios = [a / b for a, b in zip(found, speeds["library", width], strict=True)]
        print(f"{name}, {_trials(width)}: median {statistics.median(found):.3f}, ratio {statistics.median(ratios):.3f}")
    print(f"rounding: {rounding}")


if __name__ == "__main__":
    main()
