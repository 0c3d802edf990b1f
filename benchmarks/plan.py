"""What `pairtune plan` foretells, against what runs then take.

    python benchmarks/plan.py DATA [--only NAME] [--rows 64]

DATA is a file of pairs. Each configuration is planned and then trained, one after another, each in processes of its
own: the bundled model, and models with random weights. The peak is that of the whole process (ru_maxrss), the time the
whole command's. Unpacked models and probed kernels are those of the user's cache, where a run that had to probe them
leaves them and is repeated; log-probs of the reference are computed in every run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, Qwen2Config

from pairtune.files import user_cache
from pairtune.models.load import load_tokenizer
from pairtune.models.resolve import resolve_model

GRID = ("--lr", "3e-5", "--lr", "1e-5", "--beta", "0.1", "--beta", "0.2")
ONE = ("--lr", "3e-5", "--beta", "0.1")
# By name: the model, and the settings that differ from one epoch of a single LoRA trial without answers.
CONFIGURATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bundled, one trial": ("bundled", ONE),
    "bundled, the grid": ("bundled", GRID),
    "bundled, short pairs": ("bundled", (*ONE, "--max-length", "256")),
    "bundled, checkpointing": ("bundled", (*ONE, "--checkpointing", "on")),
    "bundled, batch 8": ("bundled", (*ONE, "--batch-size", "8")),
    "bundled, rank 64": ("bundled", (*ONE, "--lora-rank", "64")),
    "bundled, all weights": ("bundled", (*ONE, "--method", "full")),
    "bundled, all weights, 8 bits": ("bundled", (*ONE, "--method", "full", "--optimizer", "adamw-8bit")),
    "bundled, all weights, each of two": ("bundled", (*ONE, "--method", "full", "--processes", "2")),
    "bundled, in 4 bits": ("bundled@nf4", ONE),
    "bundled, with answers": ("bundled", (*ONE, "--samples", "8")),
    "bundled, in 2 GB": ("bundled", (*GRID, "--memory", "2GB")),
    "Qwen2, one trial": ("qwen2", ONE),
    "Qwen2, the grid": ("qwen2", GRID),
    "Qwen2, all weights": ("qwen2", (*ONE, "--method", "full")),
    "GPT-2, one trial": ("gpt2", ONE),
    "GPT-2, two trials": ("gpt2", (*ONE, "--beta", "0.2")),
}


def build(kind: str, folder: Path) -> str:
    """A model with random weights and the bundled model's tokenizer; returns what to give as `--model`."""
    if kind.startswith("bundled"):
        return kind.replace("bundled", "smollm2-135m")
    path = folder / kind
    if not path.exists():
        tokenizer = load_tokenizer(resolve_model("smollm2-135m"))
        ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config: Any = (
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=512,
                intermediate_size=2048,
                num_hidden_layers=16,
                num_attention_heads=8,
                num_key_value_heads=2,
                tie_word_embeddings=True,
                **ends,
            )
            if kind == "qwen2"
            else GPT2Config(vocab_size=len(tokenizer), n_embd=512, n_layer=8, n_head=8, n_positions=2048, **ends)
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        AutoConfig.from_pretrained(path)
    return str(path)


def own_cache(folder: Path) -> dict[str, str]:
    """The environment for a run with a new cache, but for what does not belong to its work."""
    cache = Path(tempfile.mkdtemp(dir=folder))
    for part in ("models", "kernels"):
        (user_cache() / part).mkdir(parents=True, exist_ok=True)
        (cache / part).symlink_to(user_cache() / part)
    return {**os.environ, "PAIRTUNE_CACHE": str(cache)}


def probed() -> set[Path]:
    """What was found out about this machine's products."""
    return set((user_cache() / "kernels").glob("*.json"))


def measure(name: str, asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    kind, settings = CONFIGURATIONS[name]
    common = ["--model", build(kind, folder), "--data", str(asked.data), "--limit", str(asked.rows)]
    common += ["--on-bad-row", "skip", "--epochs", "1", *settings]
    common += [] if "--samples" in settings else ["--samples", "0"]
    module, environment, before = ["-m", "pairtune"], own_cache(folder), probed()
    program = [sys.executable, *module]
    planned = subprocess.run([*program, "plan", *common, "--json"], check=True, stdout=subprocess.PIPE, env=environment)
    cost = json.loads(planned.stdout)["cost"]
    if "--processes" in common:  # the peak is then that of the largest process
        at = common.index("--processes")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", common[at + 1]]
        program, common = [sys.executable, *launcher, *module], common[:at] + common[at + 2 :]
    started = time.perf_counter()
    log = (folder / "log.txt").open("wb")
    target = folder / f"run-{len(os.listdir(folder))}"
    run = subprocess.Popen([*program, "tune", *common, "--out", str(target)], stdout=log, stderr=log, env=environment)
    _, status, used = os.wait4(run.pid, 0)
    seconds = time.perf_counter() - started
    run.returncode = os.waitstatus_to_exitcode(status)
    if run.returncode:
        sys.exit(f"{name}: {(folder / 'log.txt').read_text(encoding='utf-8', errors='replace')[-2000:]}")
    if probed() != before:
        return measure(name, asked, folder)
    low, high = cost["seconds"] or (math.nan, math.nan)
    return {
        "planned_mb": round(sum(cost["fit"]["memory"].values()) / 2**20),
        "peak_mb": used.ru_maxrss // 1024,
        "planned_s": round((low * high) ** 0.5, 1),
        "seconds": round(seconds, 1),
        "parts": {part: round(size / 2**20) for part, size in cost["fit"]["memory"].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", action="append", choices=CONFIGURATIONS)
    parser.add_argument("--rows", type=int, default=64)
    asked = parser.parse_args()
    print("| configuration | peak, MB: planned, measured | off by | seconds: planned, measured | off by |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.only or CONFIGURATIONS:
            found = measure(name, asked, Path(folder))
            memory, times = found["planned_mb"] / found["peak_mb"] - 1, found["planned_s"] / found["seconds"] - 1
            timed = f"{found['planned_s']}, {found['seconds']} | {times:+.0%}"
            if math.isnan(times):  # several processes, whose time is not foretold
                timed = f"-, {found['seconds']} | -"
            print(f"| {name} | {found['planned_mb']:,}, {found['peak_mb']:,} | {memory:+.0%} | {timed} |", flush=True)
            print(f"{name}: {found['parts']}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
