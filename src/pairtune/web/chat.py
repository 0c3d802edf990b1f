"""Chat views: pages for browsers without scripts, and the parts of them that htmx swaps in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from asgiref.sync import sync_to_async
from django.db import transaction
from django.db.models import Q
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest, JsonResponse, StreamingHttpResponse
from django.shortcuts import aget_object_or_404, get_object_or_404, redirect, render
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils.http import content_disposition_header
from django.utils.text import slugify
from django.views.decorators.http import require_GET, require_POST

from pairtune.web import answering, backend, ballots
from pairtune.web.chat_forms import MOST_MODELS, SAMPLING, Asked, Setup
from pairtune.web.introduction import Introduction, introduce
from pairtune.web.models import Answer, Conversation, Preset, Turn
from pairtune.web.rounds import answering as answering_model
from pairtune.web.sse import event

_SHOWN = 50  # conversations listed; search finds the others


@dataclass(frozen=True)
class ModelChoice:
    """One of the selects in which models are chosen; `gone` if the chosen one is not served any more."""

    chosen: str
    gone: bool = False


@require_GET
async def chat(request: HttpRequest, pk: int | None = None) -> HttpResponse:
    """Show a conversation, or start a new one."""
    conversation = await aget_object_or_404(Conversation.chats, pk=pk) if pk else None
    models = await backend.models()
    return await sync_to_async(_page)(request, conversation, models)


def _page(request: HttpRequest, conversation: Conversation | None, found: list[backend.Model] | None) -> HttpResponse:
    chosen = conversation.model_names if conversation else _first_choice(found or [], request.GET.get("model", ""))
    context = {
        "conversation": conversation,
        "turns": conversation.path() if conversation else [],
        "conversations": _found(""),
        "introduction": None if conversation else _introduction(found or [], chosen),
        "prompt": request.GET.get("prompt", ""),
        "presets": [_with_settings(each) for each in Preset.objects.all()],
        "system": conversation.system if conversation else "",
        "sampling": SAMPLING | (conversation.sampling if conversation else {}),
        "page": "chat",
        **_choices(found, chosen),
    }
    return render(request, "site/chat.html", context)


def _first_choice(found: list[backend.Model], wanted: str) -> list[str]:
    """The tuned model that was asked for, or else the one that is to answer, or the latest one; beside its base."""
    named = {each.id: each for each in found}
    model = named.get(wanted) or named.get(answering_model()[0]) or (found[0] if found else None)
    if model is None:
        return [wanted] if wanted else []
    base = next((each.id for each in found if each.is_base and each.id == model.base), model.id)
    return list(dict.fromkeys([model.id, base]))


def _choices(found: list[backend.Model] | None, chosen: list[str]) -> dict[str, Any]:
    known = {each.id for each in found or []}
    choices = [ModelChoice(name, gone=found is not None and name not in known) for name in chosen]
    return {
        "models": found or [],
        "reachable": found is not None,
        "choices": choices + [ModelChoice("")] * (MOST_MODELS - len(choices)),
        "chosen": chosen,
    }


def _introduction(found: list[backend.Model], chosen: list[str]) -> Introduction:
    run = next((each.run for each in found if each.id in chosen and each.run), "")
    return introduce(run)


def _with_settings(preset: Preset) -> dict[str, Any]:
    return {"name": preset.name, "settings": json.dumps({"system": preset.system, **preset.sampling})}


@require_GET
async def setup(request: HttpRequest) -> HttpResponse:
    """The models to choose from, which a page asks for again while the model server cannot be reached."""
    found = await backend.models()
    chosen = [name for name in request.GET.getlist("model") if name] or _first_choice(found or [], "")
    return render(request, "site/_models.html", _choices(found, chosen))


def _found(words: str) -> list[Conversation]:
    """The latest conversations that contain all words in prompts, answers or title, pinned ones first."""
    found = Conversation.chats.all()
    for word in words.split():
        prompts = Turn.objects.filter(prompt__icontains=word).values("conversation_id")
        answers = Answer.objects.filter(text__icontains=word).values("turn__conversation_id")
        found = found.filter(Q(title__icontains=word) | Q(pk__in=prompts) | Q(pk__in=answers))
    return list(found[:_SHOWN])


@require_GET
def search(request: HttpRequest) -> HttpResponse:
    """Search the list of conversations."""
    words = request.GET.get("q", "")
    return render(request, "site/_conversations.html", {"conversations": _found(words), "words": words})


@require_POST
async def say(request: HttpRequest, pk: int | None = None) -> HttpResponse:
    """Send a message: at the end, or in place of an earlier turn (`turn`), which stays as a branch."""
    asked = Asked(request.POST)
    if not await sync_to_async(asked.is_valid)():
        return asked.refusal()
    edited = request.POST.get("turn", "")
    number = int(edited) if edited.isdecimal() else None
    conversation, turn = await answering.to_its_end(_say_and_start(asked, pk, number))
    if not request.htmx:
        return redirect("conversation", conversation.pk)
    if pk is None:
        answer = HttpResponse(status=204)
        answer["HX-Redirect"] = reverse("conversation", args=(conversation.pk,))
        return answer
    return await sync_to_async(_turns if edited else _turn)(request, conversation, turn.pk)


async def _say_and_start(asked: Asked, pk: int | None, edited: int | None) -> tuple[Conversation, Turn]:
    """Keep a message and start its answers."""
    conversation, turn, answers = await sync_to_async(_say)(asked, pk, edited)
    await answering.start_all(conversation, turn, answers)
    return conversation, turn


def _turn(request: HttpRequest, conversation: Conversation, pk: int) -> HttpResponse:
    """One turn, as a part of a page."""
    return render(request, "site/_turn.html", {"turn": conversation.path(pk)[-1], "conversation": conversation})


def _turns(request: HttpRequest, conversation: Conversation, pk: int | None = None) -> HttpResponse:
    """All turns up to one, as a part of a page that takes the place of those shown."""
    context = {"turns": conversation.path(pk), "conversation": conversation}
    answer = render(request, "site/_turns.html", context)
    answer["HX-Retarget"], answer["HX-Reswap"] = "#turns", "innerHTML"
    return answer


@transaction.atomic
def _say(asked: Asked, pk: int | None, edited: int | None) -> tuple[Conversation, Turn, list[Answer]]:
    prompt = asked.cleaned_data["prompt"]
    if pk is None:
        conversation = Conversation.objects.create(title=" ".join(prompt.split())[:80])
    else:
        conversation = get_object_or_404(Conversation.chats, pk=pk)
    parent = conversation.leaf_id
    if edited is not None:
        parent = get_object_or_404(conversation.turns, pk=edited).parent_id
    turn = Turn.objects.create(conversation=conversation, parent_id=parent, prompt=prompt)
    conversation.leaf, conversation.model_names = turn, asked.cleaned_data["model"]
    conversation.system, conversation.sampling = asked.cleaned_data["system"], asked.sampling
    conversation.save()
    return conversation, turn, answering.make_answers(conversation, turn)


async def _changed_turn(request: HttpRequest, turn: Turn) -> HttpResponse:
    if request.htmx:
        return await sync_to_async(_turn)(request, turn.conversation, turn.pk)
    return redirect("conversation", turn.conversation_id)


@require_POST
async def again(request: HttpRequest, pk: int) -> HttpResponse:
    """Regenerate an answer: same model, same turn."""
    old = await aget_object_or_404(Answer.in_chats.select_related("turn__conversation"), pk=pk)
    await answering.to_its_end(_answer_anew(old))
    return await _changed_turn(request, old.turn)


async def _answer_anew(old: Answer) -> None:
    await Answer.objects.filter(turn=old.turn, slot=old.slot).aupdate(current=False)
    new = await Answer.objects.acreate(turn=old.turn, slot=old.slot, model=old.model, sampling=old.sampling)
    await answering.start_all(old.turn.conversation, old.turn, [new])


@require_POST
async def go_on(request: HttpRequest, pk: int) -> HttpResponse:
    """Go on with an answer that was cut off or stopped."""
    answer = await aget_object_or_404(Answer.in_chats.select_related("turn__conversation"), pk=pk)
    await answering.to_its_end(_write_on(answer))
    return await _changed_turn(request, answer.turn)


async def _write_on(answer: Answer) -> None:
    # Only one of two clicks goes on.
    if answer.can_continue and await Answer.objects.filter(pk=answer.pk, state=answer.state).aupdate(state="writing"):
        await answering.start_all(answer.turn.conversation, answer.turn, [answer])


@require_POST
async def stop(_: HttpRequest, pk: int) -> HttpResponse:
    """Stop an answer."""
    await answering.stop(pk)
    return HttpResponse(status=204)


@require_POST
async def choose(request: HttpRequest, pk: int) -> HttpResponse:
    """Show the next or previous answer in a slot (`step` 1 or -1)."""
    answer = await aget_object_or_404(Answer.in_chats.select_related("turn__conversation"), pk=pk)
    await sync_to_async(_choose)(answer, 1 if request.POST.get("step") == "1" else -1)
    return await _changed_turn(request, answer.turn)


@transaction.atomic
def _choose(answer: Answer, step: int) -> None:
    others = list(Answer.objects.filter(turn=answer.turn, slot=answer.slot).order_by("pk"))
    chosen = others[(others.index(answer) + step) % len(others)]
    for each in others:
        each.current = each == chosen
    Answer.objects.bulk_update(others, ["current"])


@require_POST
def branch(request: HttpRequest, pk: int) -> HttpResponse:
    """Show another version of a turn, with the latest turns after it."""
    turn = get_object_or_404(Turn.in_chats.select_related("conversation"), pk=pk)
    others = list(Turn.objects.filter(conversation=turn.conversation, parent=turn.parent).order_by("pk"))
    index = others.index(turn) + (1 if request.POST.get("step") == "1" else -1)
    leaf = others[index % len(others)]
    while later := leaf.children.order_by("-pk").first():
        leaf = later
    Conversation.objects.filter(pk=turn.conversation_id).update(leaf=leaf)
    if request.htmx:
        return _turns(request, turn.conversation, leaf.pk)
    return redirect("conversation", turn.conversation_id)


@require_POST
def vote(request: HttpRequest, pk: int) -> HttpResponse:
    """Give an answer a thumb (`up` 1 or 0); the same thumb again withdraws it."""
    answer, voter = get_object_or_404(Answer.in_chats, pk=pk), ballots.voter_of(request)
    ballots.give_thumb(answer, "up" if request.POST.get("up") == "1" else "down", voter)
    return ballots.remember(render(request, "site/_thumbs.html", {"answer": _as_shown(pk)}), voter)


@require_POST
def better(request: HttpRequest, pk: int) -> HttpResponse:
    """Prefer an answer to those beside it, or to the model's other answers; again withdraws that."""
    answer = get_object_or_404(Answer.in_chats.select_related("turn__conversation"), pk=pk)
    voter = ballots.voter_of(request)
    if len(answer.turn.shown) > 1 or answer.turn.answers.count() > 1:
        ballots.prefer(answer, voter)
    if not request.htmx:
        return ballots.remember(redirect("conversation", answer.turn.conversation_id), voter)
    return ballots.remember(_turn(request, answer.turn.conversation, answer.turn_id), voter)


