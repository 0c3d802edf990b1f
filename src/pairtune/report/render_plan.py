"""The result of `pairtune plan`, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from pairtune.cost import Cost
from pairtune.data.inspection import Plan
from pairtune.errors import plural
from pairtune.footprint import Fit
from pairtune.report.phrases import duration
from pairtune.report.render_inspection import STYLES, VERDICTS


def render_plan(plan: Plan) -> RenderableType:
    """The data's verdict, and the run's cost."""
    return Group(*_parts(plan))


def _parts(plan: Plan) -> Iterator[RenderableType]:
    for found in plan.inspections:
        kept = plural(found.kept, found.noun)
        yield Text(f"{found.source}: {found.format or 'unknown format'}, {kept}", style="bold")
        for finding in found.findings:
            yield Text(f"  {finding.level}: {finding.message}", style=STYLES[finding.level])
        yield Text(f"  verdict: {found.verdict}", style=VERDICTS[found.verdict])
    for note in plan.notes:
        yield Text(note, style="dim")
    if plan.cost is None:
        return
    cost, fit = plan.cost, plan.cost.fit
    pairs = ", ".join(f"about {count:,} {split}" for split, count in plan.pairs.items() if count)
    noun = plan.inspections[0].noun if plan.inspections else "pair"
    trials, steps = plural(cost.trials, "trial"), plural(cost.steps, "step")
    yield Text(f"{trials}, {fit.side_by_side} side by side, {pairs} {noun}s, {steps}")
    measured = f", estimated from the speed of a few of {plan.shape.layers} layers here" if cost.seconds else ""
    yield Text(f"time: {time_range(cost)}{measured}")
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in fit.memory.items())
    yield Text(f"memory: about {cost.memory_gb:.1f} GB ({parts})", style="" if fit.fits else "bold red")
    room = f"of {cost.limit / 2**30:.1f} GB; {way(fit)}" if fit.fits else does_not_fit(fit, cost.limit, cost.remedies)
    yield Text(f"        {room}")


def way(fit: Fit) -> str:
    """How a run is made to fit, in words."""
    checkpointing = "on" if fit.checkpointing else "off"
    return f"{fit.dtype}, rows of {fit.row_tokens} tokens, checkpointing {checkpointing}"


def does_not_fit(fit: Fit, limit: float, remedies: Sequence[str]) -> str:
    """What a run lacks, and what would help.

    Args:
        fit: the way of it that takes the least.
        limit: the bytes that it may take.
        remedies: what would make it fit; see `footprint.remedies`.
    """
    lacks = f"more than the {limit / 2**30:.1f} GB that it may take, even with {way(fit)}"
    if remedies:
        return f"{lacks}; what would fit: {', or '.join(remedies)}"
    return f"{lacks}; shorter pairs would not help: choose a smaller model, or with LoRA a lower --lora-rank"


def time_range(cost: Cost) -> str:
    """The estimated time in words, from the best to the worst guess."""
    if cost.seconds is None:
        return "cannot be told for this model and machine"
    low, high = cost.seconds
    if high < 90:
        return "about a minute"
    if high < 3600:
        return f"{max(1, round(low / 60))} to {round(high / 60)} minutes"
    return f"{duration(low)} to {duration(high)}"
