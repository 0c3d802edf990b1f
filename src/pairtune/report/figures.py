"""Figures as PNG files."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from pairtune.data.inspection import Inspection, LengthSummary
from pairtune.errors import plural

_COLOURS = {"prompt": "#8a8f98", "chosen": "#2a9d6f", "rejected": "#d1495b"}


def draw_lengths(found: Inspection, path: Path) -> Path:
    """Draw the token lengths of a source: of its parts, and the share of pairs that fit within a length.

    Args:
        found: the result of `inspect_source`; must hold pairs.
        path: the PNG file.
    """
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    parts, whole = figure.subplots(1, 2)
    labels = [*(f"{edge:,}" for edge in found.lengths_up_to), "more"]
    places = range(len(labels))
    for offset, (name, colour) in enumerate(_COLOURS.items(), -1):
        if shares := _shares(found.lengths[name]):  # single answers may all be of one kind
            at = [place + offset * 0.27 for place in places]
            parts.bar(at, shares, width=0.27, color=colour, label=name)
    parts.set(title="Length of the parts", ylabel=f"share of {found.noun}s (%)")
    parts.legend(frameon=False)
    fits = [sum(_shares(found.lengths["prompt and longer answer"])[: at + 1]) for at in places]
    whole.plot(places, fits, color="#30475e", marker="o")
    whole.set(title="Prompt with the longer answer", ylim=(0, 104))
    whole.set_ylabel(f"share of {found.noun}s up to this length (%)")
    for axes in (parts, whole):
        axes.set_xticks(list(places), labels, rotation=45)
        axes.set_xlabel("tokens (up to)")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{found.source}: {plural(found.kept, found.noun)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _shares(summary: LengthSummary | None) -> list[float]:
    counts = summary.histogram if summary else []
    return [100 * count / sum(counts) for count in counts]
