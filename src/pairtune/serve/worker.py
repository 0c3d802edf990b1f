"""The worker: the process that owns the models and serves the HTTP API. It has no pages."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from pairtune.errors import BadInput
from pairtune.serve.api import make_app
from pairtune.serve.catalogue import Catalogue
from pairtune.serve.listen import KEY, in_address, is_loopback, listening, own_names
from pairtune.serve.request import Limits


def run_worker(
    targets: Sequence[str], root: Path | None, host: str, port: int, limits: Limits, *, attached: bool = False
) -> None:
    """Serve until the process is terminated or, if `attached`, standard input ends.

    Its address is the first line of standard output, as soon as it is known; then it loads the first model.

    Raises:
        BadInput: a target cannot be served, or the address is taken.
    """
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    with listening(host, port) as bound:
        _serve(targets, root, host, bound, limits, attached=attached)


def _serve(
    targets: Sequence[str], root: Path | None, host: str, bound: socket.socket, limits: Limits, *, attached: bool
) -> None:
    key = os.environ.pop(KEY, "")
    if not key and not is_loopback(host):
        key = secrets.token_urlsafe(24)
        print(f"key for this server, shown once (set {KEY} to choose one): {key}", file=sys.stderr)
    print(f"http://{in_address(host)}:{bound.getsockname()[1]}/v1  (Ctrl-C stops it)", flush=True)
    if attached:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads what a library may print there
    catalogue = Catalogue(targets, root, limits)
    models = catalogue.available()  # reads all weights once
    if targets and not models:
        raise BadInput(f"{', '.join(targets)}: cannot be served; the base model cannot be found")
    if models:
        catalogue.open(models[0])  # so that the first answer does not wait
    app = make_app(catalogue, own_names(host) if is_loopback(host) else ["*"], key)  # there the key is what counts
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    if attached:
        threading.Thread(target=_end_with_input, args=[server], daemon=True).start()
    server.run(sockets=[bound])


def _end_with_input(server: uvicorn.Server) -> None:
    """Exit when standard input ends: the parent process is gone."""
    sys.stdin.buffer.read()
    server.should_exit = True
    time.sleep(5)
    os._exit(0)
