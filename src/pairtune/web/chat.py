"""Chat views."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from asgiref.sync import sync_to_async
from django import forms
from django.db import transaction
from django.db.models import Q
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest, StreamingHttpResponse
from django.shortcuts import aget_object_or_404, get_object_or_404, redirect, render
from django.template.loader import render_to_string
from django.views.decorators.http import require_GET, require_POST

from pairtune.web import answering, backend
from pairtune.web.models import Answer, Conversation, Turn

_SHOWN = 50  # conversations listed; search finds the others
_LONGEST = 1_200_000  # characters of a prompt: beyond any model's context, below the request limit


class Asked(forms.Form):
    """The form below a conversation."""

    prompt = forms.CharField(max_length=_LONGEST, strip=False)
    model = forms.CharField(max_length=300)
    compare = forms.CharField(max_length=300, required=False)
    temperature = forms.FloatField(min_value=0, max_value=2, initial=0.7)
    top_p = forms.FloatField(min_value=0.01, max_value=1, initial=1.0)
    max_tokens = forms.IntegerField(min_value=1, max_value=8192, initial=512)
    seed = forms.IntegerField(min_value=0, max_value=2**31 - 1, required=False)

    def clean_prompt(self) -> str:
        """Refuse an empty prompt."""
        prompt: str = self.cleaned_data["prompt"].replace("\r\n", "\n")
        if not prompt.strip():
            raise forms.ValidationError("Write something first.")
        return prompt

    @property
    def models(self) -> list[str]:
        """The models that answer."""
        return [each for each in (self.cleaned_data["model"], self.cleaned_data["compare"]) if each]

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters."""
        return {name: self.cleaned_data[name] for name in ("temperature", "top_p", "max_tokens", "seed")}


@require_GET
async def chat(request: HttpRequest, pk: int | None = None) -> HttpResponse:
    """Show a conversation, or start a new one."""
    conversation = await aget_object_or_404(Conversation, pk=pk) if pk else None
    models = await backend.models()
    return await sync_to_async(_page)(request, conversation, models)


def _page(request: HttpRequest, conversation: Conversation | None, found: list[dict[str, Any]] | None) -> HttpResponse:
    models = found or []
    chosen = list(conversation.model_names) if conversation else []
    wanted = request.GET.get("model")
    if not chosen:
        runs = [each["id"] for each in models if each.get("run")]
        chosen = [wanted] if wanted else runs[:1] or [each["id"] for each in models[:1]]
    known = {each["id"] for each in models}
    context = {
        "conversation": conversation,
        "turns": conversation.path() if conversation else [],
        "conversations": _found(""),
        "models": models,
        "reachable": found is not None,
        "gone": [each for each in chosen if models and each not in known],
        "chosen": chosen[0] if chosen else "",
        "second": chosen[1] if len(chosen) > 1 else "",
        "sampling": {"temperature": 0.7, "top_p": 1.0, "max_tokens": 512, "seed": None}
        | (conversation.sampling if conversation else {}),
        "prompt": request.GET.get("prompt", ""),
        "page": "chat",
    }
    return render(request, "site/chat.html", context)


def _found(words: str) -> list[Conversation]:
    """The latest conversations that contain all words in prompts, answers or title."""
    found = Conversation.objects.all()
    for word in words.split():
        matches = Q(title__icontains=word) | Q(turns__prompt__icontains=word) | Q(turns__answers__text__icontains=word)
        found = found.filter(pk__in=Conversation.objects.filter(matches).values("pk"))
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
        return _refuse(asked)
    edited = request.POST.get("turn", "")
    conversation, turn, answers = await sync_to_async(_say)(asked, pk, int(edited) if edited.isdecimal() else None)
    await _start_answers(conversation, turn, answers)
    return redirect("conversation", conversation.pk)


def _refuse(asked: Asked) -> HttpResponse:
    lines = [f"{field}: {' '.join(errors)}" for field, errors in asked.errors.items()]
    return HttpResponseBadRequest("\n".join(lines), content_type="text/plain; charset=utf-8")


