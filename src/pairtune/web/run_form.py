"""The form of a run's settings, made from the same descriptions as the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from django import forms

from pairtune.errors import BadInput
from pairtune.options import OPTIONS, Option, in_groups
from pairtune.resolve_config import resolve
from pairtune.web.text import without_flags

# Shown at once; the others are behind "more". Set elsewhere on the page, or not by the site: `ELSEWHERE`.
_COMMON = ("learning_rate", "beta", "epochs", "batch_size", "limit")
ELSEWHERE = ("model", "data", "eval_data", "columns", "accept_columns", "out", "push")
INITIAL = {"learning_rate": "1e-4, 3e-4", "beta": "0.1", "epochs": "2"}


def plainly(message: str, name: str = "") -> str:
    """A message of the command line without its flags, for people who do not type commands."""
    text = re.sub(r"^--[\w-]+:? ?", "", message).removeprefix(name).lstrip(": ")
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "?", "!")) else ".")


def _field(option: Option) -> forms.Field:
    """A form field for a setting; empty means its default."""
    initial, why = INITIAL.get(option.name, ""), option.default or option.why
    default = "Filled in for small models and few pairs; the default of the command" if initial else "Default"
    hint = without_flags(option.help + (f" {default}: {why}." if why else ""))
    if option.choices and not option.varies:
        choices = [("", f"default ({option.default})" if option.default else "default")]
        return forms.ChoiceField(
            choices=choices + [(each, each) for each in option.choices], required=False, help_text=hint
        )
    if option.type is bool:
        choices = [("", "default"), ("yes", "yes"), ("no", "no")]
        return forms.ChoiceField(choices=choices, required=False, help_text=hint)
    several = " Several values, separated by commas, form a grid." if option.varies else ""
    attributes = {"placeholder": option.default or ""}
    return forms.CharField(
        max_length=500,
        required=False,
        initial=initial,
        help_text=hint + several,
        widget=forms.TextInput(attrs=attributes),
    )


class Settings(forms.Form):
    """The last step: the run's name, and every setting that the page has no other place for."""

    name = forms.RegexField(
        r"^[A-Za-z0-9][\w.-]*$",
        max_length=60,
        help_text="The name of the run and of its folder.",
        error_messages={
            "invalid": "Use letters, digits, hyphens, dots and underscores, beginning with a letter or digit.",
            "required": "Name the run.",
        },
    )

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        for name in (*_COMMON, *(each for each in OPTIONS if each not in (*_COMMON, *ELSEWHERE))):
            self.fields[name] = _field(OPTIONS[name])

    @property
    def common(self) -> list[forms.BoundField]:
        """The fields shown at once."""
        return [self[name] for name in ("name", *_COMMON)]

    @property
    def more(self) -> list[tuple[str, list[forms.BoundField]]]:
        """The other fields, by group."""
        groups = (
            (
                group,
                [self[option.name] for option in options if option.name in self.fields and option.name not in _COMMON],
            )
            for group, options in in_groups().items()
        )
        return [(group, fields) for group, fields in groups if fields]

    @property
    def wrong_among_more(self) -> bool:
        """Whether an error is behind "more"."""
        return bool(set(self.errors) - {"name", *_COMMON})

    def clean(self) -> dict[str, Any]:
        """Turn texts into values of the settings' types."""
        cleaned: dict[str, Any] = super().clean() or self.cleaned_data
        for name, text in list(cleaned.items()):
            if name == "name":
                continue
            if text in ("", None):
                del cleaned[name]
                continue
            try:
                cleaned[name] = _value(OPTIONS[name], text)
            except ValueError:
                self.add_error(name, f"Write {_kind(OPTIONS[name])}; “{text}” is not.")
        return cleaned

    def check(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The settings as in a file for `pairtune tune`; what is not allowed becomes an error of its field.

        Args:
            data: the settings of data and model.
        """
        values = {name: value for name, value in self.cleaned_data.items() if name != "name"}
        fields = {option.flag: name for name, option in OPTIONS.items()}
        for _ in range(len(values) + 1):
            try:
                resolve(None, {**data, **values, "out": "x"})
                break
            except BadInput as error:
                flag, _, said = str(error).partition(": ")
                name = fields.get(flag, "")
                self.add_error(name if name in self.fields else None, plainly(said or str(error)))
                if name not in values:
                    break
                del values[name]
        return {**data, **values}


def _value(option: Option, text: str) -> Any:
    if option.type is bool:
        return text == "yes"
    parts = [part for part in text.replace(",", " ").split() if part] if option.repeats or option.varies else [text]
    values = [part if option.type in (str, Path) else option.type(part) for part in parts]
    return values if option.varies or option.repeats else values[0]


def _kind(option: Option) -> str:
    kind = {int: "whole number", float: "number"}.get(option.type, "word")
    return f"{kind}s, separated by commas" if option.varies else f"a {kind}"
