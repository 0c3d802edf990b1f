"""From a file to a run: choose the data, see what is in it, settle what its columns hold, see the cost, start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml
from django import forms
from django.conf import settings
from django.core.files.uploadedfile import UploadedFile
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils.safestring import SafeString, mark_safe
from django.views.decorators.http import require_GET, require_http_methods, require_POST
from pydantic import ValidationError

from pairtune.config import UNPAIRED, Reading, SourceConfig
from pairtune.cost import Cost, estimate
from pairtune.data.column_names import proposed_columns
from pairtune.data.columns import columns_in
from pairtune.data.formats import Format
from pairtune.data.inspection import Plan
from pairtune.data.source_reader import SourceReader
from pairtune.errors import BadInput
from pairtune.files import write_atomic
from pairtune.options import OPTIONS
from pairtune.report.charts import bars
from pairtune.report.render_plan import time_range
from pairtune.resolve_config import resolve
from pairtune.web import ballots, jobs
from pairtune.web.models import Draft, Job
from pairtune.web.pair_edits import edited_source
from pairtune.web.run_form import ELSEWHERE, INITIAL, Settings, plainly
from pairtune.web.run_view import all_runs, find_run

# As sources: pairs of the votes given here; every answer that a vote or a thumb judged, for unpaired losses.
BUNDLED, VOTES, THUMBS = "bundled:concise", "votes", "thumbs"
_MODEL = "smollm2-135m"
_ROWS = 5  # shown of a file whose columns have to be named
_CELL = 400  # characters shown of one cell
# What a column may hold, in words; `flags.COLUMN_PARTS` has the same parts.
PARTS = {
    "prompt": "the prompt",
    "chosen": "the better answer",
    "rejected": "the worse answer",
    "answer_a": "answer A",
    "answer_b": "answer B",
    "completion": "the only answer, for kto or bco",
    "label": "says which answer is better, or whether the only one is good",
    "score_a": "score of answer A",
    "score_b": "score of answer B",
    "answers": "a list of answers",
    "scores": "their scores",
    "system": "the system message",
}
_VALUES = ("label_a", "label_b")  # not columns, but values of the label


class DataChoice(forms.Form):
    """The first step: data and model."""

    upload = forms.FileField(required=False, label="A file from this computer")
    source = forms.CharField(
        required=False,
        max_length=1000,
        label="A path or a dataset of the Hub",
        help_text="A .jsonl, .json, .csv or .parquet file (also .gz), a folder, or a Hub id such as "
        "org/name@train, or votes, or thumbs. Several: one per line.",
        widget=forms.Textarea(attrs={"rows": 1}),
    )
    held_out = forms.CharField(
        required=False,
        max_length=1000,
        label="Pairs to measure with",
        help_text="Empty: a tenth of the data is held out. Otherwise a path or Hub id, as above.",
    )
    model = forms.CharField(
        max_length=500,
        initial=_MODEL,
        label="Model to tune",
        help_text=f"{_MODEL} comes with Pairtune. Also a folder, a .gguf file, a Hub id, or a finished run.",
        error_messages={"required": "Name the model to tune."},
    )

    def clean(self) -> dict[str, Any]:
        """Make sure that there is data, and that local data exists."""
        cleaned: dict[str, Any] = super().clean() or self.cleaned_data
        if not cleaned.get("upload") and not cleaned.get("source"):
            self.add_error("source", "Choose a file, or write where the data is.")
        for field in ("source", "held_out"):
            for name in _lines(cleaned.get(field) or ""):
                if name in (VOTES, THUMBS):
                    found = ballots.current_account()
                    if name == VOTES and not found["pairs"]:
                        self.add_error(
                            field, "No vote gives a pair yet. Vote in the arena, or prefer answers in a chat."
                        )
                    if name == THUMBS and not found["labels"]:
                        self.add_error(
                            field, "No answer was judged yet. Press a thumb in a chat, or vote in the arena."
                        )
                    continue
                try:
                    SourceReader.open(SourceConfig(source=name), "--data", Reading(), None)
                except BadInput as error:
                    self.add_error(field, plainly(str(error), name))
                except OSError as error:  # a name that is too long, a folder that may not be read
                    self.add_error(field, f"{name[:80]}: {error.strerror}.")
        return cleaned


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


@require_http_methods(["GET", "POST"])
def choose_data(request: HttpRequest) -> HttpResponse:
    """The first step of a new run."""
    asked = {name: request.GET[name] for name in ("source", "model") if request.GET.get(name)}
    form = DataChoice(request.POST or None, request.FILES or None, initial=asked)
    if request.method == "POST" and form.is_valid():
        chosen = form.cleaned_data
        source = str(_keep(chosen["upload"])) if chosen["upload"] else "\n".join(_frozen(_lines(chosen["source"])))
        made = Draft.objects.create(
            source=source, held_out="\n".join(_frozen(_lines(chosen["held_out"]))), model=chosen["model"]
        )
        _start_check(made)
        return redirect("draft", made.pk)
    recent = dict.fromkeys(Draft.objects.order_by("-pk").values_list("source", flat=True)[:20])
    context = {"form": form, "recent": [each for each in recent if each != BUNDLED][:4], "page": "runs"}
    account = ballots.current_account()
    context |= {"bundled": BUNDLED, "votes": account["pairs"], "thumbs": account["labels"]}
    return render(request, "site/new.html", context, status=400 if form.errors else 200)


def _frozen(names: list[str]) -> list[str]:
    """The sources, with the votes or the answers that they judge as they are now in a file of their own."""
    return [str(ballots.snapshot(single=name == THUMBS)[0]) if name in (VOTES, THUMBS) else name for name in names]


def _keep(upload: UploadedFile) -> Path:
    """Keep an uploaded file under its own name, in a folder of its own."""
    root: Path = settings.PAIRTUNE_SITE / "uploads"
    root.mkdir(parents=True, exist_ok=True)
    number = next(number for number in range(1, 1_000_000) if not (root / str(number)).exists())
    folder = root / str(number)
    folder.mkdir()
    name = re.sub(r"[^\w.-]+", "-", Path(upload.name or "data.jsonl").name).strip(".-")[-100:] or "data.jsonl"
    with (folder / name).open("wb") as file:
        for chunk in upload.chunks():
            file.write(chunk)
    return folder / name


@require_POST
def clone(request: HttpRequest, name: str) -> HttpResponse:
    """Prepare a run with the settings of another one; with `edited`, with its pairs as they were marked."""
    config = find_run(name).config
    if config is None:
        return redirect("run", name)
    every = config.model_dump(mode="json") | config.dimensions
    changed = config.model_dump(mode="json", exclude_defaults=True) | config.dimensions
    # The form suggests values of its own for some settings, so those are kept even where they are the defaults.
    kept = {
        key: _as_text(value)
        for key, value in (changed | {key: every[key] for key in INITIAL}).items()
        if key in OPTIONS and key not in ELSEWHERE
    }
    named = edited_source if request.POST.get("edited") else str
    made = Draft.objects.create(
        source="\n".join(named(each.source) for each in config.data),
        held_out="\n".join(named(each.source) for each in config.eval_data or ()),
        model=config.model,
        mixing={
            named(each.source): more
            for each in config.sources
            if (more := {key: value for key in ("weight", "columns") if (value := getattr(each, key))})
        },
        columns=dict(config.columns),
        confirmed=config.accept_columns,
        settings=kept,
    )
    _start_check(made)
    return redirect("draft", made.pk)


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return str(value.get("source", value))
    return ", ".join(map(_as_text, value)) if isinstance(value, list | tuple) else str(value)


def _start_check(made: Draft) -> None:
    """Start the process that reads the data and measures this machine; an earlier one is stopped."""
    if earlier := jobs.last(("plan",), str(made.pk)):
        jobs.stop(earlier)
    formats, problem = _probe(made)
    if problem:
        return
    losses = str(made.settings.get("loss", "")).split(", ")
    if any(each and each.single for each in formats) and not set(losses) & set(UNPAIRED):
        made.settings = made.settings | {"loss": UNPAIRED[0]}
        made.save()
    file: Path = settings.PAIRTUNE_SITE / "drafts" / f"{made.pk}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, yaml.safe_dump(_data_settings(made) | {"on_bad_row": "skip"}))
    jobs.start("plan", str(made.pk), ["plan", str(file), "--json"])


def _data_settings(made: Draft) -> dict[str, Any]:
    """The settings of a draft's data and model, as in a file for `pairtune tune`."""
    found: dict[str, Any] = {"data": _sources(made, made.source), "model": made.model}
    if made.held_out:
        found["eval_data"] = _sources(made, made.held_out)
    if set(losses := str(made.settings.get("loss", "")).split(", ")) & set(UNPAIRED):
        found["loss"] = losses
    if made.columns:
        found |= {"columns": made.columns, "accept_columns": made.confirmed}
    return found


