"""Write `report.html`, `report.md`, their figures and the model card, from the run folder alone."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from pairtune.config import source_name
from pairtune.errors import plural
from pairtune.files import write_atomic
from pairtune.report.card import model_card
from pairtune.report.curves import draw_curves, legend, standalone
from pairtune.report.phrases import differs, duration
from pairtune.report.report_data import COLUMNS, WATTS, ReportData
from pairtune.run.folder import Run
from pairtune.run.records import Measured, ModelAnswers, Selection, Share


def write_report(run: Run) -> None:
    """Write a run's reports, figures and model card, replacing earlier ones.

    Raises:
        BadInput: a file of the run is damaged.
    """
    gathered = ReportData(run)
    curves = draw_curves(gathered)
    for name, svg in curves.items():
        write_atomic(run.paths.figures / f"{name}.svg", standalone(svg))
    shown = {
        "run": gathered,
        "curves": curves,
        "legend": legend(gathered),
        "labels": {trial.name: trial.label for trial in gathered.trials},
        "colours": {name: colour for name, _, colour in legend(gathered)},
        "columns": COLUMNS,
        "watts": WATTS,
    }
    write_atomic(run.paths.report, render("report.html.j2", style=render("report.css"), **shown))
    text = render("report.md.j2", **shown)
    write_atomic(run.paths.report_text, text)
    write_atomic(run.paths.card, model_card(gathered, text))


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
        "source_name": source_name,
        "value_interval": _value_interval,
        "won": _won,
    }
    return environment


def _capitalised(text: str) -> str:
    return (text[:1].upper() + text[1:]).removesuffix(".")


def _value_interval(found: Share) -> str:
    low, high = found.interval
    return "unknown" if found.value is None else f"{found.value:.2f} [{low:.2f}, {high:.2f}]"


def _differs(name: str, selection: Selection) -> str:
    return differs(next((entry for entry in selection.comparisons if entry.name == name), None))


def _won(model: ModelAnswers) -> str:
    rate = model.win_rate
    if rate is None:
        return ""
    low, high = rate.interval
    return f"{rate.rate:.2f} [{low:.2f}, {high:.2f}] ({rate.wins} won, {rate.ties} tied, {rate.losses} lost)"


def _quoted(text: str) -> str:
    """A text escaped for use inside a line of Markdown."""
    line = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in line) or "(empty)"