@require_POST
async def delete(_: HttpRequest, pk: int) -> HttpResponse:
    """Delete a conversation."""
    async for answer in Answer.objects.filter(turn__conversation=pk, state="writing"):
        await answering.stop(answer.pk)
    await Conversation.chats.filter(pk=pk).adelete()
    return redirect("chat")


@require_POST
def rename(request: HttpRequest, pk: int) -> HttpResponse:
    """Give a conversation another title; an empty one changes nothing."""
    if title := " ".join(request.POST.get("title", "").split())[:200]:
        # An update, which leaves the time of the last change and thus the order of the list.
        Conversation.chats.filter(pk=pk).update(title=title)
    return redirect("conversation", pk)


@require_POST
def pin(_: HttpRequest, pk: int) -> HttpResponse:
    """Pin a conversation to the top of the list, or unpin it."""
    conversation = get_object_or_404(Conversation.chats, pk=pk)
    Conversation.objects.filter(pk=pk).update(pinned=not conversation.pinned)
    return redirect("conversation", pk)


@require_GET
def export(request: HttpRequest, pk: int) -> HttpResponse:
    """Download the conversation as it is shown: Markdown, or JSON with models, fingerprints and sampling."""
    conversation = get_object_or_404(Conversation.chats, pk=pk)
    name = slugify(conversation.title)[:60] or f"conversation-{pk}"
    if request.GET.get("format") == "json":
        answer: HttpResponse = JsonResponse(_as_json(conversation), json_dumps_params={"indent": 1})
        name += ".json"
    else:
        answer = HttpResponse(_as_markdown(conversation), content_type="text/markdown; charset=utf-8")
        name += ".md"
    answer["Content-Disposition"] = content_disposition_header(True, name) or "attachment"
    return answer


