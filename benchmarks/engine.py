"""Training: this project's engine against TRL on the same real pairs.

    python benchmarks/engine.py DATA [--pairs 32] [--rounds 2] [--full] [--model smollm2-135m]

DATA is a file of pairs. Each round measures, one after another and each in its own process:

- trl:      TRL's DPOTrainer with its defaults: float32, reference log-probs recomputed at every step, batch 2
- trl-best: its fastest flags on a CPU: reference log-probs precomputed (not counted), batch 1, and weights in bfloat16
            where this machine multiplies it faster than float32
- pairtune: `--engine pairtune` with its defaults: batch 2, the same dtype (reference log-probs not counted either)
- limit:    matrix products of the model's sizes in that dtype, at 512 and 2,048 tokens

All train LoRA r=16 on every linear layer (--full: all weights), from the same adapters, on the same pairs in the same
order. Prints training pairs per second, peak memory of the process, the ratios of each round, the engine's useful work
per second as a share of the machine's matrix rate, and how much its losses differ from TRL's.

Useful work of a pair: 2 operations per weight of the linear layers and token, both in the forward pass and for the
gradient of the activations (--full: again for that of the weights), with the shared prompt counted once; and 4 per
weight of the head and answer token. Attention and elementwise operations are not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RUNS = ("trl", "trl-best", "pairtune")


def prepare(data: Path, model: str, pairs: int, dtype: str) -> tuple[Any, Any]:
    """The base model and the first pairs of a file."""
    from pairtune.config import RunConfig
    from pairtune.data.prepare import prepare_data
    from pairtune.models.load import open_base

    base = open_base(model, dtype)
    config = RunConfig(data=str(data), limit=pairs + pairs // 4 + 8, on_bad_row="skip", test_share=0)
    return base, prepare_data(config, base.tokenizer).train[:pairs]


def train_ours(data: Path, model: str, pairs: int, method: str) -> dict[str, Any]:
    """Train with the engine, through the same function that `pairtune tune` calls."""
    from pairtune.config import TrialConfig
    from pairtune.engine import native
    from pairtune.engine.trial import TrialInputs, load_start
    from pairtune.models.load import weights_fingerprint
    from pairtune.run.folder import Run
    from pairtune.track.sinks import JsonlSink

    base, train = prepare(data, model, pairs, "auto")
    trial = TrialConfig(learning_rate=RATE[method], beta=0.1, epochs=1, method=method)
    inputs = TrialInputs(base, weights_fingerprint(load_start(trial, base)), train, train[:1], "eval_loss")
    native.epoch_order = lambda count, *_: list(range(count))
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        (result,) = native.run_trials([trial], inputs, run, JsonlSink(run))
        lines = [json.loads(line) for line in run.paths.trial(trial.name).metrics.read_text().splitlines()]
    ids = train.tokens(range(len(train)))
    return {
        "seconds": result.train_seconds,
        "losses": [line["loss"] for line in lines if "eval_loss" not in line],
        "work": useful_work(base, ids, method),
    }


def useful_work(base: Any, ids: list[Any], method: str) -> float:
    """Useful operations of an epoch, as defined above."""
    from torch import nn

    from pairtune.models.load import load_model

    model = load_model(base.source, base.dtype)
    head = model.get_output_embeddings()
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    answers = sum(len(pair.chosen) + len(pair.rejected) for pair in ids)
    tokens = answers + sum(len(pair.prompt) for pair in ids)
    passes = 3 if method == "full" else 2
    return 2 * weights * tokens * passes + 4 * head.weight.numel() * answers


def train_trl(
    data: Path,
    model: str,
    pairs: int,
    method: str,
    *,
    best: bool,
    held_out: int = 0,
    batch: int | None = None,
    callbacks: Sequence[Any] = (),
    **flags: Any,
) -> dict[str, Any]:
    """Train with TRL's own trainer; only the order of the pairs and the initial adapters are set.

    With `held_out`, the epoch is evaluated on this many pairs, and the seconds include the evaluation. `flags` are
    further ones of `DPOConfig`.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    from pairtune.engine.lora import LoraSettings, add_adapters, peft_tensors
    from pairtune.models.load import load_model

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset)

    base, drawn = prepare(data, model, pairs + held_out, "auto" if best else "float32")
    rows = [pair.conversational() for pair in drawn]
    batch = batch or (1 if best else 2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=load_model(base.source, base.dtype),
            args=DPOConfig(
                **{
                    "output_dir": folder,
                    "per_device_train_batch_size": batch,
                    "gradient_accumulation_steps": 1,
                    "num_train_epochs": 1,
                    "learning_rate": RATE[method],
                    "beta": 0.1,
                    "bf16": False,
                    "max_length": 1024,
                    "precompute_ref_log_probs": best,
                    "gradient_checkpointing": False,
                    "report_to": [],
                    "logging_steps": 1,
                    "save_strategy": "no",
                    "eval_strategy": "epoch" if held_out else "no",
                    "disable_tqdm": True,
                    "dataloader_pin_memory": False,
                    "seed": 0,
                }
                | flags
            ),
            train_dataset=Dataset.from_list(rows[:pairs]),
            eval_dataset=Dataset.from_list(rows[pairs:]) if held_out else None,
            processing_class=base.tokenizer,
            callbacks=list(callbacks),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if method == "lora" else None,
        )
        if method == "lora":
            start = peft_tensors(add_adapters(load_model(base.source, base.dtype), LoraSettings(), [0]), 0)
            for name, weights in trainer.model.named_parameters():
                if ".lora_A.default." in name:
                    weights.data.copy_(start[name.replace(".default", "")])
        torch.manual_seed(0)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "losses": [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]}


