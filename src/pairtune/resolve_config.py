"""A configuration out of defaults, a YAML file and flags, and where each of its values came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pairtune.config import RunConfig, described, flag_of
from pairtune.errors import BadInput, one_line


@dataclass(frozen=True)
class Resolved:
    """A configuration and where each of its values came from."""

    config: RunConfig
    origins: dict[str, str]

    def with_chosen(self, values: Mapping[str, Any], why: str) -> Resolved:
        """The same with some values that the program chose, and why it did."""
        return Resolved(self.config.model_copy(update=dict(values)), self.origins | dict.fromkeys(values, why))

    def to_yaml(self) -> str:
        """YAML that `pairtune tune` reads back; a comment after each value states where it came from."""
        lines = ["# Resolved configuration; `pairtune tune THIS_FILE --out NEW` repeats the run."]
        for name, value in (self.config.model_dump(mode="json") | self.config.dimensions).items():
            text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10_000).strip()
            lines.append(f"{name}: {text[1:-1]}  # {self.origins[name]}")
        return "\n".join(lines) + "\n"


def resolve(file: Path | None, flags: Mapping[str, Any]) -> Resolved:
    """Combine the defaults, an optional YAML file and the flags that were given (not None).

    Raises:
        BadInput: the file cannot be read, or a value is not allowed; the message names the flag or field.
    """
    written = read_settings(file) if file else {}
    given = {name: value for name, value in flags.items() if value is not None}
    origins = {}
    for name, field in RunConfig.model_fields.items():
        reason = f": {why}" if (why := described(field)["why"]) else ""
        origins[name] = (
            f"flag {flag_of(name)}" if name in given else str(file) if name in written else f"default{reason}"
        )
    try:
        config = RunConfig(**{**written, **given})
        config.trials()  # validates every combination, not only every value
        return Resolved(config, origins)
    except ValidationError as error:
        # A mistyped key first: what it was meant to set may be what is missing.
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        name = str(first["loc"][0]) if first["loc"] else "?"
        where = f"{file}: {name}" if name in written and name not in given else flag_of(name)
        raise BadInput(f"{where}: {_explain(first)}") from None


def _explain(error: Any) -> str:
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    if kind == "missing":
        return "is required; give a file, a Hub id or bundled:concise"
    if kind == "extra_forbidden":
        return f"is not a setting; the settings are {', '.join(RunConfig.model_fields)}"
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    if kind == "greater_than" and isinstance(value, int | float):
        return f"must be greater than {context['gt']:g}, not {value:g}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number, not {value}"
    return f"{error['msg'].removeprefix('Value error, ').replace('Input should', 'should')} (given: {shown})"


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in a YAML file, not validated.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror})") from error
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: no UTF-8, numbers of thousands of digits
        raise BadInput(f"{file}: is not valid YAML ({one_line(error)})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise BadInput(f"{file}: should contain settings, one `name: value` per line")
    return content
