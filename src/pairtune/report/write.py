"""Write `report.html`, `report.md`, their figures and the model card, from the run folder alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from pairtune.config import source_name
from pairtune.errors import plural
from pairtune.files import write_atomic
from pairtune.report.card import model_card
from pairtune.report.charts import SERIES as COLOURS
from pairtune.report.charts import draw, standalone, style
from pairtune.report.phrases import differs, duration
from pairtune.report.report_data import COLUMNS, WATTS, ReportData
from pairtune.report.series import SERIES, charts
from pairtune.report.verdict import disagreements, fault_counts, regressed_pairs, verdict, worse_prompts
from pairtune.run.folder import Run
from pairtune.run.records import Measured, ModelAnswers, Selection, Share


@dataclass(frozen=True)
class Report:
    """A run's report.

    Attributes:
        html: one file for browsers.
        text: the same in Markdown, with less detail.
    """

    html: str
    text: str


def write_report(run: Run, ended: datetime | None = None) -> None:
    """Write a run's reports, figures and model card, replacing earlier ones.

    Args:
        run: the run.
        ended: when the run ended, if that is not recorded yet; the report written later says the same.

    Raises:
        BadInput: a file of the run is damaged.
    """
    gathered = ReportData(run, ended)
    curves = draw_curves(gathered)
    for name, svg in curves.items():
        write_atomic(run.paths.figures / f"{name}.svg", standalone(svg))
    report = _rendered(gathered, curves, texts=True)
    write_atomic(run.paths.report, report.html)
    write_atomic(run.paths.report_text, report.text)
    shared = report if run.settings.share_prompts else _rendered(gathered, curves, texts=False)
    write_atomic(run.paths.card, model_card(gathered, shared.text))


def shared_report(run: Run, *, prompts: bool, ended: datetime | None = None) -> Report:
    """The report that leaves this machine: without the texts of prompts, answers and pairs, unless `prompts` is set.

    Raises:
        BadInput: a file of the run is damaged.
    """
    gathered = ReportData(run, ended)
    return _rendered(gathered, draw_curves(gathered), texts=prompts)


def _rendered(gathered: ReportData, curves: dict[str, str], *, texts: bool) -> Report:
    run = gathered.run
    winner = gathered.selection.winner
    shown = {
        "run": gathered,
        "curves": curves,
        "titles": {series.name: series.title for series in SERIES},
        "verdict": verdict(run),
        "disagreements": disagreements(run),
        "hurt_pairs": regressed_pairs(run),
        "hurt_prompts": worse_prompts(gathered.generations, winner),
        "faults": fault_counts(gathered.generations, winner),
        "labels": {trial.name: trial.label for trial in gathered.trials},
        "colours": {trial.name: number % COLOURS for number, trial in enumerate(gathered.trials)},
        "findings": gathered.audit.by_rule() if gathered.audit else [],
        "columns": COLUMNS,
        "watts": WATTS,
        "texts": texts,
    }
    html = render("report.html.j2", style=style() + render("report.css"), **shown)
    return Report(html, render("report.md.j2", **shown))


def draw_curves(gathered: ReportData) -> dict[str, str]:
    """The curves that a run's records allow as SVG, by name; a point leads to its row in the table of epochs."""
    found = charts(gathered.trials, gathered.selection.winner, lambda trial, epoch: f"#{_row_id(trial.name, epoch)}")
    return {name: draw(chart) for name, chart in found.items()}


def _row_id(trial: str, epoch: int) -> str:
    return f"{trial}-epoch-{epoch}"


def render(template: str, **values: Any) -> str:
    """A template with its values; in HTML every value is escaped."""
    return _environment().get_template(template).render(**values)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pairtune.report"),
        autoescape=select_autoescape(["html.j2"]),
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "capitalised": _capitalised,
        "duration": duration,
        "differs": _differs,
        "interval": Measured.with_interval,
        "label_of": lambda name, labels: labels.get(name, name),
        "plural": plural,
        "percent": lambda share: f"{share:.0%}",
        "quoted": _quoted,
        "row_id": _row_id,
        "source_name": source_name,
        "value_interval": _value_interval,
        "fault_change": _fault_change,
    }
    return environment


def _capitalised(text: str) -> str:
    return (text[:1].upper() + text[1:]).removesuffix(".")


def _value_interval(found: Share) -> str:
    low, high = found.interval
    return "unknown" if found.value is None else f"{found.value:.2f} [{low:.2f}, {high:.2f}]"


def _differs(name: str, selection: Selection) -> str:
    return differs(next((entry for entry in selection.comparisons if entry.name == name), None))


def _fault_change(model: ModelAnswers) -> str:
    """On how many prompts a model's answer has fewer faults of form than the base's, and so on."""
    rate = model.win_rate
    if rate is None:
        return ""
    return f"fewer on {rate.wins}, as many on {rate.ties}, more on {rate.losses}"


def _quoted(text: str) -> str:
    """A text escaped for use inside a line of Markdown."""
    line = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in line) or "(empty)"
