"""What a run was made with: versions and machine, so that a report can say how to do it again."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
from pydantic import Field

from pairtune.run.records import BaseModelRecord, Environment, KernelChoice, Machine, Part

_PACKAGES = ("pairtune", "torch", "transformers", "trl", "peft", "tokenizers", "accelerate")
# Sets of instructions that decide which kernels a library takes, as Linux names them.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
# Settings of the environment that change what a machine computes, or how fast.
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")


class Choice(Part):
    """Something that is chosen for a machine, and why, with what was measured."""

    name: str
    value: str
    why: str


class Component(Part):
    """Something that may be there or not: `says` is where it is, or what to do."""

    name: str
    there: bool
    says: str
    needed: bool = False


class Diagnosis(Part):
    """Everything that a bug report needs to know of a machine.

    Attributes:
        machine: what it is.
        device: that models compute on.
        device_memory_gb: what it has left.
        versions: of the libraries.
        model: that was asked about.
        choices: what is chosen for it.
        probes: what was found out about products, by type.
        parts: what is there.
        verdict: in one line.
        usable: whether a run could start.
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
    """The machine that this runs on.

    Args:
        device: the accelerator's name, or "cpu".
        root: of the system's files.
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


def others_are_busy(share: float = 0.25, seconds: float = 0.2) -> bool:
    """Whether other programs are using more than a share of this machine's processors, looked at for a moment."""
    return float(psutil.cpu_percent(interval=seconds)) > 100 * share


def versions() -> dict[str, str]:
    """Of Python and the libraries that numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def describe_environment(device: str, base: BaseModelRecord) -> Environment:
    """What a run that starts now is made with.

    Args:
        device: the accelerator's name, or "cpu".
        base: the model that it starts from.
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
    """Cores that this process may use: those it is bound to, and of them a container's share of time."""
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
    """The processor's name; Python knows it on few systems."""
    names = (line.partition(":")[2].strip() for line in _lines(root / "proc/cpuinfo") if line.startswith("model name"))
    return next(names, platform.processor()) or platform.machine()
