"""The assignment's grid: four trials of three epochs side by side, against the same trials one after another.

    python benchmarks/grid.py DATA [--pairs 64] [--held-out 32] [--model smollm2-135m]

DATA is a file of pairs. Measures, one after another and each in its own process:

- trl:      one epoch of one trial with TRL's DPOTrainer and its defaults (float32, batch 2), with evaluation
- trl-best: the same with its fastest flags on a CPU, see engine.py
- one:      one trial with `--engine pairtune`, three epochs, everything in `run_trials`: reference log-probs,
            training, evaluations, saving
- grid:     the assignment's four trials (learning rates 3e-5 and 1e-5, beta 0.1 and 0.2) in lockstep, the same way

TRL's grid is taken as twelve times its epoch, since every epoch of every trial is the same work. Its other work is not
counted: loading the model four times, saving, and (trl-best) the reference log-probs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine import prepare, train_trl

RUNS = ("trl", "trl-best", "one", "grid")
EPOCHS = 3


def train_ours(asked: argparse.Namespace, betas: tuple[float, ...], rates: tuple[float, ...]) -> dict[str, Any]:
    """Train trials in lockstep, starting from the tokenized pairs, with an empty cache."""
    from pairtune.config import TrialConfig
    from pairtune.engine import native
    from pairtune.engine.trial import TrialInputs, load_start
    from pairtune.files import user_cache
    from pairtune.models.load import weights_fingerprint
    from pairtune.run.folder import Run
    from pairtune.track.sinks import JsonlSink

    base, pairs = prepare(asked.data, asked.model, asked.pairs + asked.held_out, "auto")
    train, held_out = pairs[: asked.pairs], pairs[asked.pairs :]
    trials = [TrialConfig(learning_rate=rate, beta=beta, epochs=EPOCHS) for beta in betas for rate in rates]
    with tempfile.TemporaryDirectory() as folder:
        models = user_cache() / "models"
        (Path(folder) / "models").symlink_to(models)
        os.environ["PAIRTUNE_CACHE"] = folder  # reference log-probs are computed, not read from a cache
        started = time.perf_counter()
        inputs = TrialInputs(base, weights_fingerprint(load_start(trials[0], base)), train, held_out, "eval_loss")
        run = Run(Path(folder) / "run")
        results = native.run_trials(trials, inputs, run, JsonlSink(run))
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "training": results[0].train_seconds}


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    if asked.measure == "grid":
        result = train_ours(asked, (0.1, 0.2), (3e-5, 1e-5))
    elif asked.measure == "one":
        result = train_ours(asked, (0.1,), (3e-5,))
    else:
        best = asked.measure == "trl-best"
        result = train_trl(asked.data, asked.model, asked.pairs, "lora", best=best, held_out=asked.held_out)
        del result["losses"]
    result = {name: round(seconds, 1) for name, seconds in result.items()}
    return result | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def run(what: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Run one measurement in its own process."""
    command = [sys.executable, __file__, str(asked.data), "--measure", what, "--model", asked.model]
    command += ["--pairs", str(asked.pairs), "--held-out", str(asked.held_out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{what:9}", json.dumps(result), flush=True)
    return result


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("data", type=Path)
    cli.add_argument("--pairs", type=int, default=64)
    cli.add_argument("--held-out", type=int, default=32)
    cli.add_argument("--model", default="smollm2-135m")
    cli.add_argument("--measure", choices=RUNS, help=argparse.SUPPRESS)
    asked = cli.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked)))
        return
    trl, best, one, grid = (run(what, asked) for what in RUNS)
    print(
        f"the grid: {4 * EPOCHS * trl['seconds'] / grid['seconds']:.1f} times as fast as TRL, "
        f"{4 * EPOCHS * best['seconds'] / grid['seconds']:.1f} times as fast as TRL at its best; against one trial: "
        f"{grid['seconds'] / one['seconds']:.2f} times the time ({grid['training'] / one['training']:.2f} for training "
        f"alone), {grid['peak_mb'] / one['peak_mb']:.2f} times the memory"
    )


if __name__ == "__main__":
    main()
