"""Without extras the package trains, evaluates, audits, reports and chats, and names a missing extra."""

from __future__ import annotations

import json
import os

import pytest
from conftest import pairtune, write_pairs

from pairtune.extras import EXTRAS

# Prepended to a separate process, so that it can neither import the extras' packages nor find their versions.
WITHOUT = """
import sys
from importlib.machinery import PathFinder

HIDDEN = {hidden!r}


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, context):
        return [] if context.name in HIDDEN else super().find_distributions(context)


sys.meta_path[:] = [Without if each is PathFinder else each for each in sys.meta_path]
"""


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """Run the command line without any extra."""
    folder = tmp_path_factory.mktemp("site")
    hidden = sorted({module for modules in EXTRAS.values() for module in modules})
    (folder / "sitecustomize.py").write_text(WITHOUT.format(hidden=hidden))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return lambda *arguments, **more: pairtune(*arguments, PYTHONPATH=path, **more)


@pytest.fixture(scope="module")
def run(light, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("light")
    data = write_pairs(folder / "pairs.jsonl", range(30))
    few = ("--lr", "1e-3", "--beta", "0.1", "--epochs", "1", "--lora-rank", "2", "--samples", "1", "--dtype", "float32")
    done = light("tune", "--model", tiny_model, "--data", data, *few, "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_is_made_and_read_without_extras(light, run, tiny_model, tmp_path):
    assert (run / "COMPLETE").is_file()
    data = write_pairs(tmp_path / "other.jsonl", range(50, 60))
    for command in (
        ("report", run),
        ("audit", run),
        ("eval", run, "--data", data, "--samples", "1"),
        ("export", run, "--format", "merged", "--to", tmp_path / "merged"),
        ("data", "inspect", data, "--model", tiny_model),
        ("--help",),
    ):
        done = light(*command)
        assert done.returncode == 0, (command, done.stderr)
    parts = json.loads(light("doctor", "--model", tmp_path / "merged", "--json").stdout)["parts"]
    assert {part["name"] for part in parts if not part["there"]} >= EXTRAS.keys()


@pytest.mark.parametrize(
    ("command", "extra", "module"),
    [
        (("serve",), "serve", "django"),
        (("worker",), "serve", "django"),
        (("tune", "--data", "{data}", "--engine", "trl"), "trl", "trl"),
        (("tune", "--data", "{data}", "--search", "random", "--trials", "2"), "search", "optuna"),
        (("tune", "--data", "{data}", "--prune"), "search", "optuna"),
        (("tune", "--data", "{data}", "--track", "wandb"), "wandb", "wandb"),
        (("export", "{run}", "--format", "gguf", "--to", "{folder}/g"), "gguf", "gguf"),
        (
            ("eval", "{run}", "--data", "{data}", "--judge", "http://127.0.0.1:9", "--judge-model", "m"),
            "judge",
            "openai",
        ),
    ],
)
def test_what_needs_an_extra_names_it_in_one_line(light, run, tmp_path, command, extra, module):
    data = write_pairs(tmp_path / "pairs.jsonl", range(4))
    given = [part.format(data=data, run=run, folder=tmp_path) for part in command]
    done = light(*given, *(("--out", tmp_path / "out") if "tune" in command else ()))
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].endswith(f"needs the package {module}; pip install 'pairtune[{extra}]'")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