def _sources(made: Draft, lines: str) -> list[dict[str, Any]]:
    """The sources of some lines, each with its own weight and columns."""
    return [{"source": name, **made.mixing.get(name, {})} for name in _lines(lines)]


def _problem(made: Draft) -> str:
    """Why the data's first rows cannot be read as they are; empty if they can."""
    return _probe(made)[1]


def _probe(made: Draft) -> tuple[list[Format | None], str]:
    """The formats of the data's first rows, or why they cannot be read as they are."""
    found: list[Format | None] = []
    reading = Reading(made.columns, confirmed=made.confirmed, wanted="either")
    for source in (*_sources(made, made.source), *_sources(made, made.held_out)):
        try:
            found.append(SourceReader.open(SourceConfig(**source), "--data", reading, None).probe())
        except BadInput as error:
            return [], str(error)
    return found, ""


@dataclass(frozen=True)
class Column:
    """A column of a file: what it is taken to hold, and its first values."""

    name: str
    part: str
    values: list[str]


def _columns(made: Draft) -> list[Column]:
    """The columns of the first source, with what the person said of them, or else what their names suggest."""
    source = _lines(made.source)[0]
    try:
        reader = SourceReader.open(SourceConfig(source=source), "--data", Reading(), None)
        if reader.source.hub:
            return []
        rows = [row.content for row in islice(reader.source.rows(_ROWS), _ROWS)]
    except BadInput:
        return []
    rows = [row for row in rows if isinstance(row, Mapping)]
    names = dict.fromkeys(str(name) for row in rows for name in row)
    said = made.columns or (proposed_columns(rows[0]) if rows else {})
    of = {each: part for part, name in said.items() for each in columns_in(part, name)}
    return [Column(name, of.get(name, ""), [_cell(row.get(name)) for row in rows]) for name in names]


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _CELL else f"{text[:_CELL]} …"


