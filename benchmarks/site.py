"""How long the site takes for its pages, with a thousand conversations and a finished run: median of 50 requests each.

python benchmarks/site.py RUNS    # a folder with a finished run called demo; run nothing else meanwhile
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from site_server import serving
from talker import talking
from test_site_walk import fill

ROUNDS = 50
PAGES = (
    *("/", "/chat/500/", "/chat/search?q=Question", "/runs/", "/runs/new", "/runs/demo/", "/runs/demo/pairs"),
    *("/runs/demo/report", "/runs/demo/push"),
)


def main() -> None:
    runs = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder, talking() as (address, _):
        data = Path(folder) / "data"
        with serving(runs, data, "--backend", address):
            pass
        fill(data / "site.sqlite3")
        with serving(runs, data, "--backend", address) as site, httpx.Client(base_url=site.url) as client:
            print(f"{'page':28}{'median ms':>10}{'slowest':>9}{'kB':>7}")
            for path in PAGES:
                sizes = [len(client.get(path).content) for _ in range(2)]
                seconds = []
                for _ in range(ROUNDS):
                    started = time.perf_counter()
                    client.get(path).raise_for_status()
                    seconds.append(time.perf_counter() - started)
                median, slowest = statistics.median(seconds) * 1e3, max(seconds) * 1e3
                print(f"{path:28}{median:10.1f}{slowest:9.1f}{sizes[-1] / 1000:7.1f}")


if __name__ == "__main__":
    main()
