"""The result of `pairtune data inspect`, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pairtune.data.inspection import Inspection
from pairtune.errors import plural
from pairtune.run.records import DecodedPair

STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
VERDICTS = {
    "ok": "bold green",
    "ok with warnings": "bold yellow",
    "not confirmed": "bold yellow",
    "not usable": "bold red",
}


def render_inspection(found: Inspection) -> Group:
    """Everything that `inspect_source` found."""
    return Group(*_parts(found))


def _parts(found: Inspection) -> Iterator[RenderableType]:
    yield Text(f"{found.source}: {found.format or 'unknown format'}", style="bold")
    dropped = sum(entry.rows for entry in found.dropped.values())
    further = f" + {found.further:,} further {found.noun}s of these rows" if found.further else ""
    yield Text(f"{plural(found.rows_in, 'row')}{further} = {plural(found.kept, found.noun)} + {dropped:,} dropped")
    if found.better:
        yield Text(f"the better answer: {found.better}")
    for reason, entry in sorted(found.dropped.items(), key=lambda named: -named[1].rows):
        yield Text(f"  {entry.rows:,} {reason}", style="yellow" if entry.stops else "")
        if entry.stops:
            yield from (Text(f"    {place}", style="dim") for place in entry.places)
            if entry.rows > len(entry.places):
                yield Text(f"    and {entry.rows - len(entry.places):,} more", style="dim")
    if found.longer_wins and found.example:
        yield Text()
        yield _lengths(found)
        longer = found.longer_wins
        low, high = longer.interval
        of = "two answers of different kinds" if found.single else "pairs"
        yield Text(f'"the longer answer wins" is right for {longer.accuracy:.1%} of {of} ({low:.1%} to {high:.1%})')
        yield _example(found.example)
    for finding in found.findings:
        yield Text(f"{finding.level}: {finding.message}", style=STYLES[finding.level])
    yield Text(f"verdict: {found.verdict}", style=VERDICTS[found.verdict])
    if found.verdict == "not confirmed":
        yield Text(f"If the better answer is {found.better}, say so with --yes; otherwise name other columns.")


def _lengths(found: Inspection) -> Table:
    """One histogram per part, side by side over the same bins."""
    parts = {name: part for name, part in found.lengths.items() if part}
    table = Table(title="tokens", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("up to", justify="right")
    for name in parts:
        table.add_column(name, min_width=20)
    most = max(max(part.histogram) for part in parts.values())
    labels = [*(f"{edge:,}" for edge in found.lengths_up_to), "more"]
    shown = [at for at in range(len(labels)) if any(part.histogram[at] for part in parts.values())]
    for at in range(shown[0], shown[-1] + 1):
        table.add_row(labels[at], *(_bar(part.histogram[at], most) for part in parts.values()))
    for name in ("median", "p95", "max"):
        table.add_row(name, *(f"{getattr(part, name):,.0f}" for part in parts.values()), style="dim")
    return table


def _bar(count: int, most: int) -> Table:
    cell = Table.grid(padding=(0, 1, 0, 0))
    cell.add_row(Bar(most, 0, count, width=12), f"{count:,}" if count else "")
    return cell


def _example(example: DecodedPair) -> Panel:
    """One pair as the model sees it: the prompt is masked (dim), the answers carry the loss."""
    text = Text(example.prompt, style="dim")
    text.append(example.chosen, style="green")
    if example.chosen and example.rejected:
        text.append("\n… or, rejected:\n", style="italic")
    text.append(example.rejected, style="red")
    return Panel(text, title=f"{example.origin} as the model sees it", title_align="left", subtitle="dim: no loss")
