"""Run views: the list, one run, its files, and starting a new run."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any

import psutil
import yaml
from csp.decorators import csp_replace
from django import forms
from django.conf import settings
from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.utils.cache import patch_vary_headers
from django.utils.http import content_disposition_header
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from pairtune.errors import BadInput
from pairtune.files import write_atomic
from pairtune.options import OPTIONS, Option
from pairtune.report.report_data import COLUMNS
from pairtune.resolve_config import resolve
from pairtune.web.live_curves import HEIGHT, WIDTH, curves
from pairtune.web.models import Job
from pairtune.web.run_view import all_runs, find_run, is_alive


@require_GET
def runs(request: HttpRequest) -> HttpResponse:
    """List all runs."""
    found = all_runs()
    started = {each.name for each in found}
    # Jobs without a run folder (yet): their output is shown.
    jobs = [(job, is_alive(job), _tail(Path(job.log))) for job in Job.objects.all() if job.name not in started]
    return render(
        request, "site/runs.html", {"runs": found, "jobs": jobs, "page": "runs", "root": settings.PAIRTUNE_RUNS}
    )


@require_GET
def run(request: HttpRequest, name: str) -> HttpResponse:
    """Show one run; while it trains, htmx polls this view for the part with the curves."""
    shown = find_run(name)
    job = Job.objects.filter(name=name).first()
    context = {
        "run": shown,
        "titles": [title for title, _ in COLUMNS],
        "curves": curves([each.trial for each in shown.trials]),
        "box": f"0 0 {WIDTH} {HEIGHT}",
        "log": _tail(Path(job.log)) if job and shown.state != "finished" else "",
        "page": "runs",
    }
    return part_or_page(request, "site/_run.html", "site/run.html", context)


def part_or_page(request: HttpRequest, part: str, page: str, context: dict[str, Any]) -> HttpResponse:
    """Render the part for htmx requests, else the whole page, with a matching Vary header."""
    alone = request.htmx and not request.htmx.history_restore_request
    answer = render(request, part if alone else page, context)
    patch_vary_headers(answer, ["HX-Request"])
    return answer


@require_GET
def report(_: HttpRequest, name: str) -> HttpResponse:
    """Serve the run's report: one file, whose inline styles the policy allows by hash."""
    file = find_run(name).paths.report
    if not file.is_file():
        raise Http404("The run has no report yet.")
    text = file.read_text(encoding="utf-8")
    inside = re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL)
    # The figures' style attributes need 'unsafe-hashes' as well.
    inside += {html.unescape(style) for style in re.findall(r'\sstyle="([^"]*)"', text)}
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in inside]
    policy = csp_replace({"style-src": ["'unsafe-hashes'", *hashes], "script-src": ["'none'"]})
    answer: HttpResponse = policy(lambda *_: HttpResponse(text))(_)
    return answer


@require_GET
def download(_: HttpRequest, name: str, what: str) -> HttpResponse:
    """Download the report, or the adapter (or whole model) as an archive."""
    shown = find_run(name)
    if what == "report" and shown.paths.report.is_file():
        headers = {"Content-Disposition": content_disposition_header(True, f"{name}-report.html") or "attachment"}
        return HttpResponse(shown.paths.report.read_bytes(), headers=headers)
    if what == "adapter" and shown.state == "finished":
        # Uncompressed, since weights do not shrink; on disk, since a whole model may exceed memory.
        packed = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the response
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
            for file in sorted(shown.paths.best.iterdir()):
                archive.write(file, f"{name}/{file.name}")
        packed.seek(0)
        headers = {"Content-Disposition": content_disposition_header(True, f"{name}-adapter.zip") or "attachment"}
        return StreamingHttpResponse(_pieces(packed), content_type="application/zip", headers=headers)
    raise Http404("There is no such file in this run.")


async def _pieces(file: IO[bytes]) -> AsyncIterator[bytes]:
    with file:
        while piece := await asyncio.to_thread(file.read, 1 << 20):
            yield piece


