"""Extras of the package: what is installed only where it is wanted, and one line for what is missing."""

from __future__ import annotations

from importlib.util import find_spec

from pairtune.errors import BadInput

# The modules of each extra that tell whether it is installed.
EXTRAS: dict[str, tuple[str, ...]] = {
    "serve": ("django", "uvicorn", "starlette", "openai"),
    "search": ("optuna",),
    "trl": ("trl",),
    "gguf": ("gguf",),
    "judge": ("openai",),
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow",),
    "postgres": ("psycopg",),
    "llamacpp": ("llama_cpp",),
}


def missing(extra: str) -> str | None:
    """The first module of an extra that is not installed."""
    return next((module for module in EXTRAS[extra] if find_spec(module) is None), None)


def require(extra: str, what: str) -> None:
    """Make sure that an extra is installed, before anything else is done.

    Args:
        extra: one of `EXTRAS`.
        what: needs it; the beginning of the message.

    Raises:
        BadInput: it is not installed.
    """
    if module := missing(extra):
        raise BadInput(f"{what}: needs the package {module}; pip install 'pairtune[{extra}]'")
