"""Takes the screenshots in docs/site: every page of a running site, 1440 and 390 pixels wide.

pairtune serve --runs RUNS --port 8765 &
python scripts/screenshots.py http://127.0.0.1:8765 --finished demo --live OTHER
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).parents[1] / "docs" / "site"
SIZES = {1440: 900, 390: 844}


def main() -> None:
    """Chat with the finished run and its base, then take the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--finished", required=True)
    parser.add_argument("--live", required=True)
    args = parser.parse_args()
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(args.address)
        page.select_option("#model", args.finished)
        page.select_option("#compare", index=1)
        for number, question in enumerate(("What is a lighthouse for?", "Who looks after it?")):
            page.fill("#prompt", question)
            page.keyboard.press("Enter")
            page.wait_for_selector(f".answer.done >> nth={2 * number + 1}", timeout=180_000)
        pages = {
            "chat-empty": "/",
            "chat": page.url.removeprefix(args.address),
            "runs": "/runs/",
            "run": f"/runs/{args.finished}/",
            "run-live": f"/runs/{args.live}/",
            "pairs": f"/runs/{args.finished}/pairs?disagrees=on",
            "new-run": "/runs/new",
            "report": f"/runs/{args.finished}/report",
            "missing": "/nowhere",
        }
        for width, height in SIZES.items():
            page.set_viewport_size({"width": width, "height": height})
            for name, path in pages.items():
                page.goto(args.address + path)
                keep(page, FOLDER / f"{name}-{width}.png")
        browser.close()


def keep(page: Page, file: Path) -> None:
    """Save a screenshot with a palette of 64 colours, enough for these pages, so that the files stay small."""
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(64).save(file, optimize=True)


if __name__ == "__main__":
    main()