@require_POST
def check(request: HttpRequest, pk: int) -> HttpResponse:
    """Take what the person says of the columns, or that the better answer is right, and look again."""
    made = get_object_or_404(Draft, pk=pk)
    if request.POST.get("confirm"):
        made.confirmed = True
    else:
        columns: dict[str, str] = {}
        for name, part in zip(request.POST.getlist("column"), request.POST.getlist("part"), strict=False):
            if part in PARTS:
                several = part == "label" and part in columns  # one for each annotator
                columns[part] = f"{columns[part]},{name}" if several else name
        columns |= {part: value for part in _VALUES if (value := request.POST.get(part, "").strip())}
        made.columns, made.confirmed = columns, False
    if typed := {field: request.POST[field] for field in Settings().fields if field in request.POST}:
        made.settings = typed
    made.save()
    _start_check(made)
    return render(request, "site/_check.html", _findings(made)) if request.htmx else redirect("draft", pk)


@require_http_methods(["GET", "POST"])
def draft(request: HttpRequest, pk: int) -> HttpResponse:
    """The further steps: what is in the data, the settings, the cost, the start."""
    made = get_object_or_404(Draft, pk=pk)
    form = Settings(request.POST or None, initial={"name": _free_name(), **made.settings})
    if request.method == "POST" and form.is_valid():
        values = form.check(_data_settings(made))
        _check_start(form, made)
        if not form.errors:
            made.settings = {name: request.POST[name] for name in form.fields if name in request.POST}
            made.save()
            _start(form.cleaned_data["name"], values, made)
            return redirect(f"{reverse('runs')}?{urlencode({'started': form.cleaned_data['name']})}")
    context = _findings(made) | {"form": form, "page": "runs"}
    if request.htmx:
        part = render(request, "site/_check.html", context)
        if context["plan"]:
            part["HX-Trigger-After-Swap"] = "checked"  # the cost can be told now
        return part
    return render(request, "site/draft.html", context, status=400 if form.errors else 200)


def _check_start(form: Settings, made: Draft) -> None:
    name = form.cleaned_data["name"]
    job = jobs.last(("tune", "resume"), name)
    if (settings.PAIRTUNE_RUNS / name).exists() or (job and jobs.is_alive(job)):
        form.add_error("name", f"There is already a run named {name}.")
    if _problem(made):
        form.add_error(None, "The data cannot be read yet; see step 1.")
    elif (plan := _plan(made)) and (verdict := _verdict(plan)) in ("not usable", "not confirmed"):
        what = "Say first which answer is the better one" if verdict == "not confirmed" else "The data cannot be used"
        form.add_error(None, f"{what}; see step 1.")


