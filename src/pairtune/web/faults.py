"""What a person is told when the database cannot be written: the disk is full, or may not be written to."""

from __future__ import annotations

import logging

from django.db import OperationalError
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils.deprecation import MiddlewareMixin

log = logging.getLogger(__name__)

_INSUFFICIENT_STORAGE = 507
# What SQLite and PostgreSQL say of it.
_NO_ROOM = ("full", "No space left", "disk I/O error", "readonly")


def no_room(error: Exception) -> bool:
    """Whether an error means that the database's disk is full or cannot be written to."""
    return isinstance(error, OperationalError) and any(each in str(error) for each in _NO_ROOM)


class NoRoom(MiddlewareMixin):
    """Middleware that answers such an error in a sentence; the request has changed nothing then."""

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        """Answer; None leaves other errors alone."""
        if not no_room(error):
            return None
        log.warning("the database cannot be written: %s", error)
        told = "The site's disk is full or cannot be written to, so nothing was kept. Free some space, and try again."
        if request.headers.get("HX-Request"):
            return HttpResponse(told, status=_INSUFFICIENT_STORAGE, content_type="text/plain; charset=utf-8")
        context = {"title": "Not kept", "message": told}
        return render(request, "site/closed.html", context, status=_INSUFFICIENT_STORAGE)
