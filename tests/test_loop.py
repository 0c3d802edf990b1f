"""The loop: two people vote in the arena, the next round learns from their votes, and one click takes it back.

With a tiny random model; `PAIRTUNE_LOOP=bundled` (`make loop`) does the same with the bundled one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import pairtune, small_run
from playwright.sync_api import Page, expect
from site_server import NEEDS_CHROMIUM, PATIENCE, Site, serving, watched

from pairtune.models.resolve import BUNDLED
from pairtune.run.folder import Run

pytestmark = NEEDS_CHROMIUM

REAL = os.environ.get("PAIRTUNE_LOOP") == "bundled"
WORKING = 900_000 if REAL else 120_000  # milliseconds: two answers, a check, or a short run
# Short answers, so that a laptop's CPU gives twenty of them in minutes.
QUESTIONS = [
    f"Answer with one word. {question}"
    for question in (
        *("What colour is the sky?", "What do bees make?", "Which animal barks?", "What is frozen water?"),
        *("Which season is the coldest?", "What do cows drink?", "Where do fish live?", "What do we read?"),
        *("Which fruit is yellow?", "What shines at night?", "Who bakes bread?", "What do painters use?"),
    )
]


@pytest.fixture(scope="module")
def site(tiny_model, tmp_path_factory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("loop")
    (folder / "runs").mkdir()
    model = BUNDLED if REAL else tiny_model
    small_run(model, folder, learning_rate=[1e-3], samples=0, dtype="auto", out=folder / "runs" / "round-1")
    with serving(folder / "runs", folder / "kept", "--context", "480") as site:
        yield site


def vote(page: Page, site: Site, questions: list[str], wanted: int, key: str) -> None:
    """Vote until `wanted` votes are given; matches without two answers are skipped."""
    given = 0
    for question in questions:
        page.goto(f"{site.url}/arena/")
        page.fill("#question", question)
        page.click("#ask-send")
        page.wait_for_url("**/arena/*/")
        expect(page.locator("#ballot:not([inert])")).to_be_visible(timeout=WORKING)
        if page.get_by_text("A model did not answer").count():
            continue
        page.keyboard.press(key)
        expect(page.get_by_role("heading", name=re.compile("You preferred"))).to_be_visible()
        given += 1
        if given == wanted:
            return
    pytest.fail(f"only {given} matches had two answers")


def test_ten_votes_are_the_next_round(browser, site, tmp_path, monkeypatch):
    for person, key in enumerate(["ArrowLeft", "ArrowRight"]):  # in browsers of their own
        with watched(browser, 1440, 900) as page:
            vote(page, site, QUESTIONS[person::2], 5, key)
    with watched(browser, 1440, 900) as page:
        page.set_default_timeout(WORKING)
        page.goto(f"{site.url}/arena/standings")
        expect(page.get_by_text("10 votes by 2 people")).to_be_visible()
        kept = site.runs.parent / "kept"
        exported = pairtune("votes", "export", tmp_path / "votes", "--json", PAIRTUNE_SITE=kept)
        assert exported.returncode == 0, exported.stderr
        account = json.loads(exported.stdout)
        assert account["votes"] == 10
        assert account["votes_in_pairs"] + sum(account["left_out"].values()) == 10
        inspected = pairtune("data", "inspect", tmp_path / "votes" / "pairs.jsonl", "--json")
        assert json.loads(inspected.stdout)["kept"] == account["pairs"]
        next_round(page, site, account["pairs"])
        lineage(page, site)
        one_click_back(page, site)
        page.goto(f"{site.url}/arena/")
        expect(page.get_by_text("3 models take part")).to_be_visible()  # the new one among them
    refused = pairtune("votes", "export", tmp_path / "votes", PAIRTUNE_SITE=kept)
    assert refused.returncode == 2
    assert "already exists" in refused.stderr


def next_round(page: Page, site: Site, pairs: int) -> None:
    """From the first round's page to a second one on the votes."""
    page.goto(f"{site.url}/runs/round-1/")
    page.get_by_role("link", name="Next round").click()
    expect(page.locator("[name=source]").first).to_have_value("votes")
    page.get_by_role("button", name="Look at the data").click()
    expect(page.locator("#check .state")).to_be_visible(timeout=WORKING)
    expect(page.locator("#check")).to_contain_text(f"{pairs} ")
    for name, value in {"name": "round-2", "learning_rate": "1e-3", "beta": "0.1", "epochs": "1"}.items():
        page.fill(f"[name={name}]", value)
    page.get_by_text("More settings").click()
    page.fill("[name=samples]", "0")
    page.get_by_text("More settings").click()
    expect(page.get_by_role("button", name="Start")).to_be_enabled(timeout=WORKING)
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/runs/round-2/", timeout=WORKING)
    expect(page.locator("#verdict")).to_be_visible(timeout=WORKING)


def lineage(page: Page, site: Site) -> None:
    """The rounds are recorded and drawn."""
    found = Run.open(site.runs / "round-2").lineage
    assert found is not None
    assert (found.on_top, found.reference, found.start.name) == ("continue", "start", "round-1")
    page.goto(f"{site.url}/runs/round-2/")
    cards = page.locator("#rounds li")
    expect(cards).to_have_count(3)
    expect(cards.nth(0)).to_contain_text("Base")
    expect(cards.nth(1)).to_contain_text("round-1")
    expect(cards.nth(1)).to_contain_text("rank")  # it has votes
    expect(cards.nth(2)).to_contain_text("Accuracy")
    cards.nth(1).get_by_role("link", name="round-1").click()
    page.wait_for_url("**/runs/round-1/")


def one_click_back(page: Page, site: Site) -> None:
    """Make the older model the one that answers, and go back with one click."""
    page.goto(site.url)
    expect(page.locator("#chosen")).to_contain_text("round-2", timeout=PATIENCE)  # tuned last
    page.goto(f"{site.url}/runs/round-1/")
    page.get_by_role("button", name="Make round-1 the one that answers").click()
    expect(page.get_by_role("button", name="Back to the model tuned last")).to_be_visible()
    page.goto(site.url)
    expect(page.locator("#chosen")).to_contain_text("round-1")
    page.goto(f"{site.url}/runs/round-1/")
    page.get_by_role("button", name="Back to the model tuned last").click()
    expect(page.get_by_role("button", name="Make round-1 the one that answers")).to_be_visible()
    page.goto(site.url)
    expect(page.locator("#chosen")).to_contain_text("round-2")


@pytest.mark.parametrize("command", [("tune",), ("plan",), ("data", "inspect")])
def test_votes_as_a_source_without_any(command, tmp_path: Path):
    source = ["votes"] if command[0] == "data" else ["--data", "votes"]
    told = pairtune(*command, *source, PAIRTUNE_SITE=tmp_path / "nobody")
    assert told.returncode == 2
    assert "no vote gives a pair yet; vote in the arena" in told.stderr
    assert "Traceback" not in told.stderr
    assert pairtune("votes", "export", tmp_path / "out", PAIRTUNE_SITE=tmp_path / "nobody").returncode == 2
