"""`report.html`, `report.md`, their figures and the model card: all from the run folder, and from it alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from pairtune.config import source_name
from pairtune.report.card import model_card
from pairtune.report.curves import draw_curves, legend, standalone
from pairtune.report.gather import COLUMNS, WATTS, Gathered
from pairtune.report.words import duration, p_value
from pairtune.runs import RunFolder, write_atomic


def write_report(run: RunFolder) -> None:
    """Write everything that people read of a run; what was there before is replaced.

    Raises:
        BadInput: a file of the run is damaged.
    """
    gathered = Gathered(run)
    curves = draw_curves(gathered)
    for name, svg in curves.items():
        write_atomic(run.figures / f"{name}.svg", standalone(svg))
    shown = {
        "run": gathered,
        "curves": curves,
        "legend": legend(gathered),
        "labels": {trial.name: trial.label for trial in gathered.trials},
        "colours": {name: colour for name, _, colour in legend(gathered)},
        "columns": COLUMNS,
        "watts": WATTS,
    }
    write_atomic(run.report, render("report.html.j2", style=render("report.css"), **shown))
    text = render("report.md.j2", **shown)
    write_atomic(run.report_text, text)
    write_atomic(run.card, model_card(gathered, text))


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
        "interval": _interval,
        "label_of": lambda name, labels: labels.get(name, name),
        "percent": lambda share: f"{share:.0%}",
        "quoted": _quoted,
        "source_name": source_name,
        "value_interval": _value_interval,
        "won": _won,
    }
    return environment


def _capitalised(text: str) -> str:
    return (text[:1].upper() + text[1:]).removesuffix(".")


def _interval(entry: Mapping[str, Any], metric: str) -> str:
    low, high = entry["intervals"][metric]
    return f"{entry['metrics'][metric]:.3f} [{low:.3f}, {high:.3f}]"


def _value_interval(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return "no" if found["value"] is None else f"{found['value']:.2f} [{low:.2f}, {high:.2f}]"


def _differs(name: str, selection: Mapping[str, Any]) -> str:
    found = next((entry for entry in selection["comparisons"] if entry["name"] == name), None)
    return f"{'yes' if found['differs'] else 'not shown'} ({p_value(found['p_corrected'])})" if found else ""


def _won(model: Mapping[str, Any]) -> str:
    if "win_rate" not in model:
        return ""
    rate = model["win_rate"]
    low, high = rate["interval"]
    counts = f"{rate['wins']} wins, {rate['ties']} ties, {rate['losses']} losses"
    return f"{rate['rate']:.2f} [{low:.2f}, {high:.2f}] ({counts})"


def _quoted(text: str) -> str:
    """A text inside a line of Markdown."""
    line = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in line) or "(no words)"
