"""The arena: two anonymous models answer the same prompt, a person votes, and only then learns who they were.

Until the vote, nothing that reaches the browser depends on which model is which: pages and events have no names,
fingerprints, speeds or errors, both answers appear at one pace, and the pages of chats do not show these conversations.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import transaction
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest, StreamingHttpResponse
from django.shortcuts import aget_object_or_404, get_object_or_404, redirect, render
from django.template.loader import render_to_string
from django.views.decorators.http import require_GET, require_POST

from pairtune.votes.matches import next_match, rarest_prompts
from pairtune.web import answering, backend, ballots
from pairtune.web.chat_forms import SAMPLING, Question
from pairtune.web.introduction import held_out_prompts
from pairtune.web.models import Answer, Conversation, Turn, Vote
from pairtune.web.sse import event

OUTCOMES = ("left", "right", "tie", "bad")
_SUGGESTED = 3
# Characters a second in which both answers appear, unless a model is slower; a fast reader's pace.
_PACE, _TICK = 240, 0.1
_draw = random.SystemRandom()


@dataclass(frozen=True)
class Shown:
    """A turn as the arena shows it: both answers once both are written."""

    pk: int
    prompt: str
    answers: list[Answer]
    last: bool

    @property
    def written(self) -> bool:
        """Whether both answers are finished."""
        return all(answer.state != "writing" for answer in self.answers)

    @property
    def failed(self) -> bool:
        """Whether a model failed to answer."""
        return any(answer.state == "failed" or not answer.text.strip() for answer in self.answers)


@require_GET
async def arena(request: HttpRequest, pk: int | None = None) -> HttpResponse:
    """Show a match, or the start of a new one."""
    conversation = await aget_object_or_404(Conversation, pk=pk, arena=True) if pk else None
    found = await backend.models()
    return await sync_to_async(_page)(request, conversation, found)


def _page(request: HttpRequest, conversation: Conversation | None, found: list[backend.Model] | None) -> HttpResponse:
    turns = conversation.path() if conversation else []
    shown = [Shown(turn.pk, turn.prompt, turn.shown, turn is turns[-1]) for turn in turns]
    context = {
        "conversation": conversation,
        "turns": shown,
        "vote": _vote_of(conversation) if conversation else None,
        "models": _who_meets(found or []),
        "reachable": found is not None,
        "prompts": [] if conversation else _suggestions(found or []),
        "votes": sum(vote.compares and vote.withdrawn is None for vote in ballots.all_votes()),
        "page": "arena",
    }
    return render(request, "site/arena.html", context)


def _vote_of(conversation: Conversation) -> Vote | None:
    """The vote on a match, also if it was withdrawn: its voter knows who they were, so there is no second one."""
    return Vote.objects.filter(kind="arena", answer__turn__conversation=conversation).order_by("-pk").first()


def _who_meets(found: list[backend.Model]) -> dict[str, str]:
    """Winners of runs and base models, trials too where there are not two of these: names by weights."""
    main = {model.fingerprint or model.id: model.id for model in found if not model.run or "/" not in model.id}
    return main if len(main) > 1 else {model.fingerprint or model.id: model.id for model in found}


def _suggestions(found: list[backend.Model]) -> list[str]:
    """Prompts that were voted on least often."""
    prompts = held_out_prompts([model.run for model in found if model.run])
    return rarest_prompts(prompts, ballots.all_votes(), _SUGGESTED, _draw)


@require_POST
async def say(request: HttpRequest, pk: int | None = None) -> HttpResponse:
    """Start a match with a prompt, or go on with it."""
    asked = Question(request.POST)
    if not asked.is_valid():
        return asked.refusal()
    prompt = asked.cleaned_data["prompt"]
    if pk is None:
        models = _who_meets(await backend.models() or [])
        if len(models) < 2:
            return _refused("The arena needs two models. Tune one, and its base meets it here.")
        work = _start(prompt, models)
    else:
        work = _go_on(prompt, pk)
    conversation = await answering.to_its_end(work)
    if conversation is None:
        return _refused("This match is over, or its answers are not finished.")
    if request.htmx:
        answer = HttpResponse(status=204)
        answer["HX-Redirect"] = f"/arena/{conversation.pk}/"
        return answer
    return redirect("match", conversation.pk)


def _refused(words: str) -> HttpResponse:
    return HttpResponseBadRequest(words, content_type="text/plain; charset=utf-8")


async def _start(prompt: str, models: dict[str, str]) -> Conversation | None:
    conversation, turn, answers = await sync_to_async(_keep)(prompt, models)
    await answering.start_all(conversation, turn, answers)
    return conversation


@transaction.atomic
def _keep(prompt: str, models: dict[str, str]) -> tuple[Conversation, Turn, list[Answer]]:
    left, right = next_match(list(models), ballots.all_votes(), settings.PAIRTUNE_MATCHES, _draw)
    conversation = Conversation.objects.create(
        title="A match in the arena", arena=True, model_names=[models[left], models[right]], sampling=SAMPLING
    )
    return _add_turn(conversation, prompt)


def _add_turn(conversation: Conversation, prompt: str) -> tuple[Conversation, Turn, list[Answer]]:
    turn = Turn.objects.create(conversation=conversation, parent_id=conversation.leaf_id, prompt=prompt)
    conversation.leaf = turn
    conversation.save()
    return conversation, turn, answering.make_answers(conversation, turn)


async def _go_on(prompt: str, pk: int) -> Conversation | None:
    added = await sync_to_async(_keep_on)(prompt, pk)
    if added:
        await answering.start_all(*added)
    return added[0] if added else None


@transaction.atomic
def _keep_on(prompt: str, pk: int) -> tuple[Conversation, Turn, list[Answer]] | None:
    conversation = get_object_or_404(Conversation.objects.select_for_update(), pk=pk, arena=True)
    over = _vote_of(conversation) is not None
    if over or Answer.objects.filter(turn__conversation=conversation, state="writing").exists():
        return None
    return _add_turn(conversation, prompt)


@require_POST
def vote(request: HttpRequest, pk: int) -> HttpResponse:
    """Vote on the last answers of a match; the reply shows who they were."""
    voter = ballots.voter_of(request)
    outcome = request.POST.get("outcome", "")
    if outcome not in OUTCOMES:
        return _refused("Choose the left answer, the right one, a tie, or neither.")
    with transaction.atomic():
        conversation = get_object_or_404(Conversation.objects.select_for_update(), pk=pk, arena=True)
        turn = conversation.path()[-1]
        shown = Shown(turn.pk, turn.prompt, turn.shown, last=True)
        if request.POST.get("turn", str(turn.pk)) != str(turn.pk):
            return _refused("These are not the last answers of this match any more. Load the page again.")
        if not shown.written or shown.failed:
            return _refused("Both answers must be there before you vote. If one failed, skip this match.")
        given = _vote_of(conversation)
        if given is None:
            ballots.cast("arena", outcome, shown.answers, voter, request.POST.get("reason", ""))
        elif given.voter != voter:
            return _refused("Somebody else has voted on this match, so it is over.")
    return ballots.remember(redirect("match", pk), voter)


@require_POST
def withdraw(request: HttpRequest, pk: int) -> HttpResponse:
    """Withdraw one's own vote on a match."""
    given = _vote_of(get_object_or_404(Conversation, pk=pk, arena=True))
    if given and given.voter == ballots.voter_of(request):
        ballots.withdraw(given)
        return redirect("arena")
    return _refused("This vote was given in another browser.")


