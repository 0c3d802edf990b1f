"""The site in its own processes and a real browser, shared by the site's tests."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import small_run
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from pairtune.models.resolve import BUNDLED

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDS_CHROMIUM = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is missing: apt-get install chromium, or another package that includes it"
)
PATIENCE = 60_000  # milliseconds; machines are busy
expect.set_options(timeout=PATIENCE)
# httpx with as much patience as the browser.
get = functools.partial(httpx.get, timeout=PATIENCE / 1000)
post = functools.partial(httpx.post, timeout=PATIENCE / 1000)
Client = functools.partial(httpx.Client, timeout=PATIENCE / 1000)
WIDTHS = {"desktop": (1440, 900), "phone": (390, 844)}


@dataclass
class Site:
    """A running site."""

    url: str
    process: subprocess.Popen[str]
    runs: Path

    @property
    def worker(self) -> psutil.Process:
        return next(
            child
            for child in psutil.Process(self.process.pid).children()
            # A run started from the page that has just ended no longer has a command line.
            if child.status() != psutil.STATUS_ZOMBIE and "worker" in " ".join(child.cmdline())
        )


@contextmanager
def serving(runs: Path, kept: Path, *arguments: str) -> Iterator[Site]:
    """Start a site with its own worker in separate processes, and check that none are left behind."""
    command = [sys.executable, "-m", "pairtune", "serve", *arguments, "--runs", str(runs), "--port", "0"]
    environment = {**os.environ, "PAIRTUNE_SITE": str(kept), "OMP_NUM_THREADS": "1"}
    log = (kept.parent / f"{kept.name}.log").open("w")
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=log)
    try:
        line = process.stdout.readline()
        assert line.startswith("http://localhost:"), Path(log.name).read_text()
        children = psutil.Process(process.pid).children(recursive=True)
        yield Site(line.split("/  ")[0].replace("localhost", "127.0.0.1"), process, runs)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)
        log.close()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, "a worker outlived its site"


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory) -> Path:
    """A finished, an unfinished and a broken run."""
    folder = tmp_path_factory.mktemp("site") / "runs"
    folder.mkdir()
    data = folder.parent
    small_run(tiny_model, data, learning_rate=[3e-2, 1e-2], epochs=[2], samples=2, out=folder / "small")
    shutil.copytree(folder / "small", folder / "damaged")
    (folder / "damaged" / "selection.json").write_text("{")
    shutil.copytree(folder / "small", folder / "halfway")
    for name in ("COMPLETE", "selection.json", "sweep.json", "audit.json", "report.html"):
        (folder / "halfway" / name).unlink()
    for file in (folder / "halfway").rglob("*"):
        os.utime(file, (1_000_000_000, 1_000_000_000))
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """Where the site keeps what is its own."""
    return tmp_path_factory.mktemp("kept") / "data"


@pytest.fixture(scope="module")
def site(runs, kept) -> Iterator[Site]:
    with serving(runs, kept, "--context", "480") as site:
        yield site


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser; closed after each module, since Playwright's event loop keeps Django from working in this process."""
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator[Page]:
    """A page; the test fails if it sends requests to another host, or if a script fails."""
    with watched(browser, 1440, 900) as page:
        yield page


@pytest.fixture(params=WIDTHS)
def any_page(browser, request) -> Iterator[Page]:
    """A page as wide as a desktop's, and one like a phone's."""
    with watched(browser, *WIDTHS[request.param]) as page:
        yield page


@contextmanager
def watched(browser: Browser, width: int, height: int) -> Iterator[Page]:
    """A page whose requests to other hosts and failing scripts are noticed."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(PATIENCE)
    foreign: list[str] = []
    faults: list[str] = []

    def look(request: Request) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            foreign.append(request.url)

    page.on("request", look)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Security Policy" in message.text else None)
    yield page
    page.context.close()
    assert not foreign
    assert not faults


def say(page: Page, site: Site, words: str, *, compare: str = "", model: str = "small", tokens: int = 30) -> None:
    """Write a message in the form and send it with the keyboard; the bundled model answers greedily."""
    if not page.url.startswith(f"{site.url}/chat/"):
        page.goto(site.url)
    page.click(".chosen")
    selects = page.locator("#models select")
    selects.nth(0).select_option(model)
    selects.nth(1).select_option(compare)
    page.fill("[name=max_tokens]", str(tokens))
    page.fill("[name=temperature]", "0" if model == BUNDLED else "0.7")
    page.keyboard.press("Escape")
    before = page.locator(".turn").count() if "/chat/" in page.url else 0
    page.fill("#prompt", words)
    page.press("#prompt", "Enter")
    page.wait_for_url("**/chat/*/")
    expect(page.locator(".turn")).to_have_count(before + 1, timeout=PATIENCE)


def wait_done(page: Page, answers: int = 1) -> None:
    """Wait until this many answers are complete."""
    expect(page.locator(".answer.done")).to_have_count(answers, timeout=PATIENCE)
