"""What may happen at any moment: a killed push, a clock that jumps, a full disk below the database, a killed site or
worker. `make chaos` tries each a hundred times.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import pairtune, small_run, write_pairs
from model_hub import online, serve_models
from power import without_times
from site_server import Client, serving
from talker import talking
from test_full_disk import disk, enlarge

from pairtune.run.folder import Run

ROUNDS = int(os.environ.get("PAIRTUNE_CHAOS_ROUNDS", "3"))


def test_a_killed_push_publishes_all_or_nothing(tiny_model, tmp_path):
    """Killed while the Hub answers any of its requests, just before or just after; the second try completes."""
    run = small_run(tiny_model, tmp_path, samples=1).root
    drawn = random.Random(ROUNDS)
    with serve_models() as hub:
        environment = {**os.environ, **online(hub, tmp_path / "home"), "OMP_NUM_THREADS": "1"}

        def push(name: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "pairtune", "push", str(run), "--repo", f"someone/{name}"]
            return subprocess.Popen([*command, "--what", "merged"], env=environment, stderr=subprocess.DEVNULL)

        def published(name: str) -> dict[str, bytes]:
            files = hub.repositories.get(f"someone/{name}", {}).get("main", {})
            return {file: content.replace(name.encode(), b"NAME") for file, content in files.items()}

        assert push("undisturbed").wait(120) == 0
        expected, requests = published("undisturbed"), len(hub.asked)
        assert requests >= 5
        nothing = 0
        for number in range(ROUNDS):
            name, fatal, delay = f"round-{number}", drawn.randrange(requests), drawn.choice([None, 0.0, 0.005, 0.03])
            hub.asked.clear()
            hub.objects.clear()
            started = threading.Event()

            def kill(method: str, path: str) -> str | None:
                if len(hub.asked) == fatal + 1:  # noqa: B023 - used within this round only
                    started.wait()  # noqa: B023
                    if delay is None:  # noqa: B023
                        process.kill()  # noqa: B023
                        return "drop"
                    threading.Timer(delay, process.kill).start()  # noqa: B023
                return None

            hub.fault = kill
            process = push(name)
            started.set()
            code = process.wait(120)
            hub.fault = lambda method, path: None
            assert code in (0, -signal.SIGKILL)
            there = published(name)
            assert there in ({}, expected), f"half of it was published: request {fatal} of {requests}, {delay}"
            nothing += not there
            assert push(name).wait(120) == 0
            assert published(name) == expected
    assert nothing


# ---- The clock ----

# Runs the command line while the clock jumps by up to two years, every 20 ms; what counts durations does not jump.
_JUMPING = """
import random, sys, threading, time
import time_machine
drawn, over = random.Random(int(sys.argv.pop(1))), threading.Event()
traveller = time_machine.travel(time.time())
clock = traveller.start()
def jump():
    while not over.wait(0.02):
        clock.move_to(1.8e9 + drawn.choice([1, 60, 3600, 86_400, 63_000_000]) * drawn.uniform(-1, 1))
thread = threading.Thread(target=jump, daemon=True)
thread.start()
from pairtune.cli import main
try:
    main()
finally:
    over.set()
    thread.join()
    traveller.stop()
"""


def test_a_run_does_not_mind_a_clock_that_jumps(tiny_model, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", range(24))
    flags = ["--model", tiny_model, "--data", data, "--lr", "1e-3", "--beta", "0.1", "--epochs", "1", "--samples", "1"]
    assert pairtune("tune", *flags, "--out", tmp_path / "whole").returncode == 0
    expected = without_times(tmp_path / "whole")
    for number in range(ROUNDS):
        out = tmp_path / f"run-{number}"
        for command in (["tune", *flags, "--out", out], *([["report", out], ["audit", out]] if number == 0 else [])):
            words = [sys.executable, "-c", _JUMPING, str(number), *map(str, command)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
            assert done.returncode == 0, done.stderr
            assert not re.search(r"-\d+:\d\d", done.stderr), done.stderr  # a time left below zero
        assert without_times(out) == expected
        assert not Run.finished(out).damage
        shutil.rmtree(out)


# ---- The site ----


class Chatter:
    """Writes messages to one conversation after another; notes those that the site took."""

    def __init__(self, url: str, prefix: str) -> None:
        self.taken: list[str] = []
        self.refused: list[str] = []
        self.told: set[tuple[int, str]] = set()
        self._url, self._prefix, self._over = url, prefix, threading.Event()
        self._thread = threading.Thread(target=self._talk)
        self._thread.start()

    def _talk(self) -> None:
        with suppress(httpx.HTTPError, AttributeError), Client(base_url=self._url) as client:  # the site was killed
            token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', client.get("/").text).group(1)
            while not self._over.is_set():
                said = f"{self._prefix} {len(self.taken) + len(self.refused)}"
                asked = {"prompt": said, "model": "plain", "temperature": 0.7, "top_p": 1, "max_tokens": 4}
                answer = client.post(
                    "/chat/say", data={**asked, "csrfmiddlewaretoken": token}, headers={"HX-Request": "true"}
                )
                (self.taken if answer.status_code == 204 else self.refused).append(said)
                self.told.add((answer.status_code, answer.text))

    def stop(self) -> list[str]:
        self._over.set()
        self._thread.join()
        return self.taken


def written(kept: Path) -> tuple[set[str], str]:
    """All messages in the site's database, and what SQLite says of its state."""
    database = sqlite3.connect(kept / "site.sqlite3")
    found = {prompt for (prompt,) in database.execute("select prompt from web_turn")}
    (state,) = database.execute("pragma integrity_check").fetchone()
    database.close()
    return found, state


