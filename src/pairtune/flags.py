"""Command-line flags, generated from the settings of a run.

Settings are pydantic models, and `pairtune --help` should answer without importing pydantic. Commands therefore look
up the settings only when they are called.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from pairtune.errors import BadInput

if TYPE_CHECKING:
    from pairtune.options import Option


# What --column names; those in `_SHORT` have a flag of their own, which is rewritten before arguments are parsed.
_SHORT = ("label", "label_a", "label_b", "answer_a", "answer_b", "score_a", "score_b")
COLUMN_PARTS = ("prompt", "chosen", "rejected", "system", *_SHORT, "answers", "scores", "completion")
_SHORT_FLAGS = {f"--{part.replace('_', '-')}": part for part in _SHORT}


class WithSettingsHelp(TyperCommand):
    """A command with options that are named like settings and take their help and metavar from them."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse the arguments, in which `--label NAME` stands for `--column label=NAME`, and so on."""
        if any(param.name == "columns" for param in self.get_params(ctx)):
            args = list(_spelled_out(args))
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> Any:
        """The command's parameters, with help and metavar filled in."""
        from pairtune.options import OPTIONS

        for param in self.params:
            option = OPTIONS.get(param.name or "")
            if option and isinstance(param, TyperOption) and not param.help:
                param.help, param.metavar = option.help, option.metavar
        return super().get_params(ctx)


class WithSettings(WithSettingsHelp):
    """A command that takes every setting as a flag; its callback finds the given ones by name in `ctx.obj`."""

    def get_params(self, ctx: Any) -> Any:
        """One parameter per setting, and the command's own."""
        own = {param.name for param in self.params}
        # Panels are shown in the order of their first option, so settings go before the command's own.
        self.params = [param for param in _settings() if param.name not in own] + self.params
        return super().get_params(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options by group; the command's own options come last."""
        options = [param for param in self.get_params(ctx) if isinstance(param, TyperOption)]
        for group in dict.fromkeys(param.rich_help_panel or "Other" for param in options):
            with formatter.section(group):
                records = [
                    param.get_help_record(ctx) for param in options if (param.rich_help_panel or "Other") == group
                ]
                formatter.write_dl([record for record in records if record])

    def invoke(self, ctx: Any) -> Any:
        """Call the callback with the command's own parameters only."""
        given = {param.name: ctx.params.pop(param.name) for param in _settings()}
        ctx.obj = {name: value for name, value in given.items() if value not in (None, [], ())}
        return super().invoke(ctx)


def _spelled_out(args: list[str]) -> Iterator[str]:
    rest = iter(args)
    for arg in rest:
        flag, equals, value = arg.partition("=")
        if part := _SHORT_FLAGS.get(flag):
            value = value if equals else next(rest, "")
            if not value or (not equals and value.startswith("--")):
                raise BadInput(f"{flag}: requires the name of a column")
            yield from ("--column", f"{part}={value}")
        else:
            yield arg


@cache
def _settings() -> list[Any]:
    """One parameter per setting."""
    from pairtune.options import in_groups

    def settings(**_: Any) -> None:
        """Only the signature of this function is used."""

    flags = [_flag(option) for options in in_groups().values() for option in options]
    settings.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(settings)
    return [param for param in typer.main.get_command(app).params if isinstance(param, TyperOption)]


def _flag(option: Option) -> inspect.Parameter:
    if option.type is bool:
        names = (f"{option.flag}/--no-{option.flag[2:]}",)
        info = typer.Option(*names, help=option.full_help, rich_help_panel=option.group)
    else:
        info = typer.Option(option.flag, metavar=option.metavar, help=option.full_help, rich_help_panel=option.group)
    value: Any = list[option.type] if option.repeats else option.type  # type: ignore[name-defined]
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(option.name, kind, default=None, annotation=Annotated[value | None, info])
