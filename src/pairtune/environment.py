"""What a run was made with: versions and machine, so that a report can say how to do it again."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("pairtune", "torch", "transformers", "trl", "peft", "tokenizers", "accelerate")
# Sets of instructions that decide which kernels a library takes, as Linux names them.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
# Settings of the environment that change what a machine computes, or how fast.
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Machine:
    """What a machine is.

    Attributes:
        system: operating system and architecture.
        processor: by name.
        instructions: sets of them that decide which kernels are taken; empty where the system does not say.
        cores: that this process may use, a container's share counted.
        memory_gb: in all, or what a container may have of it.
        memory_free_gb: of that.
        limits: settings of the environment that change what it computes, or how fast.
    """

    system: str
    processor: str
    instructions: list[str]
    cores: float
    memory_gb: float
    memory_free_gb: float
    limits: dict[str, str]


def describe_machine(root: Path = Path("/")) -> Machine:
    """The machine that this runs on.

    Args:
        root: of the system's files.
    """
    memory = psutil.virtual_memory()
    allowed = _number(root / "sys/fs/cgroup/memory.max") or memory.total
    used = _number(root / "sys/fs/cgroup/memory.current") or 0
    total = min(memory.total, allowed)
    return Machine(
        f"{platform.system()} {platform.machine()}",
        processor(root),
        _instructions(root),
        _cores(root),
        round(total / 2**30, 2),
        round((memory.available if total == memory.total else min(memory.available, total - used)) / 2**30, 2),
        {name: os.environ[name] for name in _LIMITS if name in os.environ},
    )


def others_are_busy(share: float = 0.25, seconds: float = 0.2) -> bool:
    """Whether other programs are using more than a share of this machine's processors, looked at for a moment."""
    return float(psutil.cpu_percent(interval=seconds)) > 100 * share


def versions() -> dict[str, str]:
    """Of Python and the libraries that numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def describe_environment(device: str) -> dict[str, Any]:
    """The content of `environment.json`.

    Args:
        device: the accelerator's name, or "cpu".
    """
    machine = describe_machine()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": asdict(machine) | {"memory_gb": round(machine.memory_gb), "device": device},
    }


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
