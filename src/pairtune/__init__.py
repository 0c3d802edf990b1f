"""Pairtune: tune a small language model to people's preferences, on the machine you have.

The functions below are the commands, for notebooks and scripts. Their modules are imported when they are first used, so
that `import pairtune` takes no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pairtune.version import __version__

if TYPE_CHECKING:
    from pairtune.api import audit, compare, evaluate, inspect, load_pairs, open_run, resume, tune
    from pairtune.errors import BadInput, Interrupted, RunFailed
    from pairtune.trl_settings import from_trl

__all__ = [
    "BadInput",
    "Interrupted",
    "RunFailed",
    "__version__",
    "audit",
    "compare",
    "evaluate",
    "from_trl",
    "inspect",
    "load_pairs",
    "open_run",
    "resume",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pairtune import api, errors, trl_settings

    found = next(module for module in (api, errors, trl_settings) if hasattr(module, name))
    return getattr(found, name)


def __dir__() -> list[str]:
    return sorted(__all__)
