"""Server time of every page except the chat's answers, with a thousand conversations and fifty runs.

The runs are copies of `--run` without its weights; the site runs in its own process, without a model server. Prints the
median and 95th percentile of 50 sequential requests per page.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

_FILL = """
from pairtune.web.server import prepare
prepare()
from pairtune.web.models import Answer, Conversation, Turn
for number in range(1000):
    conversation = Conversation.objects.create(title=f"Conversation {number}", model_names=["demo"])
    turn = None
    for depth in range(4):
        turn = Turn.objects.create(conversation=conversation, parent=turn, prompt=f"Word {number} and {depth}? " * 5)
        Answer.objects.create(turn=turn, model="demo", text="Some **words**, and more. " * 20, state="done")
    Conversation.objects.filter(pk=conversation.pk).update(leaf=turn)
"""


def main() -> None:
    """Fill the site with data, measure its pages and print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pairtune-") as scratch:
        runs, site = Path(scratch) / "runs", Path(scratch) / "site"
        for number in range(50):
            shutil.copytree(
                asked.run, runs / f"run-{number}", ignore=shutil.ignore_patterns("*.safetensors", "reference")
            )
        environment = {**os.environ, "PAIRTUNE_SITE": str(site), "PAIRTUNE_RUNS": str(runs)}
        subprocess.run([sys.executable, "-c", _FILL], env=environment, check=True)
        command = [sys.executable, "-m", "pairtune", "serve", "--runs", str(runs), "--port", "0"]
        command += ["--backend", "http://127.0.0.1:9"]
        with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE) as process:
            address = process.stdout.readline().split("/  ")[0]
            try:
                with httpx.Client(base_url=address) as client:
                    measure(client)
            finally:
                process.terminate()


def measure(client: httpx.Client) -> None:
    """Print one line per page."""
    pages = [
        "/runs/",
        "/runs/run-7/",
        "/runs/run-7/pairs",
        "/runs/run-7/pairs?q=sea&disagrees=on",
        "/runs/run-7/report",
    ]
    for page in [*pages, "/runs/new", "/chat/500/", "/chat/search?q=Word", "/chat/search?q=717+and"]:
        times = []
        for _ in range(53):
            started = time.perf_counter()
            client.get(page).raise_for_status()
            times.append((time.perf_counter() - started) * 1000)
        first, times = times[0], sorted(times[3:])
        print(f"{page:40} median {statistics.median(times):5.0f} ms, 95 % {times[47]:5.0f} ms, first {first:5.0f} ms")


if __name__ == "__main__":
    main()
