"""Run views: the list, one run, two compared, notes, stopping and resuming."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from csp.decorators import csp_replace
from django.conf import settings
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.cache import patch_vary_headers
from django.utils.html import format_html
from django.utils.safestring import mark_safe
from django.views.decorators.http import require_GET, require_POST
from django_htmx.http import HttpResponseClientRedirect

from pairtune.report.charts import Chart, Line, draw
from pairtune.report.report_data import COLUMNS
from pairtune.report.series import charts
from pairtune.web import jobs
from pairtune.web.exports import CALLED, job_context
from pairtune.web.models import Job, RunNote, latest_jobs
from pairtune.web.rounds import answering, rounds_of
from pairtune.web.run_view import Drawn, ShownRun, all_runs, find_run

_MOST_COMPARED = 4
_NOTHING = "none"


@require_GET
def runs(request: HttpRequest) -> HttpResponse:
    """List all runs."""
    found = all_runs()
    notes = {note.run: note for note in RunNote.objects.all()}
    for each in found:
        each.note = notes.get(each.name)  # type: ignore[attr-defined]
    started = {each.name for each in found}
    awaited = request.GET.get("started", "")
    if awaited in started:  # the page of a run that was started here, as soon as there is one
        page = reverse("run", args=(awaited,))
        return HttpResponseClientRedirect(page) if request.htmx else redirect(page)
    # Jobs without a run folder (yet): what they say is shown.
    waiting = [
        (job, jobs.is_alive(job), jobs.tail(job)) for job in latest_jobs(("tune",)) if job.subject not in started
    ]
    live = any(alive for _, alive, _ in waiting) or any(each.state == "running" for each in found)
    context = {"runs": found, "jobs": waiting, "live": live, "page": "runs", "root": settings.PAIRTUNE_RUNS}
    context["awaited"] = awaited
    return part_or_page(request, "site/_runs.html", "site/runs.html", context)


@require_GET
def run(request: HttpRequest, name: str) -> HttpResponse:
    """Show one run."""
    shown = find_run(name)
    export = jobs.last(("export",), name)
    more = {"note": RunNote.objects.filter(run=name).first(), **(job_context(export) if export else {})}
    return render(request, "site/run.html", _context(shown) | more)


@require_GET
def live(request: HttpRequest, name: str) -> HttpResponse:
    """The part of a run's page that changes while it trains; its end reloads the page."""
    shown = find_run(name)
    answer = render(request, "site/_live.html", _context(shown))
    if shown.state != "running":
        answer["HX-Refresh"] = "true"
    return answer


def _context(shown: ShownRun) -> dict[str, Any]:
    return {
        "run": shown,
        "titles": [title for title, _ in COLUMNS],
        "log": jobs.tail(shown.job) if shown.job and shown.state != "finished" else "",
        "formats": CALLED,
        "rounds": rounds_of(shown.run),
        "answering": answering(),
        "page": "runs",
    }


@require_POST
def note(request: HttpRequest, name: str) -> HttpResponse:
    """Keep a note and tags about a run; an empty note is removed."""
    find_run(name)
    text, tags = request.POST.get("text", "").strip()[:4000], " ".join(request.POST.get("tags", "").split())[:200]
    if text or tags:
        RunNote.objects.update_or_create(run=name, defaults={"text": text, "tags": tags})
    else:
        RunNote.objects.filter(run=name).delete()
    return redirect("run", name)


@require_POST
def stop(_: HttpRequest, name: str) -> HttpResponse:
    """Ask a run to stop after its step, with a checkpoint."""
    if worker := find_run(name).worker:
        jobs.stop(worker)
    return redirect("run", name)


@require_POST
def resume(_: HttpRequest, name: str) -> HttpResponse:
    """Go on with an interrupted run."""
    shown = find_run(name)
    if shown.state == "interrupted":
        jobs.start("resume", name, ["resume", str(shown.paths.root)])
    return redirect("run", name)


@require_POST
def dismiss(_: HttpRequest, name: str) -> HttpResponse:
    """Forget the jobs of a run that left no folder."""
    for job in Job.objects.filter(kind="tune", subject=name):
        if not jobs.is_alive(job):
            job.delete()
    return redirect("runs")


@dataclass(frozen=True)
class Compared:
    """A row of a comparison: a setting or a number, and what each run has."""

    name: str
    values: list[str]

    @property
    def differs(self) -> bool:
        """Whether the runs have different values."""
        return len(set(self.values)) > 1