def unfinished(kept: Path) -> int:
    database = sqlite3.connect(kept / "site.sqlite3")
    (found,) = database.execute("select count(*) from web_answer where state = 'writing'").fetchone()
    database.close()
    return found


def test_no_message_is_lost_when_the_site_is_killed(tmp_path):
    """Its worker ends with it, its port is free again, and every message that it took is there."""
    (tmp_path / "runs").mkdir()
    kept, drawn, taken = tmp_path / "kept", random.Random(ROUNDS), []
    with talking() as (address, _):
        for number in range(ROUNDS):
            with serving(tmp_path / "runs", kept, "--backend", address) as site:
                chatter = Chatter(site.url, f"round {number}, message")
                until = time.monotonic() + 60
                while not chatter.taken:
                    assert time.monotonic() < until, "the site takes no message"
                    time.sleep(0.01)
                time.sleep(drawn.uniform(0, 1))
                site.process.kill()
                site.process.wait()
                taken += chatter.stop()
            with pytest.raises(httpx.ConnectError):
                httpx.get(site.url)
    found, state = written(kept)
    assert set(taken) <= found
    assert len(taken) >= ROUNDS
    assert state == "ok"


def test_a_site_whose_worker_is_killed_answers_again(tiny_model, tmp_path):
    """No message is lost; the worker is started again, the killed site's worker ends too, and no port stays taken."""
    run = small_run(tiny_model, tmp_path, samples=1)
    kept, drawn = tmp_path / "kept", random.Random(ROUNDS)
    with serving(tmp_path, kept, str(run.root)) as site, Client(base_url=site.url) as client:
        page = client.get("/").text
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page).group(1)

        def say(words: str) -> str:
            asked = {"prompt": words, "model": "run", "temperature": 0.7, "top_p": 1, "max_tokens": 60}
            answer = client.post("/chat/say", data={**asked, "csrfmiddlewaretoken": token})
            assert answer.status_code == 302
            return answer.headers["location"]

        def state_of(words: str) -> str:
            database = sqlite3.connect(kept / "site.sqlite3")
            query = "select a.state from web_answer a join web_turn t on t.id = a.turn_id where t.prompt = ?"
            (state,) = database.execute(query, (words,)).fetchone()
            database.close()
            return state

        def wait_for(words: str) -> str:
            until = time.monotonic() + 60
            while (state := state_of(words)) == "writing":
                assert time.monotonic() < until, f"nobody answers {words}"
                time.sleep(0.02)
            return state

        seen = set()
        for number in range(ROUNDS):
            worker = site.worker
            say(f"killed {number}")
            time.sleep(drawn.uniform(0, 0.3))
            worker.kill()
            wait_for(f"killed {number}")
            until, state = time.monotonic() + 60, "failed"
            while state != "done":  # until the worker is there again
                assert time.monotonic() < until
                words = f"again {number} {time.monotonic()}"
                say(words)
                state = wait_for(words)
            seen.add(site.worker.pid)
            assert not psutil.pid_exists(worker.pid) or worker.status() == psutil.STATUS_ZOMBIE
        assert len(seen) == ROUNDS
    found, state = written(kept)
    assert {f"killed {number}" for number in range(ROUNDS)} <= found
    assert state == "ok"


def test_a_site_on_a_full_disk_keeps_what_it_took(tmp_path):
    """Messages are refused while there is no room, with the reason, and taken when there is."""
    (tmp_path / "runs").mkdir()
    with talking() as (address, _), disk(tmp_path / "disk", 700) as small:
        kept = small / "kept"
        with serving(tmp_path / "runs", kept, "--backend", address) as site:
            ballast, chatter = small / "ballast", Chatter(site.url, "before")
            time.sleep(1)
            for _ in range(ROUNDS):
                with suppress(OSError), ballast.open("ab") as file:
                    while True:
                        file.write(b"x" * 4096)
                        file.flush()
                until = time.monotonic() + 20
                while not chatter.refused and time.monotonic() < until:
                    time.sleep(0.1)
                refused = len(chatter.refused)
                ballast.unlink(missing_ok=True)
                time.sleep(0.5)
            assert refused
            enlarge(small)
            time.sleep(0.5)
            last = Chatter(site.url, "after")
            time.sleep(1)
            taken = [*chatter.stop(), *last.stop()]
            assert last.taken
            assert not last.refused
            assert {code for code, _ in chatter.told} == {204, 507}
            assert all("disk is full" in said for code, said in chatter.told if code == 507)
            until = time.monotonic() + 30
            while unfinished(kept):  # answers that had nowhere to be kept
                assert time.monotonic() < until
                time.sleep(0.2)
        found, state = written(kept)
        assert set(taken) <= found
        assert state == "ok"


@pytest.mark.parametrize("prompt", ["be mute", "who falls silent"])
def test_a_silent_server_is_given_up_and_said(monkeypatch, prompt):
    """Before its first word, and in mid-answer; with a second of patience instead of two minutes."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "pairtune.web.settings")
    import django
    from django.conf import settings

    django.setup()
    from pairtune.web import backend

    async def ask() -> list[str]:
        return [part.text async for part in backend.answer("plain", [{"role": "user", "content": prompt}], {})]

    monkeypatch.setattr(backend, "_PATIENCE", httpx.Timeout(1.0, connect=5.0))
    with talking() as (address, talker):
        talker.silence = 5.0
        monkeypatch.setattr(settings, "PAIRTUNE_BACKEND", address)
        backend._client_of.cache_clear()
        started = time.monotonic()
        with pytest.raises(backend.Unanswered, match="has been silent for two minutes, and was given up"):
            asyncio.run(ask())
        assert time.monotonic() - started < 4
        backend._client_of.cache_clear()
