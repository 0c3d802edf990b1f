"""Votes in the database: cast, withdrawn, read back, and frozen in a file to train on."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Count, Max, Q
from django.http import HttpRequest, HttpResponse

from pairtune.conversation import Message
from pairtune.votes.pairs import Harvest, harvest
from pairtune.votes.records import Kind, Outcome, VotedAnswer
from pairtune.votes.records import Vote as VoteRecord
from pairtune.votes.standings import Standings, standings
from pairtune.web import answering
from pairtune.web.models import Answer, Vote

_COOKIE, _YEAR = "voter", 365 * 24 * 3600
REASON = 1000  # characters


def voter_of(request: HttpRequest) -> str:
    """The anonymous session of a browser; a new one if it has none yet."""
    return request.COOKIES.get(_COOKIE, "")[:32] or secrets.token_hex(8)


def remember(response: HttpResponse, voter: str) -> HttpResponse:
    """Let a browser keep its session."""
    response.set_cookie(_COOKIE, voter, max_age=_YEAR, httponly=True, samesite="Strict")
    return response


def cast(kind: Kind, outcome: Outcome, answers: Sequence[Answer], voter: str, reason: str = "") -> Vote:
    """Add a vote on one or two answers, with what is needed to trust it.

    The vote is committed when the transaction around it ends, and a commit is synced to the disk before it returns.
    """
    before = [_context(answer) for answer in answers]
    same = all(each == before[0] for each in before)
    left, *right = answers
    return Vote.objects.create(
        kind=kind,
        outcome=outcome,
        prompt=before[0] if same else [{"role": "user", "content": left.turn.prompt}],
        answers=[
            VotedAnswer(
                model=answer.model,
                fingerprint=answer.fingerprint,
                text=answer.text,
                tokens=answer.tokens,
                finish=answer.reason,
                sampling=answer.sampling,
                context=[] if same else context,
            ).model_dump()
            for answer, context in zip(answers, before, strict=True)
        ],
        reason=reason[:REASON],
        answer=left,
        right=right[0] if right else None,
        voter=voter,
    )


def _context(answer: Answer) -> list[Message]:
    turn = answer.turn
    before = answering.history(turn.conversation, turn, answer.slot, turn.conversation.path(turn.pk))
    return [{"role": each["role"], "content": each["content"]} for each in before]


@transaction.atomic
def give_thumb(answer: Answer, outcome: Outcome, voter: str) -> None:
    """Give an answer a thumb; the same thumb again withdraws one's own."""
    standing = answer.votes.filter(kind="thumb", withdrawn=None, voter=voter)
    same = standing.filter(outcome=outcome).exists()
    standing.update(withdrawn=datetime.now())
    if not same:
        cast("thumb", outcome, [answer], voter)


@transaction.atomic
def prefer(answer: Answer, voter: str) -> None:
    """Prefer an answer to those beside it, or else to the other ones that the same model gave; again withdraws that.

    One vote for each answer that it is preferred to. A preference for one of them is withdrawn first.
    """
    shown = [each for each in answer.turn.shown if each.text and each.state != "writing"]
    kind: Kind = "side by side"
    if len(shown) == 1:
        kind = "regenerated"
        others = answer.turn.answers.filter(slot=answer.slot).exclude(state="writing").exclude(text="")
        shown = sorted(others, key=lambda each: each.pk)
    at = next((place for place, each in enumerate(shown) if each.pk == answer.pk), None)
    if at is None:  # another answer has taken its place meanwhile
        return
    own = Vote.objects.filter(kind=kind, withdrawn=None, voter=voter)
    before = own.filter(Q(answer=answer, outcome="left") | Q(right=answer, outcome="right")).exists()
    own.filter(Q(answer__in=shown) | Q(right__in=shown)).update(withdrawn=datetime.now())
    if before:
        return
    for place, other in enumerate(shown):
        if place != at:
            left = at < place
            cast(kind, "left" if left else "right", [answer, other] if left else [other, answer], voter)


def withdraw(vote: Vote) -> None:
    """Withdraw a vote; it stays on record."""
    Vote.objects.filter(pk=vote.pk, withdrawn=None).update(withdrawn=datetime.now())


def all_votes() -> tuple[VoteRecord, ...]:
    """Every vote, in the order in which they were given, those withdrawn included."""
    return _votes_of(_state())


def current_standings() -> Standings | None:
    """The standings of all votes."""
    return _standings_of(_state())


def current_account() -> dict[str, Any]:
    """How many pairs and labels the votes give, and what became of the others; see `Harvest.account`."""
    return _account_of(_state())


# Votes are only ever added or withdrawn, so these three numbers tell whether anything has changed.
_State = tuple[int, int | None, int]


def _state() -> _State:
    found = Vote.objects.aggregate(given=Count("pk"), last=Max("pk"), withdrawn=Count("withdrawn"))
    return found["given"], found["last"], found["withdrawn"]


@lru_cache(maxsize=1)
def _votes_of(_: _State) -> tuple[VoteRecord, ...]:
    return tuple(
        VoteRecord(
            id=vote.pk,
            kind=vote.kind,
            outcome=vote.outcome,
            prompt=vote.prompt,
            answers=vote.answers,
            reason=vote.reason,
            voter=vote.voter,
            created=vote.created.isoformat(timespec="seconds"),
            withdrawn=vote.withdrawn.isoformat(timespec="seconds") if vote.withdrawn else None,
        )
        for vote in Vote.objects.iterator()
    )


@lru_cache(maxsize=1)
def _standings_of(state: _State) -> Standings | None:
    return standings(_votes_of(state))


@lru_cache(maxsize=1)
def _account_of(state: _State) -> dict[str, Any]:
    return harvest(_votes_of(state)).account()  # the rows are for snapshots: memory would grow with them


def snapshot(*, single: bool = False) -> tuple[Path, Harvest]:
    """Freeze the pairs of all votes in a file, which a run trains on and which later votes do not change.

    Args:
        single: for an unpaired loss: single answers with their labels, thumbs too, instead of pairs.

    Returns:
        The file, and what became of the votes.
    """
    found = harvest(all_votes())
    folder = settings.PAIRTUNE_SITE / "votes"
    path = folder / f"votes-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}.jsonl"
    found.write_rows(path, single=single)
    return path, found