def _as_json(conversation: Conversation) -> dict[str, Any]:
    return {
        "title": conversation.title,
        "system": conversation.system,
        "turns": [
            {
                "prompt": turn.prompt,
                "answers": [
                    {
                        "model": each.model,
                        "fingerprint": each.fingerprint,
                        "sampling": each.sampling,
                        "text": each.text,
                        "finish_reason": each.reason if each.state == "done" else each.state,
                        "tokens": each.tokens,
                        "thumb": each.thumb or None,
                    }
                    for each in turn.shown
                ],
            }
            for turn in conversation.path()
        ],
    }


def _as_markdown(conversation: Conversation) -> str:
    parts = [f"# {conversation.title}"]
    if conversation.system:
        parts.append(f"**System:** {conversation.system}")
    for turn in conversation.path():
        parts.append(f"**You:** {turn.prompt}")
        parts += [f"**{each.model}** (`{each.fingerprint}`)**:** {each.text}" for each in turn.shown]
    return "\n\n".join(parts) + "\n"


@require_POST
def save_preset(request: HttpRequest) -> HttpResponse:
    """Save the system message and the sampling parameters under a name; an existing preset is replaced."""
    asked = Setup(request.POST)
    name = " ".join(request.POST.get("preset", "").split())[:60]
    if not asked.is_valid():
        return asked.refusal()
    if not name:
        return HttpResponseBadRequest("Name the preset first.", content_type="text/plain; charset=utf-8")
    values = {"system": asked.cleaned_data["system"], "sampling": asked.sampling}
    Preset.objects.update_or_create(name=name, defaults=values)
    presets = [_with_settings(each) for each in Preset.objects.all()]
    return render(request, "site/_presets.html", {"presets": presets, "saved": name})