# The form's settings, and its initial values where they are not the defaults; other settings need `pairtune tune`.
_SHOWN = ("model", "data", "eval_data", "learning_rate", "beta", "epochs", "batch_size", "limit", "on_bad_row")
_INITIAL = {"data": "bundled:concise", "learning_rate": "1e-4, 3e-4", "beta": "0.1"}


def _field(option: Option) -> forms.Field:
    """Make a form field for a setting."""
    initial = _INITIAL.get(option.name, option.default)
    if option.choices:
        return forms.ChoiceField(choices=[(each, each) for each in option.choices], help_text=option.help)
    if option.type is int and not option.varies:
        return forms.IntegerField(min_value=1, required=initial is not None, initial=initial, help_text=option.help)
    several = " Several values form a grid." if option.varies else ""
    return forms.CharField(
        max_length=500, required=initial is not None, initial=initial, help_text=option.help + several
    )


class NewRun(forms.Form):
    """The form of a new run: its name and the settings in `_SHOWN`."""

    name = forms.SlugField(max_length=60, help_text="Name of the run's folder.")

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.fields |= {name: _field(OPTIONS[name]) for name in _SHOWN}

    def clean(self) -> dict[str, Any]:
        """Parse the settings that may form a grid into lists."""
        cleaned: dict[str, Any] = super().clean() or self.cleaned_data
        for option in (OPTIONS[name] for name in _SHOWN if name in cleaned and OPTIONS[name].varies):
            try:
                cleaned[option.name] = [option.type(part) for part in cleaned[option.name].replace(",", " ").split()]
            except ValueError:
                kind = "whole numbers" if option.type is int else "numbers"
                self.add_error(option.name, f"Enter {kind}, separated by commas (given: {cleaned[option.name]}).")
        return cleaned

    def settings(self) -> dict[str, Any]:
        """The settings as in a file for `pairtune tune`."""
        values = {key: value for key, value in self.cleaned_data.items() if value not in (None, "")}
        return values | {"out": str(settings.PAIRTUNE_RUNS / values.pop("name"))}


@require_http_methods(["GET", "POST"])
def new(request: HttpRequest) -> HttpResponse:
    """Start a run in a process that outlives the page and the site."""
    form = NewRun(request.POST or None, initial={"name": _free_name()})
    if request.method == "POST" and form.is_valid():
        name = form.cleaned_data["name"]
        try:
            values = form.settings()
            resolve(None, values)
            if (settings.PAIRTUNE_RUNS / name).exists() or Job.objects.filter(name=name).exists():
                raise BadInput(f"There is already a run named {name}.")
            _start(name, values)
            return redirect("runs")
        except BadInput as error:
            form.add_error(None, str(error))
    return render(request, "site/new.html", {"form": form, "page": "runs"}, status=400 if form.errors else 200)


def _free_name() -> str:
    taken = {each.name for each in all_runs()} | set(Job.objects.values_list("name", flat=True))
    return next(name for number in range(1, 10_000) if (name := f"run-{number}") not in taken)


def _start(name: str, values: dict[str, Any]) -> None:
    folder: Path = settings.PAIRTUNE_SITE / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    settings.PAIRTUNE_RUNS.mkdir(parents=True, exist_ok=True)
    file, log = folder / f"{name}.yaml", folder / f"{name}.log"
    write_atomic(file, yaml.safe_dump(values))
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "pairtune", "tune", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    Job.objects.create(name=name, pid=process.pid, born=psutil.Process(process.pid).create_time(), log=str(log))


@require_POST
def dismiss(_: HttpRequest, name: str) -> HttpResponse:
    """Delete a job that left no run."""
    for job in Job.objects.filter(name=name):
        if not is_alive(job):
            job.delete()
    return redirect("runs")


def _tail(log: Path) -> str:
    """The last lines of a job's log."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-12:])
