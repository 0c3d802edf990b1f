"""`pairtune serve`: the site and, unless another server of models is named, a worker of its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
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
    """Serve until the process is told to end.

    Args:
        targets: runs, adapters and models to talk to; none: every finished run in `runs`.
        runs: folder of the runs that are shown.
        host: address to listen on.
        port: of the site.
        backend: a server of models that speaks OpenAI's protocol; None: a worker of our own.
        worker_options: for `pairtune worker`.

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
            print(f"http://{name}:{listening.getsockname()[1]}/  (Ctrl-C ends it)", flush=True)
            config = uvicorn.Config("pairtune.web.asgi:application", log_level="warning", timeout_graceful_shutdown=3)
            with suppress(KeyboardInterrupt):  # that is how a person ends it
                uvicorn.Server(config).run(sockets=[listening])


def prepare() -> None:
    """The database as this version needs it, and no answer that nobody writes."""
    import django
    from django.conf import settings
    from django.core.management import call_command

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "pairtune.web.settings")
    django.setup()
    settings.PAIRTUNE_SITE.mkdir(parents=True, exist_ok=True)
    call_command("migrate", verbosity=0)
    from pairtune.web.answering import forget_unfinished

    forget_unfinished()


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """The site's own address, taken before anything takes time."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, or asyncio does not switch Nagle's delay off, and every page takes 40 ms longer.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(128)  # whoever comes before the site is up waits
        except OSError as error:
            raise BadInput(
                f"--port {port}: {host}:{port} cannot be listened on ({error.strerror}); choose another"
            ) from error
        yield listening
