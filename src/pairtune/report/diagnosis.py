"""What `pairtune doctor` found, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def render_diagnosis(record: Mapping[str, Any]) -> RenderableType:
    """The machine, what is chosen for it, what is there, and the verdict in the last line."""
    return Group(*_parts(record))


def _parts(record: Mapping[str, Any]) -> Iterator[RenderableType]:
    machine = record["machine"]
    instructions = ", ".join(machine["instructions"]) or "not known"
    yield _table(
        "machine",
        [
            ("processor", f"{machine['processor']}, {machine['cores']:g} cores, {machine['system']}"),
            ("instructions", instructions),
            ("memory", f"{machine['memory_gb']:g} GB, {machine['memory_free_gb']:g} GB free"),
            ("device", f"{record['device']}, {record['device_memory_gb']:g} GB free"),
            ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
        ],
    )
    if record["choices"]:
        rows = [(each["name"], f"{each['value']}  ({each['why']})") for each in record["choices"]]
        yield _table(f"chosen for it, with {record['model']}", rows)
    yield _table("what is there", [(_mark(part), part["says"]) for part in record["parts"]])
    yield Text(record["verdict"], style="bold green" if record["usable"] else "bold red")


def _mark(part: Mapping[str, Any]) -> str:
    return part["name"] if part["there"] else f"no {part['name']}"


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
