"""Step 1 of making `bundled:concise`: sample the bundled model's answers to the project's own prompts.

    python scripts/sample_concise.py --out samples.jsonl

Each prompt is answered several times as it is, and several times with a request to be brief or terse, since the small
model rarely is so by itself; the request is not part of the pairs. Seeds are fixed: the same machine and the same
pinned packages give the same file. Takes about 20 minutes on 2 cores. `make_concise.py` is step 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from pairtune.files import write_atomic
from pairtune.models.generate import generate_answers
from pairtune.models.load import load_model, load_tokenizer
from pairtune.models.resolve import BUNDLED, resolve_model
from pairtune.models.sampling import SamplingParams

PROMPTS = Path(__file__).parents[1] / "src/pairtune/data/bundled/concise/prompts.txt"
# (style, wording, answers per prompt, token limit)
STYLES = (
    ("plain", "{}", 3, 96),
    ("brief", "{} Answer in one or two sentences.", 4, 96),
    ("terse", "{} Answer in at most five words.", 2, 24),
)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--seed", type=int, default=0)
    args = cli.parse_args()

    source = resolve_model(BUNDLED)
    model, tokenizer = load_model(source, torch.bfloat16), load_tokenizer(source)
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    rows = []
    for style, wording, repeats, limit in STYLES:
        asked = [prompt for prompt in prompts for _ in range(repeats)]
        answers = generate_answers(
            model,
            tokenizer,
            [[{"role": "user", "content": wording.format(prompt)}] for prompt in asked],
            SamplingParams(max_tokens=limit, temperature=0.7),
            seed=args.seed,
            batch_size=128,
            on_progress=progress_line(style, len(asked)),
        )
        rows += [
            {"prompt": prompt, "style": style, "answer": answer.text, "tokens": answer.tokens, "ended": answer.ended}
            for prompt, answer in zip(asked, answers, strict=True)
        ]
    write_atomic(args.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def progress_line(style: str, total: int):
    """A progress callback that prints the number of finished answers and the time left."""
    started = time.monotonic()

    def progress(done: int) -> None:
        left = (time.monotonic() - started) / done * (total - done)
        print(f"{style}: {done}/{total} answers, {left / 60:.1f} minutes left", file=sys.stderr, flush=True)

    return progress


if __name__ == "__main__":
    main()
