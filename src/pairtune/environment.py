"""Versions and machine of a run, so that its report tells how to reproduce it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from pydantic import Field

from pairtune.run.records import BaseModelRecord, Environment, KernelChoice, Machine, Part

_PACKAGES = ("pairtune", "torch", "transformers", "trl", "peft", "tokenizers", "accelerate")
# CPU instruction sets that decide which kernels a library uses, under their Linux names.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
# Environment variables that change the results or the speed of computation.
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")


class Choice(Part):
    """A setting chosen for the machine, and why, with the measurements behind it."""

    name: str
    value: str
    why: str


class Component(Part):
    """An optional or required component: `says` tells where it is, or how to get it."""

    name: str
    there: bool
    says: str
    needed: bool = False


class Diagnosis(Part):
    """Everything that a bug report needs to know about a machine.

    Attributes:
        machine: the machine.
        device: the device that models compute on.
        device_memory_gb: free memory of the device.
        versions: versions of Python and the libraries.
        model: the model that was asked about.
        choices: the settings chosen for the machine.
        probes: results of probing its matrix products, by dtype.
        parts: the components and whether they are installed.
        verdict: the conclusion in one line.
        usable: whether a run could start.
        notes: warnings about the machine.
    """

    machine: Machine
    device: str
    device_memory_gb: float
    versions: dict[str, str]
    model: str
    choices: list[Choice]
    probes: dict[str, KernelChoice]
    parts: list[Component]
    verdict: str = ""
    usable: bool = True
    notes: list[str] = Field(default_factory=list)


def describe_machine(device: str = "cpu", root: Path = Path("/")) -> Machine:
    """The machine that this process runs on.

    Args:
        device: the accelerator's name, or "cpu".
        root: root folder of the system's files.
    """
    memory = psutil.virtual_memory()
    allowed = _number(root / "sys/fs/cgroup/memory.max") or memory.total
    used = _number(root / "sys/fs/cgroup/memory.current") or 0
    total = min(memory.total, allowed)
    free = memory.available if total == memory.total else min(memory.available, total - used)
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        processor=processor(root),
        instructions=_instructions(root),
        cores=_cores(root),
        memory_gb=round(total / 2**30, 2),
        memory_free_gb=round(free / 2**30, 2),
        limits={name: os.environ[name] for name in _LIMITS if name in os.environ},
        device=device,
    )


def program() -> str:
    """What to type for this program in the current folder: its path where the shell would not find its name."""
    script = Path(sys.executable).parent / "pairtune"
    if shutil.which("pairtune") or not script.is_file():
        return "pairtune"
    with suppress(ValueError):
        return str(script.relative_to(Path.cwd()))
    return str(script)


def others_are_busy(share: float = 0.25, seconds: float = 0.2) -> bool:
    """Whether other programs use more than `share` of this machine's CPUs, measured for `seconds`."""
    return float(psutil.cpu_percent(interval=seconds)) > 100 * share


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # some come with extras
            found[name] = version(name)
    return found


def describe_environment(device: str, base: BaseModelRecord) -> Environment:
    """The environment of a run that starts now.

    Args:
        device: the accelerator's name, or "cpu".
        base: the base model.
    """
    machine = describe_machine(device)
    return Environment(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        machine=machine.model_copy(update={"memory_gb": round(machine.memory_gb)}),
        base=base,
    )


def _instructions(root: Path) -> list[str]:
    lines = _lines(root / "proc/cpuinfo")
    flags = next(
        (line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))), []
    )
    return [name for name in _INSTRUCTIONS if name in flags]


def _cores(root: Path) -> float:
    """Cores that this process may use: those it is bound to, limited by the container's CPU quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = next(iter(_lines(root / "sys/fs/cgroup/cpu.max")), "max").partition(" ")
    return min(bound, round(int(quota) / int(period), 1)) if quota.isdigit() and period.strip().isdigit() else bound


def _number(file: Path) -> int | None:
    text = next(iter(_lines(file)), "").strip()
    return int(text) if text.isdigit() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def processor(root: Path = Path("/")) -> str:
    """The CPU's name, from /proc/cpuinfo if possible: `platform` knows it on few systems."""
    names = (line.partition(":")[2].strip() for line in _lines(root / "proc/cpuinfo") if line.startswith("model name"))
    return next(names, platform.processor()) or platform.machine()