@require_GET
def compare(request: HttpRequest) -> HttpResponse:
    """Runs side by side: whether their numbers can be compared, the numbers, and the settings that differ."""
    names = list(dict.fromkeys(request.GET.getlist("run")))[:_MOST_COMPARED]
    found = [find_run(name) for name in names]
    if len(found) < 2:
        return redirect("runs")
    context = {
        "runs": found,
        "same_pairs": len({_held_out(each) for each in found}) == 1,
        "numbers": _numbers(found),
        "settings": [row for row in _settings(found) if row.differs],
        "charts": list(_charts_together(found)),
        "page": "runs",
    }
    return render(request, "site/compare.html", context)


def _held_out(run: ShownRun) -> tuple[str, str]:
    splits = run.data.splits if run.data else {}
    return tuple(splits[name].fingerprint if name in splits else "" for name in ("validation", "test"))  # type: ignore[return-value]


def _numbers(found: list[ShownRun]) -> list[Compared]:
    rows: dict[str, list[str]] = {}
    for run in found:
        verdict = {each.label: f"{each.value} ({each.interval})" for each in run.verdict.numbers} if run.verdict else {}
        for label in ("Preference accuracy", "Reward margin", "Answer length", "Audit"):
            rows.setdefault(label, []).append(verdict.get(label, _NOTHING))
        rows.setdefault("Training pairs", []).append(str(run.training_pairs or _NOTHING))
        rows.setdefault("Winner", []).append(next((each.label for each in run.trials if each.winner), _NOTHING))
    return [Compared(name, values) for name, values in rows.items()]


def _settings(found: list[ShownRun]) -> list[Compared]:
    every = [each.config.model_dump(mode="json") | each.config.dimensions if each.config else {} for each in found]
    names = dict.fromkeys(name for each in every for name in each if name != "out")
    return [Compared(name, [_shown(each.get(name)) for each in every]) for name in names]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_shown(each.get("source", each) if isinstance(each, dict) else each) for each in value)
    return _NOTHING if value is None else str(value)


def _charts_together(found: list[ShownRun]) -> list[Drawn]:
    """The winners' curves in one chart for each metric."""
    drawn: dict[str, list[Line]] = {}
    first: dict[str, Chart] = {}
    for number, run in enumerate(found):
        winner = [each.trial for each in run.trials if each.winner] or [each.trial for each in run.trials][:1]
        for name, chart in charts(winner, None).items():
            known = first.setdefault(name, chart)
            if known.base != chart.base:  # other losses, whose values for the base differ
                first[name] = replace(known, base=None)
            drawn.setdefault(name, []).append(Line(run.name, number, chart.lines[0].points))
    together = (replace(chart, lines=drawn[name]) for name, chart in first.items())
    return [Drawn(chart.title, mark_safe(draw(chart))) for chart in together]  # noqa: S308 - escaped where it is drawn


def part_or_page(request: HttpRequest, part: str, page: str, context: dict[str, Any]) -> HttpResponse:
    """Render the part for htmx requests, else the whole page, with a matching Vary header."""
    alone = request.htmx and not request.htmx.history_restore_request
    answer = render(request, part if alone else page, context)
    patch_vary_headers(answer, ["HX-Request"])
    return answer


@require_GET
def report(_: HttpRequest, name: str) -> HttpResponse:
    """Serve the run's report: one file, whose inline styles the policy allows by hash, with a link back."""
    file: Path = find_run(name).paths.report
    if not file.is_file():
        raise Http404("The run has no report yet.")
    back = format_html(
        '<p class="kind"><a href="{}">Back to {} in Pairtune</a></p>', reverse("run", args=(name,)), name
    )
    text = file.read_text(encoding="utf-8", errors="replace").replace("<header>", f"<header>{back}", 1)
    inside = re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL)
    # Reports of earlier versions have style attributes, which need 'unsafe-hashes' as well.
    attributes = {html.unescape(style) for style in re.findall(r'\sstyle="([^"]*)"', text)}
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'"
        for each in (*inside, *attributes)
    ]
    allowed = ["'unsafe-hashes'", *hashes] if attributes else hashes
    policy = csp_replace({"style-src": allowed, "script-src": ["'none'"]})
    answer: HttpResponse = policy(lambda *_: HttpResponse(text))(_)
    return answer