@require_GET
async def events(_: HttpRequest, pk: int) -> StreamingHttpResponse:
    """Stream the last answers of a match at one pace, as server-sent events.

    `left` and `right` have the text so far; `over` comes when both are written.
    """
    conversation = await aget_object_or_404(Conversation, pk=pk, arena=True)
    turns = await sync_to_async(conversation.path)()
    answers = await sync_to_async(lambda: turns[-1].shown)()
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingHttpResponse(_paced(answers), content_type="text/event-stream", headers=headers)


async def _paced(answers: list[Answer]) -> AsyncIterator[str]:
    """The texts, each cut at the same number of characters: that of the slower model, or the pace if it is less."""
    said = ["", ""]
    pace = 0.0
    while True:
        texts, over = await _texts(answers)
        pace = min([pace + _PACE * _TICK, *(len(text) for text, ended in zip(texts, over, strict=True) if not ended)])
        for side, text in enumerate(texts):
            cut = text[: int(pace)]
            if cut != said[side]:
                said[side] = cut
                html = await asyncio.to_thread(render_to_string, "site/_text.html", {"text": cut})
                yield event(("left", "right")[side], html=html)
        if all(over) and pace >= max(map(len, texts)):
            yield event("over")
            return
        await asyncio.sleep(_TICK)


async def _texts(answers: list[Answer]) -> tuple[list[str], list[bool]]:
    """The texts so far, and which of them have ended."""
    texts, over = [], []
    for answer in answers:
        text = answering.so_far(answer.pk)
        if text is None:
            saved = await Answer.objects.aget(pk=answer.pk)
            texts.append(saved.text)
            over.append(saved.state != "writing")
        else:
            texts.append(text)
            over.append(False)
    return texts, over


@require_GET
def standings(request: HttpRequest) -> HttpResponse:
    """The standings, the biases of votes, and what became of the votes."""
    votes = ballots.all_votes()
    context = {
        "standings": ballots.current_standings(),
        "account": ballots.current_account(),
        "even": round(100 / (1 + math.exp(-1))),
        "votes": votes,
        "page": "arena",
    }
    return render(request, "site/standings.html", context)


@require_GET
def download(_: HttpRequest) -> HttpResponse:
    """All votes as JSON lines, as `pairtune votes export` writes them."""
    lines = "".join(vote.model_dump_json() + "\n" for vote in ballots.all_votes())
    answer = HttpResponse(lines, content_type="application/jsonl; charset=utf-8")
    answer["Content-Disposition"] = 'attachment; filename="votes.jsonl"'
    return answer
