"""Who may do what on a site that other machines can reach: three keys, one for each role.

A site on the loopback address has no keys: who can reach it is a user of this machine. Otherwise a person enters with a
key, which a signed cookie remembers; keys are stored hashed, and shown once.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from enum import IntEnum
from typing import Any
from urllib.parse import urlencode

from django import forms
from django.conf import settings
from django.core.cache import caches
from django.core.exceptions import MiddlewareNotUsed
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.deprecation import MiddlewareMixin
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.http import require_http_methods, require_POST

from pairtune.web.models import AccessKey


class Role(IntEnum):
    """Roles, each of which includes those before it."""

    VIEWER = 1  # sees conversations, runs, pairs and standings
    VOTER = 2  # talks to models, and votes
    OWNER = 3  # starts and stops runs, changes and publishes what there is, and takes files away


NONE = 0
_WHO = {Role.VIEWER: "those who have entered", Role.VOTER: "voters and owners", Role.OWNER: "owners"}
_KEY_BYTES = 24
_ROLE, _GIVEN = "role", "key"  # of the session
_MINUTE = 60
# Wrong keys of one address within a minute. Keys are too long to be guessed: this only keeps the log and the database
# quiet, so the right one is always taken.
_MOST_GUESSES = 6

# Views that ask for less than an owner although they change something.
_OF_VOTERS = {
    *("say-first", "say", "stop", "again", "go-on", "choose", "vote", "better", "branch", "save-preset"),
    *("match-start", "match-say", "match-vote", "match-withdraw"),
}
# Views that ask for an owner although they only show something, or give it away.
_OF_OWNERS = {
    *("new-run", "draft", "check-draft", "draft-cost", "push", "export", "job"),
    *("download", "download-export", "download-votes", "export-conversation"),
}
_OPEN = {"enter", "leave", "icons"}


def needed(request: HttpRequest, view: str) -> int:
    """The role that a request needs; one that is not named here needs an owner to change something."""
    if view in _OPEN:
        return NONE
    if view in _OF_OWNERS:
        return Role.OWNER
    if request.method in ("GET", "HEAD"):
        return Role.VIEWER
    return Role.VOTER if view in _OF_VOTERS else Role.OWNER


def role_of(request: HttpRequest) -> int:
    """The role of whoever sends a request; 0: nobody who has entered."""
    role, given = request.session.get(_ROLE, NONE), request.session.get(_GIVEN)
    known = AccessKey.objects.filter(role=role).first() if role else None
    return Role(role) if known and known.hash == given else NONE  # keys that were replaced open nothing any more


def make_keys() -> dict[Role, str]:
    """New keys for all roles, which replace the old ones; only their hashes are kept."""
    keys = {role: secrets.token_urlsafe(_KEY_BYTES) for role in reversed(Role)}
    for role, key in keys.items():
        AccessKey.objects.update_or_create(role=role, defaults={"hash": _hash(key)})
    return keys


def _hash(key: str) -> str:
    # Keys are 192 random bits, which nobody guesses, so that a slow hash would only make entering slow.
    return hashlib.sha256(key.encode()).hexdigest()


def has_keys() -> bool:
    """Whether keys were made before."""
    return AccessKey.objects.exists()


def count_of(what: str, who: str) -> int:
    """How often somebody has done something within this minute, this time included."""
    name = f"rate:{what}:{who}:{int(time.time()) // _MINUTE}"
    caches["counts"].add(name, 0, 2 * _MINUTE)
    return int(caches["counts"].incr(name))


def address_of(request: HttpRequest) -> str:
    """The address that a request comes from."""
    return str(request.META.get("REMOTE_ADDR", ""))


class Guard(MiddlewareMixin):
    """Middleware that lets through what a role may do, and not too much of it; a site on loopback has none."""

    def __init__(self, get_response: Any) -> None:
        if not settings.PAIRTUNE_SHARED:
            raise MiddlewareNotUsed
        super().__init__(get_response)

    def process_view(self, request: HttpRequest, *_: object) -> HttpResponse | None:
        """Refuse a request before its view is called; None lets it through."""
        request.role = role = role_of(request)
        view = request.resolver_match.view_name if request.resolver_match else ""
        if request.method == "POST" and count_of("posts", address_of(request)) > settings.PAIRTUNE_POSTS:
            return _refuse(request, 429, "Too many requests from your address. Wait a minute.")
        if role >= (least := needed(request, view)):
            return None
        if role == NONE and request.method == "GET" and not request.headers.get("HX-Request"):
            return redirect(f"{reverse('enter')}?{urlencode({'next': request.path})}")
        return _refuse(request, 403, f"Only {_WHO[Role(least)]} may do this. Enter with another key.")


def _refuse(request: HttpRequest, status: int, message: str) -> HttpResponse:
    if request.headers.get("HX-Request"):
        return HttpResponse(message, status=status, content_type="text/plain; charset=utf-8")
    return render(request, "site/closed.html", {"message": message}, status=status)


class Entry(forms.Form):
    """The key that a person was given."""

    key = forms.CharField(
        max_length=200,
        label="Key",
        help_text="Whoever started this site has it.",
        widget=forms.PasswordInput(attrs={"autocomplete": "current-password", "autofocus": True}),
    )


@require_http_methods(["GET", "POST"])
def enter(request: HttpRequest) -> HttpResponse:
    """Take a key, and remember its role."""
    wanted = request.POST.get("next", request.GET.get("next", "/"))
    if not url_has_allowed_host_and_scheme(wanted, None) or not wanted.startswith("/"):
        wanted = "/"
    form = Entry(request.POST or None)
    if request.method == "POST" and form.is_valid():
        if known := AccessKey.objects.filter(hash=_hash(form.cleaned_data["key"].strip())).first():
            request.session.flush()
            request.session[_ROLE], request.session[_GIVEN] = known.role, known.hash
            return redirect(wanted)
        if count_of("guesses", address_of(request)) > _MOST_GUESSES:
            form.add_error("key", "Too many wrong keys. Wait a minute.")
            return render(request, "site/enter.html", {"form": form, "next": wanted}, status=429)
        form.add_error("key", "This is none of the site's keys.")
    return render(request, "site/enter.html", {"form": form, "next": wanted}, status=403 if form.errors else 200)


@require_POST
def leave(request: HttpRequest) -> HttpResponse:
    """Forget the key."""
    request.session.flush()
    return redirect("enter")
