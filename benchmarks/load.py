"""Load test of a running site: fifty users chat at once, each following an answer to its end before writing again.

    pairtune serve runs/demo --waiting 100 &
    locust -f benchmarks/load.py --headless --users 50 --spawn-rate 5 --run-time 10m --host http://localhost:8000

Prints how many answers were requested, completed, failed or were lost, and the memory of the processes per minute.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter

import gevent
import psutil
from locust import HttpUser, between, events, task

ASKED = Counter()
MEMORY: list[tuple[float, int]] = []
WORDS = "lighthouse gull ferry baker storm harbour map letter keeper tide rope lamp winter bell".split()


class Person(HttpUser):
    """One user with an open chat."""

    wait_time = between(1, 10)
    path = ""

    @task(8)
    def say(self) -> None:
        """Send a prompt and follow the answer."""
        page = self.client.get(self.path or "/", name="a conversation")
        token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page.text)
        if token is None:
            return
        model = re.search(r'<option value="([^"]+)" selected', page.text)
        form = {
            "csrfmiddlewaretoken": token[1],
            "prompt": f"Say something about a {random.choice(WORDS)} and a {random.choice(WORDS)}.",
            "model": model[1] if model else "",
            "temperature": "0.7",
            "top_p": "1",
            "max_tokens": "40",
        }
        url = f"{self.path}say" if self.path else "/chat/say"
        ASKED["asked"] += 1
        reply = self.client.post(url, form, headers={"Referer": self.host}, name="say")
        self.path = re.sub(r"^https?://[^/]+", "", reply.url)
        answers = re.findall(r'data-stream="([^"]+)"', reply.text)
        if not answers:
            ASKED["ended at once"] += 1
            return
        started, first, last = time.perf_counter(), None, ""
        with self.client.get(answers[-1], stream=True, name="an answer", timeout=600, catch_response=True) as stream:
            for line in stream.iter_lines(decode_unicode=True):
                if first is None and line.startswith("data:") and "waiting" not in line:
                    first = time.perf_counter() - started
                last = line if line.startswith("data: <article") else last
        state = re.search(r'class="answer (\w+)"', last)
        ASKED[state[1] if state else "lost"] += 1
        if first is not None:
            events.request.fire(
                request_type="SSE", name="first words", response_time=first * 1000, response_length=0, exception=None
            )
        if len(ASKED) and random.random() < 0.3:
            self.path = ""  # start a new conversation

    @task(1)
    def look(self) -> None:
        """Look at the runs."""
        self.client.get("/runs/", name="runs")


def _watch(port: int) -> None:
    """Record every ten seconds the resident memory of the process that listens on the port, and of its children."""
    owner = next(
        each.pid for each in psutil.net_connections("inet") if each.laddr.port == port and each.status == "LISTEN"
    )
    site = psutil.Process(owner)
    started = time.perf_counter()
    while True:
        memory = sum(each.memory_info().rss for each in [site, *site.children(recursive=True)])
        MEMORY.append((time.perf_counter() - started, memory))
        gevent.sleep(10)


@events.test_start.add_listener
def _start(environment, **_) -> None:
    gevent.spawn(_watch, int(environment.host.rpartition(":")[2]))


@events.test_stop.add_listener
def _stop(**_) -> None:
    print("answers:", dict(ASKED))
    print("memory, MB per minute:", [round(size / 1e6) for at, size in MEMORY if at % 60 < 10])
