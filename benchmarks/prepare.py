"""Preparing preference data: this project against TRL's own preparation, on the same rows.

    python benchmarks/prepare.py DATA [--rows 76256] [--model smollm2-135m] [--trl-rows 4000] [--rounds 3]

DATA is a file of rm-static rows. They are repeated with fresh ids in their last user turn up to ROWS rows, by default
the size of Dahoas/rm-static's train split. Each measurement runs in its own process, one after another:

- ours:    `prepare_data` for all rows with an empty cache, from the file to the written splits
- encode:  the chat template and the tokenizer alone on TRL_ROWS pairs in memory, as in TRL's preparation
- trl:     TRL's `DPOTrainer._prepare_dataset` on TRL_ROWS of the same pairs, in its conversational format
- cached:  `prepare_data` again, from the cache

Prints rows per second (without imports and loading the tokenizer), seconds of the cached start with and without
imports, peak memory of each process, and the ratios of each round.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def write_rows(data: Path, rows: int, out: Path) -> None:
    """Repeat the rows of a file with fresh ids, without rows that lack an answer, since nothing reads them."""
    with gzip.open(data, "rt") if data.suffix == ".gz" else data.open() as lines:
        real = [row for row in map(json.loads, lines) if row["chosen"].strip() and row["rejected"].strip()]
    with out.open("w") as file:
        for number in range(rows):
            row = real[number % len(real)]
            prompt = row["prompt"].removesuffix("\n\nAssistant:") + f" ({number})\n\nAssistant:"
            file.write(json.dumps({**row, "prompt": prompt}) + "\n")


def measure(what: str, data: Path, model: str, rows: int | None) -> dict[str, Any]:
    """Run one measurement in this process."""
    started = time.perf_counter()
    from pairtune.config import Reading, RunConfig, SourceConfig
    from pairtune.data.preference import PreferencePair
    from pairtune.data.prepare import prepare_data
    from pairtune.data.source_reader import SourceReader
    from pairtune.data.tokens import PairTokenizer
    from pairtune.models.load import load_tokenizer
    from pairtune.models.resolve import resolve_model

    if what == "trl":
        from datasets import Dataset
        from trl import DPOTrainer

    tokenizer = load_tokenizer(resolve_model(model))
    config = RunConfig(data=str(data), on_bad_row="skip", limit=rows)
    imported = time.perf_counter()
    if what in ("ours", "cached"):
        prepared = prepare_data(config, tokenizer)
        if prepared.from_cache != (what == "cached"):
            raise SystemExit(f"{what}: the cache was {'unexpectedly' if prepared.from_cache else 'not'} used")
        count = sum(source["rows_in"] for source in prepared.record["sources"])
    else:
        reader = SourceReader.open(SourceConfig(source=str(data)), "DATA", Reading(), rows)
        pairs = [pair for _, pair in reader.parsed() if isinstance(pair, PreferencePair)]
        count = len(pairs)
        if what == "encode":
            encoder = PairTokenizer(tokenizer, 1024)
            imported = time.perf_counter()
            for start in range(0, count, 512):
                encoder.encode(pairs[start : start + 512])
        else:
            dataset = Dataset.from_list([pair.conversational() for pair in pairs])
            settings = SimpleNamespace(dataset_num_proc=None, max_length=1024, truncation_mode="keep_start")
            imported = time.perf_counter()
            DPOTrainer._prepare_dataset(None, dataset, tokenizer, settings, "train")
    seconds = time.perf_counter() - imported
    return {
        "rows": count,
        "seconds": round(seconds, 2),
        "rows_per_second": round(count / seconds),
        "with_imports": round(time.perf_counter() - started, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def run(what: str, data: Path, model: str, rows: int | None, cache: str) -> dict[str, Any]:
    """Run one measurement in its own process."""
    command = [sys.executable, __file__, str(data), "--measure", what, "--model", model]
    environment = {**os.environ, "PAIRTUNE_CACHE": cache, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [*command, *(["--rows", str(rows)] if rows else [])], env=environment, check=True, stdout=subprocess.PIPE
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{what:7}", json.dumps(result), flush=True)
    return result


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("data", type=Path)
    cli.add_argument("--rows", type=int)
    cli.add_argument("--trl-rows", type=int, default=4000)
    cli.add_argument("--rounds", type=int, default=3)
    cli.add_argument("--model", default="smollm2-135m")
    cli.add_argument("--measure", choices=("ours", "encode", "trl", "cached"), help=argparse.SUPPRESS)
    asked = cli.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked.measure, asked.data, asked.model, asked.rows)))
        return
    from pairtune.files import user_cache

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(asked.data, asked.rows or 76_256, data)
        for number in range(asked.rounds):
            cache = Path(folder) / f"cache-{number}"
            cache.mkdir()
            (cache / "models").symlink_to((user_cache() / "models").resolve())
            trl = run("trl", data, asked.model, asked.trl_rows, str(cache))
            ours = run("ours", data, asked.model, None, str(cache))
            encode = run("encode", data, asked.model, asked.trl_rows, str(cache))
            cached = run("cached", data, asked.model, None, str(cache))
            whole = ours["rows_per_second"] / trl["rows_per_second"]
            print(
                f"round {number + 1}: template and tokenize {encode['rows_per_second'] / trl['rows_per_second']:.2f} "
                f"times TRL's rate, whole preparation {whole:.2f} times; "
                f"cached start {cached['seconds']} s ({cached['with_imports']} s with imports); "
                f"peak {ours['peak_mb']} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
