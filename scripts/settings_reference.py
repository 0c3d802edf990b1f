"""Writes docs/settings.md from the settings themselves (`make docs`)."""

from __future__ import annotations

from pathlib import Path

from pairtune.options import Option, in_groups

FILE = Path(__file__).parents[1] / "docs" / "settings.md"

_HEAD = """# Settings

Every setting of `pairtune tune`: its name in a YAML file, its flag, and its default with the reason. Flags win over the
file, the file over defaults; a run's own `config.yaml` has all of them. Written by `make docs`.

Where "grid" says yes, a setting takes several values, as a list in the file or as a repeated flag, and every
combination is a trial.
"""


def reference() -> str:
    """The whole page."""
    parts = [_HEAD]
    for group, options in in_groups().items():
        parts.append(f"## {group}\n")
        parts.append("| setting | flag | what it is | values | grid | default |\n|---|---|---|---|---|---|")
        parts.append("\n".join(map(_row, options)) + "\n")
    return "\n".join(parts)


def _row(option: Option) -> str:
    values = ", ".join(f"`{choice}`" for choice in option.choices) or f"{option.metavar} {option.limits}".strip()
    default = ": ".join(filter(None, [option.default and f"`{option.default}`", option.why])) or "needed"
    grid = "yes" if option.varies and option.repeats else ""
    return f"| `{option.name}` | `{option.flag}` | {option.help} | {values} | {grid} | {default} |"


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
