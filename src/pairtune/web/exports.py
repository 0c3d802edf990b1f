"""Taking a model elsewhere: downloads, exports with their check, and publishing with a preview of the card."""

from __future__ import annotations

import asyncio
import re
import tempfile
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from django import forms
from django.conf import settings
from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils.http import content_disposition_header
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from pairtune.web import jobs
from pairtune.web.models import Job
from pairtune.web.run_view import ShownRun, find_run

FORMATS = {"adapter": [], "merged": [], "gguf": ["--quant", "q8_0"]}
CALLED = {"adapter": "Adapter (PEFT)", "merged": "Whole model", "gguf": "GGUF (llama.cpp, Ollama)"}


def _finished(name: str) -> ShownRun:
    shown = find_run(name)
    if shown.state != "finished":
        raise Http404("The run has not finished.")
    return shown


@require_GET
def download(_: HttpRequest, name: str, what: str) -> HttpResponse:
    """Download the report, or the adapter (or whole model) as an archive."""
    shown = find_run(name)
    if what == "report" and shown.paths.report.is_file():
        headers = {"Content-Disposition": content_disposition_header(True, f"{name}-report.html") or "attachment"}
        return HttpResponse(shown.paths.report.read_bytes(), headers=headers)
    if what == "adapter" and shown.state == "finished":
        return _archive(shown.paths.best, name, f"{name}-adapter.zip")
    raise Http404("There is no such file in this run.")


def _archive(folder: Path, inside: str, name: str) -> HttpResponse:
    # Uncompressed, since weights do not shrink; on disk, since a whole model may exceed memory.
    packed = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the response
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(file, f"{inside}/{file.relative_to(folder)}")
    packed.seek(0)
    headers = {"Content-Disposition": content_disposition_header(True, name) or "attachment"}
    return StreamingHttpResponse(_pieces(packed), content_type="application/zip", headers=headers)


async def _pieces(file: IO[bytes]) -> AsyncIterator[bytes]:
    with file:
        while piece := await asyncio.to_thread(file.read, 1 << 20):
            yield piece


@require_POST
def export(request: HttpRequest, name: str) -> HttpResponse:
    """Export the model in one of `FORMATS`; the export is loaded again and compared with the trained model."""
    shown, form = _finished(name), request.POST.get("format", "")
    if form not in FORMATS:
        raise Http404("There is no such format.")
    root: Path = settings.PAIRTUNE_SITE / "exports"
    root.mkdir(parents=True, exist_ok=True)
    target = Path(tempfile.mkdtemp(dir=root)) / f"{name}-{form}"
    arguments = ["export", str(shown.paths.root), "--format", form, "--to", str(target), *FORMATS[form]]
    started = jobs.start("export", name, arguments, detail=str(target))
    return render(request, "site/_job.html", job_context(started)) if request.htmx else redirect("run", name)


@require_GET
def job(request: HttpRequest, pk: int) -> HttpResponse:
    """How an export or a publication is getting on."""
    return render(request, "site/_job.html", job_context(get_object_or_404(Job, pk=pk)))


@require_POST
def stop(_: HttpRequest, pk: int) -> HttpResponse:
    """Stop a process that the site has started."""
    jobs.stop(get_object_or_404(Job, pk=pk))
    return redirect("runs")


def job_context(found: Job) -> dict[str, object]:
    """What a page shows of an export or a publication."""
    alive, said = jobs.is_alive(found), jobs.output(found).strip()
    return {
        "job": found,
        "alive": alive,
        "said": re.sub(r"^\S+: ", "", said) if found.kind == "export" else said,
        "failed": not alive and not said,
        "complaint": jobs.complaint(found),
        "link": said.splitlines()[-1] if found.kind == "push" and said.startswith("http") else "",
    }


@require_GET
def download_export(_: HttpRequest, pk: int) -> HttpResponse:
    """Download a finished export as an archive."""
    found = get_object_or_404(Job, pk=pk, kind="export")
    folder = Path(found.detail)
    if jobs.is_alive(found) or not folder.is_dir():
        raise Http404("The export is not there.")
    return _archive(folder, folder.name, f"{folder.name}.zip")


class Publication(forms.Form):
    """Where a model is published."""

    repo = forms.RegexField(
        r"^[\w.-]+/[\w.-]+$",
        max_length=96,
        label="Repository",
        help_text="USER/NAME on the Hugging Face Hub; it is created if it does not exist.",
        error_messages={"invalid": "Write it as USER/NAME, with letters, digits, dots and hyphens."},
    )
    what = forms.ChoiceField(label="What", choices=[(each, each) for each in FORMATS], initial="adapter")
    private = forms.BooleanField(label="Private", required=False, initial=True)
    share_prompts = forms.BooleanField(
        label="With prompts",
        required=False,
        help_text="Publish prompts, answers and pairs in card and report; otherwise only numbers and figures leave.",
    )


@require_http_methods(["GET", "POST"])
def push(request: HttpRequest, name: str) -> HttpResponse:
    """Publish a run's model, after a look at the card that would be published."""
    shown = _finished(name)
    shares = bool(shown.config and shown.config.share_prompts)
    form = Publication(request.POST or None, initial={"share_prompts": shares})
    if request.method == "POST" and form.is_valid():
        chosen = form.cleaned_data
        more = ["--share-prompts" if chosen["share_prompts"] else "--no-share-prompts"]
        more += ["--private"] if chosen["private"] else []
        arguments = ["push", str(shown.paths.root), "--repo", chosen["repo"], "--what", chosen["what"], *more]
        jobs.start("push", name, arguments, detail=chosen["repo"])
        return redirect("push", name)
    last = jobs.last(("push",), name)
    card = shown.paths.card.read_text(encoding="utf-8", errors="replace") if shown.paths.card.is_file() else ""
    front, body = _split(card)
    context = {
        "run": shown,
        "form": form,
        "front": front,
        "card": body,
        "signed_in": _signed_in(),
        "page": "runs",
        **(job_context(last) if last else {}),
    }
    return render(request, "site/push.html", context, status=400 if form.errors else 200)


def _signed_in() -> bool:
    """Whether this machine has a key of the Hub; the key itself stays where it is."""
    from huggingface_hub import get_token

    return get_token() is not None


def _split(card: str) -> tuple[str, str]:
    """The card's front matter and its text."""
    found = re.match(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL)
    return (found[1], found[2]) if found else ("", card)
