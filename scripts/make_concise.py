"""Step 2 of making `bundled:concise`: apply the rule to the samples, split by prompt, write the files.

    python scripts/make_concise.py --samples samples.jsonl

The rule is `pairtune.data.concise`; the samples come from `sample_concise.py`. All pairs of a prompt go to one split,
which the hash of the prompt decides. Only every other prompt gets a pair that rejects a terse answer: with one for
each, a model would learn as often that answers should be longer as that they should be shorter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

from pairtune.data.concise import Sample, make_pairs
from pairtune.files import write_atomic

FOLDER = Path(__file__).parents[1] / "src/pairtune/data/bundled/concise"
# Out of 20 parts of the prompts: 12 train, 4 validation, 4 test.
PARTS = ("train",) * 12 + ("validation",) * 4 + ("test",) * 4


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--samples", type=Path, required=True)
    args = cli.parse_args()

    answers: dict[str, list[Sample]] = defaultdict(list)
    for line in args.samples.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers[row["prompt"]].append(Sample(row["answer"], row["tokens"], row["ended"]))
    rows: dict[str, list[str]] = {split: [] for split in dict.fromkeys(PARTS)}
    flaws: Counter[tuple[str, str]] = Counter()
    # In order of the prompts' hashes, so that the first rows of a file (--limit) are a fair sample of it.
    for digest, prompt in sorted((hashlib.sha256(prompt.encode()).digest(), prompt) for prompt in answers):
        split = PARTS[digest[0] % len(PARTS)]
        for pair in make_pairs(prompt, answers[prompt]):
            if pair.flaw == "terse" and digest[1] % 2:
                continue
            row = {
                "prompt": prompt,
                "chosen": pair.chosen.text,
                "rejected": pair.rejected.text,
                "flaw": pair.flaw,
                "chosen_tokens": pair.chosen.tokens,
                "rejected_tokens": pair.rejected.tokens,
            }
            rows[split].append(json.dumps(row, ensure_ascii=False) + "\n")
            flaws[split, pair.flaw] += 1
    for split, lines in rows.items():
        write_atomic(FOLDER / f"{split}.jsonl", "".join(lines))
        print(split, len(lines), {flaw: count for (name, flaw), count in sorted(flaws.items()) if name == split})


if __name__ == "__main__":
    main()
