"""The package's optional extras, and the one-line error for one that is missing."""

from __future__ import annotations

from importlib.util import find_spec

from pairtune.errors import BadInput

# For each extra, the modules whose presence means that it is installed.
EXTRAS: dict[str, tuple[str, ...]] = {
    "serve": ("django", "uvicorn", "starlette", "openai"),
    "search": ("optuna",),
    "trl": ("trl",),
    "8bit": ("bitsandbytes",),
    "ray": ("ray",),
    "gguf": ("gguf",),
    "judge": ("openai",),
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow",),
    "postgres": ("psycopg",),
    "llamacpp": ("llama_cpp",),
}


def missing(extra: str) -> str | None:
    """The first module of an extra that is not installed; None if all are."""
    return next((module for module in EXTRAS[extra] if find_spec(module) is None), None)


def require(extra: str, what: str) -> None:
    """Make sure that an extra is installed, before any other work is done.

    Args:
        extra: one of `EXTRAS`.
        what: what needs the extra; the message begins with it.

    Raises:
        BadInput: the extra is not installed.
    """
    if module := missing(extra):
        raise BadInput(f"{what}: needs the package {module}; pip install 'pairtune[{extra}]'")