@transaction.atomic
def _say(asked: Asked, pk: int | None, edited: int | None) -> tuple[Conversation, Turn, list[Answer]]:
    prompt = asked.cleaned_data["prompt"]
    if pk is None:
        conversation = Conversation.objects.create(title=" ".join(prompt.split())[:80])
    else:
        conversation = get_object_or_404(Conversation, pk=pk)
    parent = conversation.leaf_id
    if edited is not None:
        parent = get_object_or_404(conversation.turns, pk=edited).parent_id
    turn = Turn.objects.create(conversation=conversation, parent_id=parent, prompt=prompt)
    conversation.leaf, conversation.model_names, conversation.sampling = turn, asked.models, asked.sampling
    conversation.save()
    return conversation, turn, answering.make_answers(conversation, turn)


async def _start_answers(conversation: Conversation, turn: Turn, answers: list[Answer]) -> None:
    path = await sync_to_async(conversation.path)(turn.pk)
    for answer in answers:
        turns = await sync_to_async(answering.history)(turn, answer.slot, path)
        await answering.start(answer, turns)


@require_POST
async def again(request: HttpRequest, pk: int) -> HttpResponse:
    """Regenerate an answer: same model, same turn."""
    old = await aget_object_or_404(Answer.objects.select_related("turn__conversation"), pk=pk)
    await Answer.objects.filter(turn=old.turn, slot=old.slot).aupdate(current=False)
    new = await Answer.objects.acreate(turn=old.turn, slot=old.slot, model=old.model, sampling=old.sampling)
    await _start_answers(old.turn.conversation, old.turn, [new])
    return redirect("conversation", old.turn.conversation_id)


@require_POST
async def stop(_: HttpRequest, pk: int) -> HttpResponse:
    """Stop an answer."""
    await answering.stop(pk)
    return HttpResponse(status=204)


@require_POST
def choose(request: HttpRequest, pk: int) -> HttpResponse:
    """Show the next or previous answer in a slot (`step` 1 or -1)."""
    answer = get_object_or_404(Answer.objects.select_related("turn"), pk=pk)
    others = list(Answer.objects.filter(turn=answer.turn, slot=answer.slot).order_by("pk"))
    index = others.index(answer) + (1 if request.POST.get("step") == "1" else -1)
    for each in others:
        each.current = each == others[index % len(others)]
    Answer.objects.bulk_update(others, ["current"])
    return redirect("conversation", answer.turn.conversation_id)


@require_POST
def branch(request: HttpRequest, pk: int) -> HttpResponse:
    """Show another version of a turn, with the latest turns after it."""
    turn = get_object_or_404(Turn.objects.select_related("conversation"), pk=pk)
    others = list(Turn.objects.filter(conversation=turn.conversation, parent=turn.parent).order_by("pk"))
    index = others.index(turn) + (1 if request.POST.get("step") == "1" else -1)
    leaf = others[index % len(others)]
    while later := leaf.children.order_by("-pk").first():
        leaf = later
    Conversation.objects.filter(pk=turn.conversation_id).update(leaf=leaf)
    return redirect("conversation", turn.conversation_id)


@require_POST
async def delete(_: HttpRequest, pk: int) -> HttpResponse:
    """Delete a conversation."""
    async for answer in Answer.objects.filter(turn__conversation=pk, state="writing"):
        await answering.stop(answer.pk)
    await Conversation.objects.filter(pk=pk).adelete()
    return redirect("chat")


@require_GET
async def events(_: HttpRequest, pk: int) -> StreamingHttpResponse:
    """Stream an answer as server-sent events: `text` with the HTML so far, finally `done` with all of it."""

    async def stream() -> AsyncIterator[str]:
        async for writing in answering.follow(pk):
            context = {"text": writing.text, "queue": writing.queue}
            yield _event("text", render_to_string("site/_text.html", context))
        answer = await Answer.objects.select_related("turn").aget(pk=pk)
        shown = {each.pk: each for each in await sync_to_async(answer.turn.shown)()}
        html = render_to_string("site/_answer.html", {"answer": shown.get(pk, answer)})
        yield _event("done", html)

    await aget_object_or_404(Answer, pk=pk)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingHttpResponse(stream(), content_type="text/event-stream", headers=headers)


def _event(name: str, html: str) -> str:
    return f"event: {name}\n" + "".join(f"data: {line}\n" for line in html.splitlines()) + "\n"
