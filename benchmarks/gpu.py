"""Training on a GPU: this project's engine against TRL on the same pairs, for a model of Qwen2-0.5B's shape.

    python benchmarks/gpu.py DATA [--tokenizer smollm2-135m] [--pairs 64] [--only trl-best one four]

DATA is a file of pairs. The model has random weights, which take the same time as trained ones. Each of these runs in
its own process, one after another, in bfloat16, LoRA r=16 on every linear layer, batch 2 unless it says otherwise:

- limit:      bfloat16 matrix products of the model's sizes
- trl:        TRL's DPOTrainer with its defaults
- trl-best:   with reference log-probs precomputed (not counted), no checkpointing, the model's weights in bfloat16
- trl-liger:  the same with Liger's kernels, which compute the loss in chunks, if they are installed
- one:        `--engine pairtune`, one trial
- four:       four trials side by side
- large:      one trial with a batch of 64 pairs
- long:       one trial and pairs of 1,024 tokens: the assignment's largest batch
- full:       all weights, batch 2

Prints pairs per second from the second half of the steps, when kernels have been chosen and compiled; the seconds of
all steps; the memory that tensors take at the peak, and that of the card in all; and the ratios. Useful work is counted
as in engine.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine import prepare, train_trl, useful_work

RUNS = ("limit", "trl", "trl-best", "trl-liger", "one", "four", "large", "long", "full")
RATIOS = {
    "times TRL": ("one", "trl"),
    "times TRL at its best": ("one", "trl-best"),
    "times TRL with Liger": ("one", "trl-liger"),
    "time of four trials, times that of one": ("one", "four"),
}
RATES = (3e-5, 1e-5, 2e-5, 5e-6)
BATCH, LARGE = 2, 64
LONG = 1024
# The engine gets more pairs, since it is faster, and since each length of rows takes a while when it comes first.
_MORE = 8


def save_model(folder: Path, tokenizer: str) -> None:
    """A model of Qwen2-0.5B's shape with random weights, and a tokenizer of a smaller vocabulary."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from pairtune.models.resolve import resolve_model

    known = Path(tokenizer) if Path(tokenizer).is_dir() else resolve_model(tokenizer).folder
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(known).save_pretrained(folder)


