"""Coverage-guided fuzzing (Atheris) of everything that reads what others wrote: nothing but clear errors may come out.

    python scripts/fuzz.py [INPUTS]         every target in a process of its own, this many inputs each
    python scripts/fuzz.py TARGET INPUTS    one target

An input that raises anything else is kept by Atheris as crash-* in the current folder, and the exit code is not 0.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris
import pyarrow as pa
import pyarrow.parquet as pq

with atheris.instrument_imports(include=["pairtune"]):
    from pydantic import ValidationError

    from pairtune.config import Reading, SourceConfig
    from pairtune.data.source_reader import SourceReader
    from pairtune.errors import BadInput
    from pairtune.evaluation.audit.check import audit
    from pairtune.evaluation.audit.read import read_evidence
    from pairtune.files import read_json
    from pairtune.models.resolve import resolve_model
    from pairtune.resolve_config import resolve
    from pairtune.run.records import RECORDS
    from pairtune.run.schema import from_json
    from pairtune.serve.protocol import ChatRequest

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "pairtune.web.settings")
with atheris.instrument_imports(include=["pairtune"]):
    from pairtune.web.text import markdown, marked_differences

INPUTS = 8_000
PLACE = Path(tempfile.mkdtemp(prefix="pairtune-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))  # noqa: S108
PAIR = {"prompt": "Is it 4?", "chosen": "Yes.", "rejected": "No."}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
STATE = {
    "log_history": [{"loss": 0.69, "rewards/margins": 0.1, "step": 1, "epoch": 0.5}, {"eval_loss": 0.6, "step": 2}]
}


def rows(name: str) -> Callable[[bytes], None]:
    """Read a file of pairs, and each of its rows as a pair."""

    def target(data: bytes) -> None:
        path = PLACE / name
        path.write_bytes(data)
        with suppress(BadInput):
            reader = SourceReader.open(SourceConfig(source=str(path)), "--data", Reading(wanted="either"), None)
            list(reader.parsed())

    return target


def log(name: str) -> Callable[[bytes], None]:
    """Audit the log of another tool."""

    def target(data: bytes) -> None:
        path = PLACE / name
        path.write_bytes(data)
        with suppress(BadInput):
            audit(read_evidence(path))

    return target


def settings(data: bytes) -> None:
    """Read a file of settings."""
    path = PLACE / "settings.yaml"
    path.write_bytes(data)
    with suppress(BadInput):
        resolve(path, {"out": "x"}).to_yaml()


def records(data: bytes) -> None:
    """Read a file as every record of a run."""
    path = PLACE / "record.json"
    path.write_bytes(data)
    for kind in RECORDS:
        with suppress(BadInput):
            from_json(kind, read_json(path), "record.json")


def request(data: bytes) -> None:
    """Read the body of a request to the worker."""
    with suppress(ValidationError):
        asked = ChatRequest.model_validate_json(data)
        [message.turn() for message in asked.messages]
        asked.params(100)


def gguf(data: bytes) -> None:
    """Open a model file."""
    path = PLACE / "model.gguf"
    path.write_bytes(data)
    with suppress(BadInput):
        resolve_model(str(path))


def text(data: bytes) -> None:
    """Show an answer as HTML, and what two of them differ in."""
    said = data.decode("utf-8", "replace")
    html = markdown(said)
    assert "<script" not in html.lower()  # noqa: S101 - what is looked for
    marked_differences(said[: len(said) // 2], said[len(said) // 2 :])


def examples() -> dict[str, bytes]:
    """A valid input of every kind, from which Atheris begins."""
    lines = "".join(json.dumps(row) + "\n" for row in (PAIR, {"chosen": TURNS, "rejected": TURNS[:1]}, {"prompt": "a"}))
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([PAIR]), table)
    messages = {"model": "m", "messages": TURNS, "temperature": 0.5, "stop": ["x"], "stream": True}
    return {
        "pairs.jsonl": lines.encode(),
        "pairs.json": json.dumps([PAIR, PAIR]).encode(),
        "pairs.csv": b'prompt,chosen,rejected\n"Is it, 4?",Yes.,No.\n',
        "pairs.jsonl.gz": gzip.compress(lines.encode()),
        "pairs.parquet": table.getvalue(),
        "trainer_state.json": json.dumps(STATE).encode(),
        "log.csv": b"step,epoch,loss,eval_loss\n1,0.5,0.69,\n2,1,,0.6\n",
        "log.wandb": b":W&B\x02\x00\x00",
        "settings": b"data: [x]\nlearning_rate: [1e-4, 3e-4]\nbeta: 0.1\n",
        "records": b'{"format": 2, "trials": [], "models": {"base": {"answers": []}}}',
        "request": json.dumps(messages).encode(),
        "gguf": b"GGUF\x03\x00\x00\x00" + bytes(16),
        "text": b"# A **b** `c` $x^2$ [d](http://e)\n```python\nf\n```\n|a|b|\n|-|-|\n",
    }


TARGETS: dict[str, Callable[[bytes], None]] = {
    **{name: rows(name) for name in ("pairs.jsonl", "pairs.json", "pairs.csv", "pairs.jsonl.gz", "pairs.parquet")},
    **{name: log(name) for name in ("trainer_state.json", "log.csv", "log.wandb")},
    **{each.__name__: each for each in (settings, records, request, gguf, text)},
}


def run_one(name: str, inputs: int) -> None:
    """Fuzz one target; ends the process."""
    corpus = PLACE / "corpus"
    corpus.mkdir()
    (corpus / "valid").write_bytes(examples()[name])
    (corpus / "empty").write_bytes(b"")
    atheris.Setup([sys.argv[0], str(corpus), f"-runs={inputs}", "-max_len=4096", "-verbosity=0"], TARGETS[name])
    atheris.Fuzz()


def main() -> int:
    """Fuzz all targets one after the other, or the one that is named."""
    if len(sys.argv) == 3:
        run_one(sys.argv[1], int(sys.argv[2]))
    inputs = int(sys.argv[1]) if len(sys.argv) == 2 else INPUTS
    failed = []
    for name in TARGETS:
        done = subprocess.run(
            [sys.executable, __file__, name, str(inputs)], check=False, capture_output=True, text=True
        )
        print(f"{name}: {inputs:,} inputs, {'failed' if done.returncode else 'nothing but clear errors'}", flush=True)
        if done.returncode:
            failed.append(name)
            print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
    print(f"{inputs * len(TARGETS):,} inputs in all")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