@require_GET
async def events(_: HttpRequest, pk: int) -> StreamingHttpResponse:
    """Stream a turn's answers as server-sent events.

    `text` has an answer's number and its HTML so far, `done` the finished answer as a whole; `over` is the last event.
    One stream for all of a turn's answers, since browsers open only six connections to a host.
    """
    turn = await aget_object_or_404(Turn.in_chats, pk=pk)
    shown = await sync_to_async(lambda: turn.shown)()

    async def stream() -> AsyncIterator[str]:
        async for key, writing in answering.follow_all([answer.pk for answer in shown]):
            if writing:
                context = {"text": writing.text, "queue": writing.queue}
                # In a thread: a long answer takes a while to render, and other requests should not wait for it.
                yield event(
                    "text", answer=key, html=await asyncio.to_thread(render_to_string, "site/_text.html", context)
                )
            else:
                yield event("done", answer=key, html=await sync_to_async(_finished)(key))
        yield event("over")

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingHttpResponse(stream(), content_type="text/event-stream", headers=headers)


def _finished(pk: int) -> str:
    return render_to_string("site/_answer.html", {"answer": _as_shown(pk)})


def _as_shown(pk: int) -> Answer:
    """An answer with its place among the alternatives."""
    answer = Answer.objects.select_related("turn").get(pk=pk)
    return next((each for each in answer.turn.shown if each.pk == pk), answer)