def train_ours(
    asked: argparse.Namespace, *, trials: int = 1, batch: int = BATCH, method: str = "lora"
) -> dict[str, Any]:
    """Train with the engine, through the same function that `pairtune tune` calls."""
    import torch

    from pairtune.config import TrialConfig
    from pairtune.data.table import PairTable, TokenIds
    from pairtune.engine import native
    from pairtune.engine.trial import TrialInputs, load_start
    from pairtune.models.load import weights_fingerprint
    from pairtune.run.folder import Run
    from pairtune.track.sinks import Sink

    stamps: list[float] = []

    class _Stretched(PairTable):
        """The same pairs, repeated or cut so that each answer with its prompt has exactly `LONG` tokens."""

        def tokens(self, rows: Any) -> list[TokenIds]:
            return [TokenIds(*((part * LONG)[: LONG // 2] for part in pair)) for pair in super().tokens(rows)]

    class Stamps(Sink):
        def log(self, trial: str, line: Any) -> None:
            stamps.append(time.perf_counter())

    pairs = asked.pairs * _MORE if batch == BATCH else 16 * batch
    base, train = prepare(asked.data, str(asked.model), pairs, "bfloat16")
    if asked.measure == "long":
        train = _Stretched(train._table, train._rows)
    config = [
        TrialConfig(learning_rate=rate, beta=0.1, epochs=1, method=method, batch_size=batch) for rate in RATES[:trials]
    ]
    inputs = TrialInputs(base, weights_fingerprint(load_start(config[0], base)), train, train[:1], "eval_loss")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PAIRTUNE_CACHE"] = folder  # reference log-probs are computed, not read from a cache
        torch.cuda.reset_peak_memory_stats()
        results = native.run_trials(config, inputs, Run(Path(folder)), Stamps())
    steps = [stamps[number] for number in range(trials - 1, len(stamps), trials)][: len(train) // batch]
    work = useful_work(base, train.tokens(range(len(train))), method) / len(train)
    return {"seconds": results[0].train_seconds, "steps": steps, "work": work, "batch": batch}


def train_theirs(asked: argparse.Namespace, **flags: Any) -> dict[str, Any]:
    """Train with TRL's trainer."""
    from transformers import TrainerCallback

    stamps: list[float] = []

    class Stamps(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            import torch

            torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    best = asked.measure != "trl"
    result = train_trl(
        asked.data, str(asked.model), asked.pairs, "lora", best=best, batch=BATCH, callbacks=[Stamps()], **flags
    )
    return {"seconds": result["seconds"], "steps": stamps, "batch": BATCH}


def measure_limit() -> dict[str, Any]:
    """TFLOP/s of bfloat16 matrix products of the model's sizes."""
    import torch

    rates = {}
    for tokens in (1024, 16_384):
        work = seconds = 0.0
        for inputs, outputs in ((896, 896), (896, 4864), (4864, 896)):
            x = torch.randn(tokens, inputs, dtype=torch.bfloat16, device="cuda")
            weights = torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda")
            for rounds in (10, 100):
                torch.cuda.synchronize()
                started = time.perf_counter()
                for _ in range(rounds):
                    torch.nn.functional.linear(x, weights)
                torch.cuda.synchronize()
            seconds += time.perf_counter() - started
            work += 100 * 2 * tokens * inputs * outputs
        rates[str(tokens)] = round(work / seconds / 1e12)
    return rates


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    import torch

    what = asked.measure
    if what == "limit":
        return measure_limit()
    before = torch.cuda.mem_get_info()[0]
    if what.startswith("trl"):
        flags = {"gradient_checkpointing": True, "bf16": True} if what == "trl" else {}
        result = train_theirs(asked, **flags, use_liger_kernel=what == "trl-liger")
    else:
        settings: dict[str, dict[str, Any]] = {
            "four": {"trials": 4},
            "large": {"batch": LARGE},
            "full": {"method": "full"},
        }
        result = train_ours(asked, **settings.get(what, {}))
    steps = result.pop("steps")
    half = len(steps) // 2
    rate = (len(steps) - 1 - half) * result["batch"] / (steps[-1] - steps[half])
    shown = {"pairs_per_second": round(rate, 2), "seconds": round(result["seconds"], 1)}
    if "work" in result:
        shown["tflops"] = round(result["work"] * rate / 1e12, 1)
    tensors, card = torch.cuda.max_memory_allocated(), before - torch.cuda.mem_get_info()[0]
    return shown | {"tensors_mb": tensors >> 20, "card_mb": card >> 20}


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("data", type=Path)
    cli.add_argument("--tokenizer", default="smollm2-135m", help="a model whose tokenizer is used")
    cli.add_argument("--pairs", type=int, default=64)
    cli.add_argument("--only", nargs="+", choices=RUNS, default=RUNS)
    cli.add_argument("--measure", choices=RUNS, help=argparse.SUPPRESS)
    cli.add_argument("--model", type=Path, help="a folder of a model to use instead")
    asked = cli.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked)))
        return
    import torch

    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = asked.model or Path(folder)
        if not any(model.iterdir()):
            save_model(model, asked.tokenizer)
        for what in asked.only:
            command = [sys.executable, __file__, str(asked.data), "--measure", what, "--model", str(model)]
            done = subprocess.run([*command, "--pairs", str(asked.pairs)], check=False, stdout=subprocess.PIPE)
            if done.returncode:
                print(f"{what:10} failed", flush=True)
                continue
            found[what] = json.loads(done.stdout.splitlines()[-1])
            print(f"{what:10}", json.dumps(found[what]), flush=True)
    rates = {what: result["pairs_per_second"] for what, result in found.items() if what != "limit"}
    for name, (one, other) in RATIOS.items():
        if one in rates and other in rates:
            print(f"{name}: {rates[one] / rates[other]:.2f}")
    if {"limit", "large"} <= found.keys():
        print(f"share of the matrix rate, batch {LARGE}: {found['large']['tflops'] / found['limit']['16384']:.0%}")


if __name__ == "__main__":
    main()
