"""An hour of chatting, voting, watching and training at once: does the site, or its worker, grow, leak or slow down?

    python benchmarks/soak.py [--minutes 60] [--model smollm2-135m] [--out soak]

Every ten seconds it measures the memory of both processes that is theirs alone, their open files and their threads, and
how long pages, first words and votes take. Written to `--out`: `samples.jsonl`, and `soak.svg` with the curves. The
exit code is 1 if memory has grown by more than 2 % since the tenth minute, files have stayed open, or an answer failed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import httpx
import matplotlib as mpl
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from site_server import Client, Site, serving

mpl.use("svg")
from matplotlib import pyplot as plt

GROWTH = 0.02
SAMPLE_SECONDS = 10
PROMPTS = ("What is a lighthouse for?", "Name three fruits.", "How do I boil an egg?", "Why is the sky blue?")


class Fault(Exception):
    """Something did not happen as it should."""


def demand(condition: bool, otherwise: str) -> None:
    """Raise a fault unless the condition holds."""
    if not condition:
        raise Fault(otherwise)


class Soak:
    """People who chat, vote and watch, and a run that is trained, until the time is over."""

    def __init__(self, site: Site, runs: Path, seconds: float, tune: list[str]) -> None:
        self.site, self.runs, self.tune = site, runs, tune
        self.started = time.monotonic()
        self.ends = self.started + seconds
        self.samples: list[dict[str, float]] = []
        self.done: dict[str, int] = defaultdict(int)
        self.took: dict[str, list[tuple[float, float]]] = defaultdict(list)  # what: (minute, seconds)
        self.faults: list[str] = []

    def run(self) -> None:
        """Do everything at once, and take samples meanwhile."""
        work = (self.chat, self.vote, self.watch, self.train)
        threads = [threading.Thread(target=self.repeat, args=(each,)) for each in work]
        for thread in threads:
            thread.start()
        processes = {"site": psutil.Process(self.site.process.pid), "worker": self.site.worker}
        while time.monotonic() < self.ends:
            self.samples.append(self.sample(processes))
            time.sleep(SAMPLE_SECONDS)
        for thread in threads:
            thread.join()

    def repeat(self, work: Callable[[httpx.Client], None]) -> None:
        """Do one kind of work again and again; what fails is noted, and does not end it."""
        with Client(base_url=self.site.url, timeout=180) as client:
            client.get("/")
            while time.monotonic() < self.ends:
                try:
                    work(client)
                    self.done[work.__name__] += 1
                except (httpx.HTTPError, Fault, subprocess.CalledProcessError) as error:
                    self.faults.append(f"minute {self.minute():.1f}: {work.__name__}: {error!r}"[:300])
                    time.sleep(1)

    def minute(self) -> float:
        return (time.monotonic() - self.started) / 60

    def timed(self, what: str, seconds: float) -> None:
        self.took[what].append((self.minute(), seconds))

    def post(self, client: httpx.Client, path: str, **fields: object) -> str:
        """Send a form; returns where the site leads."""
        answer = client.post(path, data={**fields, "csrfmiddlewaretoken": client.cookies["csrftoken"]})
        demand(answer.status_code == 302, f"{path}: {answer.status_code} {answer.text[:200]}")
        return answer.headers["location"]

    def chat(self, client: httpx.Client) -> None:
        """A new conversation of two turns with both models."""
        where = "/chat/say"
        for turn in range(2):
            prompt = PROMPTS[(self.done["chat"] + turn) % len(PROMPTS)]
            started = time.monotonic()
            sampling = {"temperature": 0.7, "top_p": 1, "max_tokens": 24}
            fields = {"prompt": prompt, "model": ["tuned", self.base()], **sampling}
            page = self.post(client, where, **fields)
            where = f"{page}say"
            streams = re.findall(r'data-stream="([^"]+)"', client.get(page).text)
            for stream in streams:
                with client.stream("GET", stream) as events:
                    for number, line in enumerate(events.iter_lines()):
                        if number == 0:
                            self.timed("first words", time.monotonic() - started)
                        demand("answer failed" not in line, line[:200])

    def base(self) -> str:
        return self.tune[self.tune.index("--model") + 1]

    def vote(self, client: httpx.Client) -> None:
        """A match in the arena, and a vote."""
        page = self.post(client, "/arena/start", prompt=PROMPTS[self.done["vote"] % len(PROMPTS)])
        with client.stream("GET", f"{page}events") as events:
            for _ in events.iter_lines():
                pass
        if "A model did not answer" in client.get(page).text:  # an empty answer, which small models give
            self.done["skip"] += 1
            return
        started = time.monotonic()
        self.post(client, f"{page}vote", outcome=("left", "right", "tie", "bad")[self.done["vote"] % 4])
        self.timed("vote", time.monotonic() - started)

    def watch(self, client: httpx.Client) -> None:
        """The pages that somebody looks at while a run is trained."""
        for path in ("/", "/runs/", "/runs/tuned/", "/runs/tuned/pairs", "/arena/standings", "/runs/live/live"):
            started = time.monotonic()
            answer = client.get(path)
            demand(answer.status_code == 200 or path.endswith("live"), f"{path}: {answer.status_code}")
            self.timed("page", time.monotonic() - started)
            time.sleep(0.5)

    def train(self, _: httpx.Client) -> None:
        """A small run, deleted when it has ended, so that the folder of runs stays as it is."""
        out = self.runs / "live"
        try:
            subprocess.run([*self.tune, "--out", str(out)], check=True, capture_output=True, text=True)
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def sample(self, processes: dict[str, psutil.Process]) -> dict[str, float]:
        found = {"minute": self.minute()}
        for name, process in processes.items():
            found[f"{name} MB"] = process.memory_full_info().uss / 1e6
            found[f"{name} files"] = process.num_fds()
            found[f"{name} threads"] = process.num_threads()
        return found


def compare(soak: Soak, minutes: float) -> bool:
    """Print what was before and after; returns whether nothing has grown."""
    settled = min(10.0, minutes / 3)
    window = min(10.0, (minutes - settled) / 2)
    early = [each for each in soak.samples if settled <= each["minute"] < settled + window]
    late = [each for each in soak.samples if each["minute"] >= minutes - window]
    fine = not soak.faults
    print(f"\n{'':16}{f'minutes {settled:.0f}-{settled + window:.0f}':>16}{f'last {window:.0f}':>12}{'change':>10}")
    for name in (each for each in early[0] if each != "minute"):
        before, after = (statistics.median(each[name] for each in found) for found in (early, late))
        print(f"{name:16}{before:16.1f}{after:12.1f}{after / before - 1:+10.1%}")
        if name.endswith("MB"):
            fine &= after <= before * (1 + GROWTH)
        elif name.endswith("files"):
            fine &= after <= before + 1
    for what, took in soak.took.items():
        before, after = (
            statistics.median([seconds for minute, seconds in took if low <= minute < high] or [float("nan")])
            for low, high in ((settled, settled + window), (minutes - window, float("inf")))
        )
        print(f"{what + ' ms':16}{1000 * before:16.0f}{1000 * after:12.0f}{after / before - 1:+10.1%}")
    print(", ".join(f"{count:,} times {what}" for what, count in soak.done.items()))
    print(f"{len(soak.faults)} faults", *soak.faults[:20], sep="\n")
    return fine


def draw(soak: Soak, file: Path) -> None:
    """Memory, open files and times over the minutes."""
    minutes = [each["minute"] for each in soak.samples]
    _, (memory, files, times) = plt.subplots(3, sharex=True, figsize=(8, 8), layout="constrained")
    for name in ("site", "worker"):
        memory.plot(minutes, [each[f"{name} MB"] for each in soak.samples], label=name)
        files.plot(minutes, [each[f"{name} files"] for each in soak.samples], label=name)
    for what, took in soak.took.items():
        times.plot(*zip(*took, strict=True), ".", markersize=2, label=what)
    memory.set(ylabel="own memory, MB", ylim=(0, None))
    files.set(ylabel="open files", ylim=(0, None))
    times.set(ylabel="seconds", xlabel="minute", yscale="log")
    for each in (memory, files, times):
        each.legend()
    plt.savefig(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("soak"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        runs, kept = Path(folder) / "runs", Path(folder) / "kept"
        runs.mkdir()
        tune = [sys.executable, "-m", "pairtune", "tune", "--model", asked.model, "--data", "bundled:concise"]
        tune += ["--limit", "20", "--lr", "1e-4", "--beta", "0.1", "--epochs", "1", "--samples", "0"]
        subprocess.run([*tune, "--out", str(runs / "tuned")], check=True)
        # Named, so that the run that comes and goes takes no part in matches.
        with serving(runs, kept, str(runs / "tuned"), asked.model) as site:
            soak = Soak(site, runs, 60 * asked.minutes, tune)
            soak.run()
    lines = [json.dumps(each) for each in soak.samples]
    (asked.out / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(soak, asked.out / "soak.svg")
    return 0 if compare(soak, asked.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
