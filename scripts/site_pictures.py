"""Take pictures of every page of the site.

python scripts/site_pictures.py RUNS FOLDER    # RUNS has a finished run called demo
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from site_server import CHROMIUM, PATIENCE, Site, serving

SIZES = {1440: 900, 768: 1024, 390: 844}
ANSWERING = 300_000  # milliseconds
PAGES = {
    "chat-empty": "/",
    "runs": "/runs/",
    "run": "/runs/demo/",
    "pairs": "/runs/demo/pairs?order=margin&split=validation",
    "report": "/runs/demo/report",
    "push": "/runs/demo/push",
    "compare": "/runs/compare?run=demo&run=again",
    "new-run": "/runs/new",
    "missing": "/nowhere",
}


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        runs = Path(folder) / "runs"
        shutil.copytree(source / "demo", runs / "demo")
        shutil.copytree(source / "demo", runs / "again")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        with serving(runs, Path(folder) / "data") as site:
            pages = {**PAGES, "chat": _talk(browser, site), "draft": _draft(browser, site)}
            for name, path in pages.items():
                _take(browser, site.url + path, target, name)
        browser.close()


@contextmanager
def _page(browser: Browser, width: int, scheme: str = "light") -> Iterator[Page]:
    page = browser.new_page(viewport={"width": width, "height": SIZES[width]}, color_scheme=scheme)
    page.set_default_timeout(PATIENCE)
    yield page
    page.close()


def _talk(browser: Browser, site: Site) -> str:
    """A short conversation with the tuned model beside its base; returns its path."""
    with _page(browser, 1440) as page:
        page.goto(f"{site.url}/?model=demo")
        page.locator("[data-say]").first.click()
        page.wait_for_url("**/chat/*/")
        for count, words in ((2, ""), (4, "Give me a short table of three birds and their weights.")):
            if words:
                page.fill("#prompt", words)
                page.click("#send")
            expect(page.locator(".answer.done")).to_have_count(count, timeout=ANSWERING)
        return page.url.removeprefix(site.url)


def _draft(browser: Browser, site: Site) -> str:
    """A run that is being prepared, its data checked; returns its path."""
    with _page(browser, 1440) as page:
        page.goto(f"{site.url}/runs/new")
        page.get_by_role("button", name="Use bundled:concise").click()
        expect(page.locator("#check .state").first).to_be_visible(timeout=ANSWERING)
        return page.url.removeprefix(site.url)


def _take(browser: Browser, address: str, target: Path, name: str) -> None:
    for width in SIZES:
        for scheme in ("light", "dark") if width == 1440 else ("light",):
            with _page(browser, width, scheme) as page:
                page.goto(address)
                page.wait_for_timeout(500)
                page.screenshot(path=target / f"{name}-{width}-{scheme}.png")


if __name__ == "__main__":
    main()
