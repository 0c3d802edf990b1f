"""The result of `pairtune plan`, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from pairtune.cost import Cost
from pairtune.data.inspection import Plan
from pairtune.errors import plural
from pairtune.report.phrases import duration
from pairtune.report.render_inspection import STYLES, VERDICTS


def render_plan(plan: Plan) -> RenderableType:
    """The data's verdict, and the run's cost."""
    return Group(*_parts(plan))


def _parts(plan: Plan) -> Iterator[RenderableType]:
    for found in plan.inspections:
        yield Text(f"{found.source}: {found.format or 'unknown format'}, {plural(found.kept, 'pair')}", style="bold")
        for finding in found.findings:
            yield Text(f"  {finding.level}: {finding.message}", style=STYLES[finding.level])
        yield Text(f"  verdict: {found.verdict}", style=VERDICTS[found.verdict])
    if plan.cost is None:
        yield Text("The time cannot be estimated for this model and machine.")
        return
    pairs = ", ".join(f"about {count:,} {split}" for split, count in plan.pairs.items() if count)
    yield Text(
        f"{plural(plan.cost.trials, 'trial')}, {plan.cost.side_by_side} side by side, {pairs} pairs, "
        f"{plural(plan.cost.steps, 'step')}"
    )
    yield Text(f"time: {time_range(plan.cost)}, estimated from the speed of {plan.shape.layers} layers on this machine")
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in plan.cost.memory.items())
    yield Text(f"memory: about {plan.cost.memory_gb:.1f} GB ({parts})", style="" if plan.cost.fits else "bold red")
    if not plan.cost.fits:
        yield Text(
            "That is more than is free now: close other programs, or lower --max-length, --side-by-side or --lora-rank."
        )


def time_range(cost: Cost) -> str:
    """The estimated time in words, from the best to the worst guess."""
    low, high = cost.seconds
    if high < 90:
        return "about a minute"
    if high < 3600:
        return f"{max(1, round(low / 60))} to {round(high / 60)} minutes"
    return f"{duration(low)} to {duration(high)}"
