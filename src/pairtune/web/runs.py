"""The pages of the runs: list, one run, its files, and starting a new one."""

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

from pairtune.config import resolve
from pairtune.errors import BadInput
from pairtune.report.gather import COLUMNS
from pairtune.runs import write_atomic
from pairtune.web.curves import HEIGHT, WIDTH, curves
from pairtune.web.folders import all_runs, find_run, is_alive
from pairtune.web.models import Job


@require_GET
def runs(request: HttpRequest) -> HttpResponse:
    """All runs."""
    found = all_runs()
    started = {each.name for each in found}
    # A job whose folder is not there yet, or never came: what it says is shown.
    jobs = [(job, is_alive(job), _tail(Path(job.log))) for job in Job.objects.all() if job.name not in started]
    return render(
        request, "site/runs.html", {"runs": found, "jobs": jobs, "page": "runs", "root": settings.PAIRTUNE_RUNS}
    )


@require_GET
def run(request: HttpRequest, name: str) -> HttpResponse:
    """One run; while it trains, the part with the curves is asked for again and again."""
    shown = find_run(name)
    job = Job.objects.filter(name=name).first()
    context = {
        "run": shown,
        "titles": [title for title, _ in COLUMNS],
        "curves": curves(shown.trials),
        "box": f"0 0 {WIDTH} {HEIGHT}",
        "log": _tail(Path(job.log)) if job and shown.state != "finished" else "",
        "page": "runs",
    }
    return part_or_page(request, "site/_run.html", "site/run.html", context)


def part_or_page(request: HttpRequest, part: str, page: str, context: dict[str, Any]) -> HttpResponse:
    """What htmx asks for in a page that is there, or the whole page; caches are told that they differ."""
    alone = request.htmx and not request.htmx.history_restore_request
    answer = render(request, part if alone else page, context)
    patch_vary_headers(answer, ["HX-Request"])
    return answer


@require_GET
def report(_: HttpRequest, name: str) -> HttpResponse:
    """The run's own report. It is one file with its styles inside, which its policy names by their hashes."""
    file = find_run(name).folder.report
    if not file.is_file():
        raise Http404("The run has no report yet.")
    text = file.read_text(encoding="utf-8")
    inside = re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL)
    # The figures have theirs in attributes, which a policy allows by hash as well, if it says so.
    inside += {html.unescape(style) for style in re.findall(r'\sstyle="([^"]*)"', text)}
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in inside]
    policy = csp_replace({"style-src": ["'unsafe-hashes'", *hashes], "script-src": ["'none'"]})
    answer: HttpResponse = policy(lambda *_: HttpResponse(text))(_)
    return answer


@require_GET
def download(_: HttpRequest, name: str, what: str) -> HttpResponse:
    """The report, or the adapter (or whole model) as an archive."""
    shown = find_run(name)
    if what == "report" and shown.folder.report.is_file():
        headers = {"Content-Disposition": content_disposition_header(True, f"{name}-report.html") or "attachment"}
        return HttpResponse(shown.folder.report.read_bytes(), headers=headers)
    if what == "adapter" and shown.state == "finished":
        # Weights do not get smaller by packing; on disk, since a whole model may be larger than memory.
        packed = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the answer
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
            for file in sorted(shown.folder.best.iterdir()):
                archive.write(file, f"{name}/{file.name}")
        packed.seek(0)
        headers = {"Content-Disposition": content_disposition_header(True, f"{name}-adapter.zip") or "attachment"}
        return StreamingHttpResponse(_pieces(packed), content_type="application/zip", headers=headers)
    raise Http404("There is no such file in this run.")


async def _pieces(file: IO[bytes]) -> AsyncIterator[bytes]:
    with file:
        while piece := await asyncio.to_thread(file.read, 1 << 20):
            yield piece


class NewRun(forms.Form):
    """The settings that most runs differ in; the others are in a file for `pairtune tune`."""

    name = forms.SlugField(max_length=60, help_text="Of the run's folder")
    model = forms.CharField(max_length=300, initial="smollm2-135m", help_text="Hub id, folder, .gguf or smollm2-135m")
    data = forms.CharField(
        max_length=500, initial="bundled:concise", help_text="File, folder, Hub id or bundled:concise"
    )
    eval_data = forms.CharField(max_length=500, required=False, help_text="Else a tenth of the prompts")
    learning_rate = forms.CharField(initial="1e-4, 3e-4", help_text="One or more: a grid")
    beta = forms.CharField(initial="0.1", help_text="One or more")
    epochs = forms.IntegerField(min_value=1, max_value=100, initial=3)
    batch_size = forms.IntegerField(min_value=1, max_value=1024, initial=2)
    limit = forms.IntegerField(min_value=2, required=False, help_text="At most this many rows")
    on_bad_row = forms.ChoiceField(choices=[("stop", "stop"), ("skip", "skip and count")], help_text="A row at fault")

    def settings(self) -> dict[str, Any]:
        """Under the names of `pairtune tune`'s file.

        Raises:
            ValueError: a list of numbers has something else in it.
        """
        values = {key: value for key, value in self.cleaned_data.items() if value not in (None, "")}
        for key in ("learning_rate", "beta"):
            values[key] = [float(part) for part in values[key].replace(",", " ").split()]
        for key in ("data", "eval_data"):
            if key in values:
                values[key] = [values[key]]
        values["epochs"], values["batch_size"] = [values["epochs"]], [values["batch_size"]]
        values["out"] = str(settings.PAIRTUNE_RUNS / values.pop("name"))
        return values


@require_http_methods(["GET", "POST"])
def new(request: HttpRequest) -> HttpResponse:
    """Start a run: in a process that outlives page and site."""
    form = NewRun(request.POST or None, initial={"name": _free_name()})
    if request.method == "POST" and form.is_valid():
        name = form.cleaned_data["name"]
        try:
            values = form.settings()
            resolve(None, values)
            if (settings.PAIRTUNE_RUNS / name).exists() or Job.objects.filter(name=name).exists():
                raise BadInput(f"There is a run called {name} already.")
            _start(name, values)
            return redirect("runs")
        except (BadInput, ValueError) as error:
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
    """Forget a job that left no run."""
    for job in Job.objects.filter(name=name):
        if not is_alive(job):
            job.delete()
    return redirect("runs")


def _tail(log: Path) -> str:
    """The last lines of what a job said."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-12:])
