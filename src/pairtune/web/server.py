"""`pairtune serve`: the site and, unless another model server is named, its own worker."""

from __future__ import annotations

import ctypes
import os
import re
import ssl
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path

import uvicorn
from django.conf import settings

from pairtune.errors import BadInput, one_line
from pairtune.serve.listen import in_address, is_loopback, listening, own_names
from pairtune.serve.process import WorkerProcess


def serve(
    targets: Sequence[str],
    runs: Path,
    host: str,
    port: int,
    backend: str | None,
    worker_options: Sequence[str] = (),
    tls: tuple[Path, Path] | None = None,
    new_keys: bool = False,
) -> None:
    """Serve until the process is terminated.

    Args:
        targets: runs, adapters and models to talk to; none: every finished run in `runs`.
        runs: folder of the runs to show.
        host: address to listen on.
        port: port to listen on.
        backend: URL of a model server with an OpenAI-style API; None: start a worker.
        worker_options: options of `pairtune worker`.
        tls: a certificate and its key, for an encrypted connection.
        new_keys: replace the keys by which people of other machines enter.

    Raises:
        BadInput: the address is taken, a target cannot be served, or the certificate cannot be used.
    """
    if backend and not re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w./-]*)?", backend):
        raise BadInput(f"--backend {backend}: is not the URL of a server, such as http://127.0.0.1:11434/v1")
    if tls:
        _check_certificate(*tls)
    keep_memory_level()
    with listening(host, port) as bound:
        arguments = [*targets, *([] if targets else ["--runs", str(runs)]), *worker_options]
        worker = None if backend else WorkerProcess(arguments, meanwhile=prepare, moved=_use)
        os.environ.setdefault("DJANGO_SETTINGS_MODULE", "pairtune.web.settings")
        # Assigned, since `manage.py runserver` has read the environment already; before the pages are loaded.
        settings.PAIRTUNE_RUNS, settings.PAIRTUNE_BACKEND = runs.absolute(), backend or ""
        if not is_loopback(host):
            settings.PAIRTUNE_SHARED = True
            settings.ALLOWED_HOSTS = [*settings.ALLOWED_HOSTS, *own_names(host)]
        if tls:
            settings.CSRF_COOKIE_SECURE = settings.SESSION_COOKIE_SECURE = settings.SECURE_SSL_REDIRECT = True
            settings.SECURE_HSTS_SECONDS = settings.PAIRTUNE_HSTS_SECONDS
        if worker is None:
            prepare()
        with worker or nullcontext():
            if worker:
                settings.PAIRTUNE_KEY = worker.key
            name = "localhost" if host == "127.0.0.1" else in_address(host)
            scheme = "https" if tls else "http"
            if settings.PAIRTUNE_SHARED:
                _show_keys(new=new_keys)
                if not tls and not is_loopback(host):
                    print(_UNENCRYPTED, file=sys.stderr)
            print(f"{scheme}://{name}:{bound.getsockname()[1]}/  (Ctrl-C stops it)", flush=True)
            certificate, key = tls or (None, None)
            config = uvicorn.Config(
                "pairtune.web.asgi:application",
                log_level="warning",
                timeout_graceful_shutdown=3,
                server_header=False,
                ssl_certfile=certificate,
                ssl_keyfile=key,
            )
            with suppress(KeyboardInterrupt):  # the usual way to stop the site
                uvicorn.Server(config).run(sockets=[bound])


_UNENCRYPTED = (
    "warning: the connection is not encrypted, so that keys and texts can be read on the way; give --cert and --key, "
    "or let a proxy with TLS stand before it"
)


def _check_certificate(certificate: Path, key: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise BadInput(f"--cert {certificate}, --key {key}: cannot be used ({one_line(error)})") from error


def _show_keys(*, new: bool) -> None:
    """Show the keys by which people enter, if they are new: only their hashes are kept."""
    from pairtune.web.access import Role, has_keys, make_keys

    if has_keys() and not new:
        print("people enter with the keys that were shown before; --new-keys replaces them", file=sys.stderr)
        return
    may = {Role.OWNER: "may do everything", Role.VOTER: "may talk and vote", Role.VIEWER: "may look"}
    print("keys for this site, shown once:", file=sys.stderr)
    for role, key in make_keys().items():
        print(f"  {role.name.lower():6} {key}  ({may[role]})", file=sys.stderr)


def keep_memory_level() -> None:
    """Make memory that was freed of use to others, where the C library is glibc (figures in LOG.md).

    glibc gives each thread a heap of its own, whose free memory is of no use to the other threads. Under Python's lock
    they hardly ever allocate at the same time, so one is enough. It also learns to put ever larger blocks on the heap,
    where the pages' short-lived texts leave holes; texts of 32 kB and more are mapped and unmapped instead.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_M_ARENA_MAX, 1)
        library.mallopt(_M_MMAP_THRESHOLD, 32 * 1024)


_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h of glibc


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
    _refuse_later()
    call_command("migrate", verbosity=0)


def _refuse_later() -> None:
    """Refuse a database that a later version has changed: this one would write what that one cannot read.

    Raises:
        BadInput: the database is such a one.
    """
    from django.db import connection
    from django.db.migrations.loader import MigrationLoader

    loader = MigrationLoader(connection)
    later = loader.applied_migrations.keys() - loader.disk_migrations.keys()
    unknown = [name for app, name in later if app == "web"]
    if unknown:
        raise BadInput(
            f"{settings.DATABASES['default']['NAME']}: was changed by a later version of pairtune ({min(unknown)}); "
            "update pairtune, or name another folder with PAIRTUNE_SITE"
        )