RATE = {"lora": 2e-4, "full": 1e-6}


def measure_limit() -> dict[str, Any]:
    """GFLOP/s of matrix products of a 135M model's sizes, in the dtype that this machine is fastest with."""
    import torch
    from torch.nn.functional import linear

    from pairtune.models.load import pick_dtype

    dtype = pick_dtype(torch.device("cpu"))
    rates = {}
    for tokens in (512, 2048):
        work = seconds = 0.0
        for inputs, outputs in ((576, 576), (576, 1536), (1536, 576)):
            x = torch.randn(tokens, inputs, dtype=dtype)
            weights = torch.randn(outputs, inputs, dtype=dtype)
            linear(x, weights)
            started = time.perf_counter()
            for _ in range(60):
                linear(x, weights)
            seconds += time.perf_counter() - started
            work += 60 * 2 * tokens * inputs * outputs
        rates[str(tokens)] = round(work / seconds / 1e9)
    return rates


def run(what: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Run one measurement in its own process."""
    command = [sys.executable, __file__, str(asked.data), "--measure", what]
    command += ["--pairs", str(asked.pairs), "--model", asked.model, *(["--full"] if asked.full else [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    shown = {name: value for name, value in result.items() if name not in ("losses", "work")}
    print(f"{what:9}", json.dumps(shown), flush=True)
    return result


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    method = "full" if asked.full else "lora"
    if asked.measure == "limit":
        return measure_limit()
    if asked.measure == "pairtune":
        result = train_ours(asked.data, asked.model, asked.pairs, method)
    else:
        result = train_trl(asked.data, asked.model, asked.pairs, method, best=asked.measure == "trl-best")
    result["pairs_per_second"] = round(asked.pairs / result["seconds"], 3)
    result["seconds"] = round(result["seconds"], 1)
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return result


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("data", type=Path)
    cli.add_argument("--pairs", type=int, default=32)
    cli.add_argument("--rounds", type=int, default=2)
    cli.add_argument("--full", action="store_true")
    cli.add_argument("--model", default="smollm2-135m")
    cli.add_argument("--measure", choices=(*RUNS, "limit"), help=argparse.SUPPRESS)
    asked = cli.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked)))
        return
    for number in range(1, asked.rounds + 1):
        limit = run("limit", asked)
        trl, best, ours = (run(what, asked) for what in RUNS)
        rate = {name: result["pairs_per_second"] for name, result in zip(RUNS, (trl, best, ours), strict=True)}
        share = ours["work"] / ours["seconds"] / 1e9
        apart = max(abs(a - b) for a, b in zip(ours["losses"], trl["losses"], strict=True))
        print(
            f"round {number}: {rate['pairtune'] / rate['trl']:.2f} times TRL, "
            f"{rate['pairtune'] / rate['trl-best']:.2f} times TRL at its best; "
            f"memory {ours['peak_mb'] / trl['peak_mb']:.2f} and {ours['peak_mb'] / best['peak_mb']:.2f} times theirs; "
            f"{share:.0f} GFLOP/s, {share / limit['512']:.0%} of the matrix rate at 512 tokens; "
            f"largest difference of a step's loss from TRL's in float32: {apart:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
