"""`python manage.py runserver [[HOST:]PORT]`: the same as `pairtune serve`, since answers need an ASGI server."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from pairtune.errors import BadInput, RunFailed
from pairtune.web.server import serve


class Command(BaseCommand):
    """Replaces Django's `runserver`, which does not serve asynchronous views."""

    help = "Starts the site with a model server, as `pairtune serve` does."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the arguments that Django's own command takes."""
        parser.add_argument("address", nargs="?", default="8000", help="PORT or HOST:PORT")
        parser.add_argument("--backend", help="URL of a running model server.")

    def handle(self, *_: Any, **options: Any) -> None:
        """Serve until Ctrl-C."""
        host, _, port = options["address"].rpartition(":")
        if not (port.isascii() and port.isdecimal() and len(port) <= 5):
            raise CommandError(f"{options['address']}: must be PORT or HOST:PORT")
        try:
            serve([], settings.PAIRTUNE_RUNS, host.strip("[]") or "127.0.0.1", int(port), options["backend"])
        except (BadInput, RunFailed) as error:
            raise CommandError(str(error)) from error
