"""`pairtune serve`: the site and, unless another model server is named, its own worker."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path

import uvicorn
from django.conf import settings

from pairtune.errors import BadInput
from pairtune.serve.listen import is_loopback, listening
from pairtune.serve.process import WorkerProcess


def serve(
    targets: Sequence[str],
    runs: Path,
    host: str,
    port: int,
    backend: str | None,
    worker_options: Sequence[str] = (),
) -> None:
    """Serve until the process is terminated.

    Args:
        targets: runs, adapters and models to talk to; none: every finished run in `runs`.
        runs: folder of the runs to show.
        host: address to listen on.
        port: port to listen on.
        backend: URL of a model server with an OpenAI-style API; None: start a worker.
        worker_options: options of `pairtune worker`.

    Raises:
        BadInput: the address is taken, or a target cannot be served.
    """
    if backend and not re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w./-]*)?", backend):
        raise BadInput(f"--backend {backend}: is not the URL of a server, such as http://127.0.0.1:11434/v1")
    with listening(host, port) as bound:
        arguments = [*targets, *([] if targets else ["--runs", str(runs)]), *worker_options]
        worker = None if backend else WorkerProcess(arguments, meanwhile=prepare, moved=_use)
        os.environ |= {
            "DJANGO_SETTINGS_MODULE": "pairtune.web.settings",
            "PAIRTUNE_RUNS": str(runs.absolute()),
            "PAIRTUNE_BACKEND": backend or "",
        }
        if not is_loopback(host):
            os.environ["PAIRTUNE_HOSTS"] = "*" if host in ("0.0.0.0", "::") else host  # noqa: S104 - asked for
        if worker is None:
            prepare()
        with worker or nullcontext():
            if worker:
                settings.PAIRTUNE_KEY = worker.key
            name = "localhost" if host == "127.0.0.1" else host
            print(f"http://{name}:{bound.getsockname()[1]}/  (Ctrl-C stops it)", flush=True)
            config = uvicorn.Config("pairtune.web.asgi:application", log_level="warning", timeout_graceful_shutdown=3)
            with suppress(KeyboardInterrupt):  # the usual way to stop the site
                uvicorn.Server(config).run(sockets=[bound])


def _use(url: str) -> None:
    """Talk to the worker where it listens now."""
    settings.PAIRTUNE_BACKEND = url


def prepare() -> None:
    """Migrate the database, mark interrupted answers as failed, and load the pages, so that the first is not slow."""
    open_database()
    from pairtune.web.answering import forget_unfinished

    forget_unfinished()
    import_module("pairtune.web.asgi")
    import_module("pairtune.web.urls")


def open_database() -> None:
    """Make the site's database usable in this process, whether or not a site is running."""
    import django
    from django.core.management import call_command

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "pairtune.web.settings")
    django.setup()
    settings.PAIRTUNE_SITE.mkdir(parents=True, exist_ok=True)
    call_command("migrate", verbosity=0)