def _plan(made: Draft) -> Plan | None:
    """What the check has found; None while it runs, or if it failed."""
    job = jobs.last(("plan",), str(made.pk))
    try:
        return Plan.model_validate_json(jobs.output(job)) if job else None
    except ValidationError:
        return None


def _verdict(plan: Plan) -> str:
    """The worst verdict on a source."""
    order = ("not usable", "not confirmed", "ok with warnings", "ok")
    return min((each.verdict for each in plan.inspections), key=order.index)


def _findings(made: Draft) -> dict[str, Any]:
    """What a page shows of a draft's data."""
    problem = _problem(made)
    job, plan = jobs.last(("plan",), str(made.pk)), None if problem else _plan(made)
    alive = bool(job and jobs.is_alive(job)) and plan is None and not problem
    sources = [name.rpartition("/")[2] for name in _lines(made.source)]
    unknown = bool(problem) and "no such file" not in problem
    return {
        "draft": made,
        "sources": sources,
        "problem": _problem_in_words(problem),
        "columns": _columns(made) if unknown or made.columns else [],
        "parts": PARTS,
        "values": {part: made.columns.get(part, "") for part in _VALUES},
        "plan": plan,
        "verdict": _verdict(plan) if plan else "",
        "checking": alive,
        "complaint": jobs.complaint(job) if job and not plan and not alive and not problem else "",
        "lengths": _lengths(plan) if plan else "",
        **_cost_context(made, plan, made.settings or INITIAL),
    }


def _problem_in_words(problem: str) -> str:
    """A fault of the data without commands: the page offers the same with a click."""
    text = re.sub(
        r"(; (if so, )?use --.*|\. If it is another format, name the columns.*|; give --column.*)$", "", problem
    )
    text = re.sub(r", with --label-([ab]) VALUE", lambda found: f", in “Value for {found[1].upper()}”", text)
    return plainly(re.sub(r"^--data \S+: ", "", text)) if problem else ""


def _lengths(plan: Plan) -> SafeString:
    """How long the pairs are, drawn."""
    found = plan.inspections[0]
    summary = found.lengths["prompt and longer answer"]
    if summary is None:
        return SafeString("")
    labels = [*(f"{edge:,}" for edge in found.lengths_up_to), "more"]
    total = sum(summary.histogram) or 1
    drawn = bars("Tokens of prompt and longer answer", labels, [count / total for count in summary.histogram])
    return mark_safe(drawn)  # noqa: S308 - our own words and numbers


@require_GET
def cost(request: HttpRequest, pk: int) -> HttpResponse:
    """Time and memory for the settings as they are in the form."""
    made = get_object_or_404(Draft, pk=pk)
    return render(request, "site/_cost.html", _cost_context(made, _plan(made), request.GET))


def _cost_context(made: Draft, plan: Plan | None, given: Mapping[str, Any]) -> dict[str, Any]:
    found = _cost(made, plan, given)
    return {"cost": found, "time": time_range(found) if found else "", "planned": plan is not None}


def _cost(made: Draft, plan: Plan | None, given: Mapping[str, Any]) -> Cost | None:
    """The cost of a draft with the settings of a form; None if it cannot be told, or the settings are not valid."""
    if plan is None or plan.lengths is None or plan.speed is None:
        return None
    form = Settings({"name": "x", **{name: given.get(name, "") for name in OPTIONS}})
    if not form.is_valid():
        return None
    values = form.check(_data_settings(made))
    if form.errors:
        return None
    config = resolve(None, values | {"out": "x"}).config
    pairs = {split: min(count, config.row_limit(split) or count) for split, count in plan.pairs.items()}
    return estimate(config, pairs, plan.lengths, plan.shape, plan.speed)


def _free_name() -> str:
    taken = {each.name for each in all_runs()} | set(Job.objects.values_list("subject", flat=True))
    return next(name for number in range(1, 10_000) if (name := f"run-{number}") not in taken)


def _start(name: str, values: Mapping[str, Any], made: Draft) -> None:
    """Start a run in a process that outlives the page and the site."""
    settings.PAIRTUNE_RUNS.mkdir(parents=True, exist_ok=True)
    file: Path = settings.PAIRTUNE_SITE / "drafts" / f"{made.pk}-{name}.yaml"
    write_atomic(file, yaml.safe_dump({**values, "out": str(settings.PAIRTUNE_RUNS / name)}))
    jobs.start("tune", name, ["tune", str(file)])
