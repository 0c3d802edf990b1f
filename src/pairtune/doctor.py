"""`pairtune doctor`: what this machine is, which settings suit it and why, and what is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pairtune.config import RunConfig
from pairtune.engine.kernels import Kernels
from pairtune.engine.memory import lockstep_bytes, widest
from pairtune.engine.products import Products
from pairtune.environment import Choice, Component, Diagnosis, describe_machine, versions
from pairtune.errors import BadInput, one_line
from pairtune.extras import EXTRAS, missing
from pairtune.files import user_cache
from pairtune.models.load import blank_model, device_name, free_bytes, measure_dtypes, pick_device, pick_dtype
from pairtune.models.resolve import resolve_model
from pairtune.run.records import KernelChoice, Machine

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_LEAST_DISK, _LEAST_MEMORY = 2 << 30, 2 << 30


def diagnose(model: str, max_length: int, say: Callable[[str], None] = lambda what: None) -> Diagnosis:
    """Inspect the machine, probe its matrix products with a model's shapes, and report what a run would use.

    Args:
        model: as given to `--model`.
        max_length: length of the longest conversations, in tokens.
        say: called with the current activity.
    """
    device = pick_device()
    say("inspecting the machine")
    parts = [_cache(), _disk(), *_programs()]
    choices: list[Choice] = []
    probes: dict[str, KernelChoice] = {}
    try:
        source = resolve_model(model)
        parts.insert(0, Component(name=f"model {model}", there=True, says=_home(source.folder), needed=True))
        say("probing its matrix products")
        choices, probes = _choices(blank_model(source), device, max_length)
    except (BadInput, OSError, ValueError) as error:
        parts.insert(0, Component(name=f"model {model}", there=False, says=one_line(error), needed=True))
    machine, free = describe_machine(), free_bytes(device)
    notes = _notes(machine, free)
    absent = [part for part in parts if part.needed and not part.there]
    return Diagnosis(
        machine=machine,
        device=device_name(device),
        device_memory_gb=round(free / 2**30, 1),
        versions=versions(),
        model=model,
        choices=choices,
        probes=probes,
        parts=parts,
        verdict=_verdict(absent, notes, choices),
        usable=not absent,
        notes=notes,
    )


def _choices(model: Any, device: torch.device, max_length: int) -> tuple[list[Choice], dict[str, KernelChoice]]:
    measured, dtype = measure_dtypes(device), pick_dtype(device)
    name = str(dtype).removeprefix("torch.")
    times = ", ".join(f"{each} {seconds * 1e3:.2f} ms" for each, seconds in measured.items())
    kernels = Kernels(model, device)
    probe = kernels.probe(dtype)
    trial = RunConfig(data=["x"], dtype=name).trials()[0]
    needs = [lockstep_bytes(model, trial, dtype, device, max_length, width) for width in range(1, 9)]
    width = widest(needs, device)
    return [
        Choice(
            name="dtype",
            value=name,
            why=f"time of one matrix product: {times}" if measured else "the best type that this accelerator supports",
        ),
        _products(probe.products, probe.differing, device),
        Choice(name="threads", value=str(torch.get_num_threads()), why="set OMP_NUM_THREADS to change it"),
        Choice(
            name="checkpointing",
            value="off",
            why="a run that would not fit into memory without it turns it on",
        ),
        Choice(
            name="trials side by side",
            value=str(width),
            why=f"the default trial, pairs of {max_length} tokens: {needs[width - 1] / 2**30:.1f} GB "
            f"of {free_bytes(device) / 2**30:.1f} GB free",
        ),
    ], kernels.record()


def _products(products: Products, differing: tuple[int, ...], device: torch.device) -> Choice:
    """How matrix products are computed, and why."""
    value, why = _describe_products(products, differing, device)
    return Choice(name="products", value=value, why=why)


def _describe_products(products: Products, differing: tuple[int, ...], device: torch.device) -> tuple[str, str]:
    if device.type != "cpu":
        return "the library's own", "not probed on an accelerator; the check at the first step measures instead"
    if not products.exact:
        return (
            "the library's own",
            "a row's bits depend on its place, and no tile size helps; the check at the first step measures instead",
        )
    some = f"row counts that gave different bits: {len(differing)} (the largest: {max(differing, default=0)})"
    if products.tile:
        return f"in tiles of {products.tile} rows", some
    if products.least > 1:
        return f"whole, padded to at least {products.least} rows", some
    return "whole", "the same bits for every row count that was probed"


def _cache() -> Component:
    folder = user_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        return Component(
            name="cache", there=False, says=f"{_home(folder)}: {error.strerror}; set PAIRTUNE_CACHE", needed=True
        )
    says = (
        f"{_home(folder)}, {size / 2**20:,.0f} MB" if writable else f"{_home(folder)} is read-only; set PAIRTUNE_CACHE"
    )
    return Component(name="cache", there=writable, says=says, needed=True)


def _disk() -> Component:
    free = shutil.disk_usage(Path.cwd()).free
    return Component(name="disk", there=free > _LEAST_DISK, says=f"{free / 2**30:.1f} GB free at {_home(Path.cwd())}")


def _programs() -> list[Component]:
    browser = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    parts = [
        Component(name="browser", there=browser is not None, says=browser or "none; needed only by the site's tests")
    ]
    for extra in EXTRAS:
        there = missing(extra) is None
        says = "installed" if there else f"not installed: pip install 'pairtune[{extra}]'"
        parts.append(Component(name=extra, there=there, says=says))
    return parts


def _notes(machine: Machine, free: int) -> list[str]:
    notes = []
    if free < _LEAST_MEMORY:
        notes.append(f"only {free / 2**30:.1f} GB of memory is free")
    if machine.limits:
        notes.append("the environment sets limits: " + ", ".join(f"{k}={v}" for k, v in machine.limits.items()))
    return notes


def _verdict(missing: list[Component], notes: list[str], choices: list[Choice]) -> str:
    if missing:
        return "not usable: " + "; ".join(f"{part.name}: {part.says}" for part in missing)
    what = ", ".join(f"{choice.name} {choice.value}" for choice in choices if choice.name != "checkpointing")
    return f"ready, but {'; '.join(notes)}" if notes else f"ready: {what}"


def _home(path: Path) -> str:
    """A path with the user's home folder shown as `~`."""
    try:
        return str(Path("~") / path.absolute().relative_to(Path.home()))
    except (ValueError, RuntimeError):
        return str(path)
