"""`pairtune serve`: the site and, unless another model server is named, its own worker."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path

import uvicorn

from pairtune.errors import BadInput
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
    with _bound(host, port) as listening:
        arguments = [*targets, *([] if targets else ["--runs", str(runs)]), *worker_options]
        worker = None if backend else WorkerProcess(arguments, meanwhile=prepare)
        os.environ |= {
            "DJANGO_SETTINGS_MODULE": "pairtune.web.settings",
            "PAIRTUNE_RUNS": str(runs.absolute()),
            "PAIRTUNE_BACKEND": worker.url if worker else backend or "",
        }
        if host not in ("127.0.0.1", "localhost"):
            os.environ["PAIRTUNE_HOSTS"] = "*" if host in ("0.0.0.0", "::") else host  # noqa: S104 - asked for
        if worker is None:
            prepare()
        with worker or nullcontext():
            name = "localhost" if host == "127.0.0.1" else host
            print(f"http://{name}:{listening.getsockname()[1]}/  (Ctrl-C stops it)", flush=True)
            config = uvicorn.Config("pairtune.web.asgi:application", log_level="warning", timeout_graceful_shutdown=3)
            with suppress(KeyboardInterrupt):  # the usual way to stop the site
                uvicorn.Server(config).run(sockets=[listening])


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
    from django.conf import settings
    from django.core.management import call_command

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "pairtune.web.settings")
    django.setup()
    settings.PAIRTUNE_SITE.mkdir(parents=True, exist_ok=True)
    call_command("migrate", verbosity=0)


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Bind the site's address first, before anything slow."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With an explicit IPPROTO_TCP, or asyncio does not set TCP_NODELAY and every page takes 40 ms longer.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(128)  # early clients wait until the site is up
        except OSError as error:
            raise BadInput(
                f"--port {port}: cannot listen on {host}:{port} ({error.strerror}); choose another port"
            ) from error
        yield listening
