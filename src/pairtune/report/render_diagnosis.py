"""The result of `pairtune doctor`, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pairtune.environment import Component, Diagnosis


def render_diagnosis(found: Diagnosis) -> RenderableType:
    """The machine, the settings chosen for it, the components found, and the verdict in the last line."""
    return Group(*_parts(found))


def _parts(found: Diagnosis) -> Iterator[RenderableType]:
    machine = found.machine
    instructions = ", ".join(machine.instructions) or "unknown"
    yield _table(
        "machine",
        [
            ("processor", f"{machine.processor}, {machine.cores:g} cores, {machine.system}"),
            ("instructions", instructions),
            ("memory", f"{machine.memory_gb:g} GB, {machine.memory_free_gb or 0:g} GB free"),
            ("device", f"{found.device}, {found.device_memory_gb:g} GB free"),
            ("versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())),
        ],
    )
    if found.choices:
        rows = [(each.name, f"{each.value}  ({each.why})") for each in found.choices]
        yield _table(f"settings chosen for {found.model}", rows)
    yield _table("components", [(_mark(part), part.says) for part in found.parts])
    yield Text(found.verdict, style="bold green" if found.usable else "bold red")


def _mark(part: Component) -> str:
    return part.name if part.there else f"no {part.name}"


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
