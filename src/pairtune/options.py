"""The settings of a run as command line, site and documentation show them; all of it comes from `pairtune.config`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pairtune.config import GROUPS, RunConfig, SourceConfig, TrialConfig, described, flag_of, may_vary

# How pydantic's constraints are displayed.
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        name: its name in YAML and in code.
        flag: its command-line flag.
        help: what it does.
        why: the reason for the default, or what happens if no value is given.
        group: the group under which it is shown.
        metavar: the placeholder for its value in help texts.
        type: the type of a single value: int, float, str, bool or Path.
        choices: the allowed values; empty if any value of the type is allowed.
        limits: the range of a number, for example `> 0`.
        default: the default as YAML writes it; None if there is none.
        repeats: whether it may be given several times.
        varies: whether several values make a grid of trials.
    """

    name: str
    flag: str
    help: str
    why: str
    group: str
    metavar: str
    type: type
    choices: tuple[str, ...]
    limits: str
    default: str | None
    repeats: bool
    varies: bool

    @property
    def full_help(self) -> str:
        """Help, choices, default and range in one text."""
        default = self.default or self.why
        notes = [
            f"default {default}" if default else "",
            self.limits,
            "repeat for a grid" if self.varies and self.repeats else "",
        ]
        details = "; ".join(filter(None, notes))
        listed = "|".join(self.choices) != self.metavar
        choices = f" One of {', '.join(self.choices)}." if self.choices and listed else ""
        return f"{self.help}{choices}" + (f" ({details})" if details else "")


def _option(name: str, field: FieldInfo) -> Option:
    extra = described(field)
    leaves = list(_leaves(field.annotation))
    choices = tuple(choice for leaf, _ in leaves if get_origin(leaf) is Literal for choice in get_args(leaf))
    plain = next((leaf for leaf, _ in leaves if leaf in (int, float, bool, Path)), str)
    checks = [check for _, checks in leaves for check in checks] + list(field.metadata)
    repeats = may_vary(name) or name == "columns" or get_origin(_without_none(field.annotation)) in (list, tuple)
    return Option(
        name=name,
        flag=flag_of(name),
        help=field.description or "",
        why=extra["why"],
        group=extra["group"],
        metavar=extra["metavar"] or "|".join(choices) or plain.__name__.upper(),
        type=plain,
        choices=choices,
        limits=_limits(checks),
        default=_default(field.default),
        repeats=repeats and plain is not bool,
        varies=may_vary(name),
    )


def _leaves(annotation: Any, checks: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The types of single values within an annotation, each with its constraints."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _leaves(inner[0], (*checks, *inner[1:]))
    elif origin in (list, tuple, Union, UnionType):
        for each in inner:
            if each not in (NoneType, Ellipsis):
                yield from _leaves(each, checks)
    elif annotation is SourceConfig:
        yield str, ()
    else:
        yield annotation, checks


def _without_none(annotation: Any) -> Any:
    """The annotation without `Annotated` and None."""
    if get_origin(annotation) is Annotated:
        return _without_none(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _without_none(next(each for each in get_args(annotation) if each is not NoneType))
    return annotation


def _limits(checks: list[Any]) -> str:
    """The range that pydantic's constraints allow."""
    found: dict[str, Any] = {}
    for check in checks:
        for each in (check, *getattr(check, "metadata", ())):
            found |= {name: value for name in _SIGNS if (value := getattr(each, name, None)) is not None}
    return " and ".join(f"{_SIGNS[name]} {value:g}" for name, value in found.items())


def _default(value: Any) -> str | None:
    if value is PydanticUndefined or value is None or value in ((), {}):
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(f"{each:g}" for each in value) if isinstance(value, list) else str(value)


# Every setting by name, in the order of declaration.
OPTIONS = {name: _option(name, field) for name, field in RunConfig.model_fields.items()}


def in_groups() -> dict[str, list[Option]]:
    """All settings by group, common ones first; within a group, those of the run before those of a trial."""
    options = sorted(OPTIONS.values(), key=lambda option: option.name in TrialConfig.model_fields)
    return {group: [each for each in options if each.group == group] for group in GROUPS}
