"""What the documentation says is so: generated pages are current, links lead somewhere, commands and code run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml
from conftest import make_pair, small_run, write_pairs

import pairtune as library
from pairtune import cli
from pairtune.config import Loss
from pairtune.models import resolve as models
from pairtune.run.metrics import EXAMPLE_METRICS, KL, KL_ESTIMATE, TrainingStep

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
GENERATED = ("commands_reference", "formats_reference", "rules_reference", "settings_reference")

# Commands that are parsed but not run here, by what they begin with, and where they are.
ELSEWHERE = {
    "serve": "runs until it is stopped (test_site, test_site_walk)",
    "worker": "runs until it is stopped (test_api, test_serve)",
    "votes": "needs votes (test_votes, test_loop)",
    "push": "needs an account (test_publish)",
    "doctor": "describes this machine (test_machine_doctor)",
}
_Missing = next(each for each in typer.BadParameter.__subclasses__() if each.__name__ == "MissingParameter")
PLACEHOLDER = re.compile(r"\b(ADAPTER_OR_MODEL|REWARD_MODEL|HOST|SRC|CONFIG|RUN)\b|--on |/shared/|USER/NAME")
_NO_GGUF = "--format gguf"  # of a tokenizer of bytes (test_gguf)
# What a page names that is not here.
INSTEAD = {
    "Dahoas/rm-static@train": "rm_train.jsonl",
    "Dahoas/rm-static@test": "rm_test.jsonl",
    "--data votes": "--data voted.jsonl",
    "Qwen/Qwen2-0.5B-Instruct": "tiny",
}


def blocks(page: Path, *languages: str) -> list[str]:
    """The page's code blocks in these languages."""
    found = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [code for language, code in found if language in languages]


def commands(page: Path) -> list[str]:
    """The calls of pairtune in the page's shell blocks, and those it has within a line."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("pairtune ")]


def parsed(line: str) -> tuple[str, list[str]]:
    """The name and the arguments of a command, which the command itself must accept."""
    words = shlex.split(re.sub(r"\[(--[\w-]+)\]", r"\1", line), comments=True)[1:]
    command: Any = typer.main.get_command(cli.app)
    name = ""
    while hasattr(command, "commands"):
        name, words = f"{name} {words[0]}".strip(), words[1:]
        assert name.split()[-1] in command.commands, f"{line}: there is no command {name}"
        command = command.commands[name.split()[-1]]
    command.make_context(name, list(words))
    return name, words


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_current(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.FILE.read_text(encoding="utf-8") == script.reference(), "`make docs` writes it anew"


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    warnings = [line for line in done.stderr.splitlines() if re.match(r"(WARNING|ERROR)", line)]
    assert (done.returncode, warnings) == (0, [])
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text("utf-8"))
        assert not fetched, page.name


def test_a_link_that_leads_nowhere_is_a_warning(tmp_path: Path):
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Home\n\n[nowhere](gone.md) [part](#gone)\n")
    settings |= {"nav": [{"Home": "index.md"}], "plugins": ["search"], "site_dir": "site"}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "gone.md" in done.stderr
    assert "#gone" in done.stderr


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_metric_is_in_the_glossary():
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    logged = {field.alias or name for name, field in TrainingStep.model_fields.items()}
    for name in {*EXAMPLE_METRICS, *logged, f"eval_{KL}", KL_ESTIMATE}:
        assert f"`{name}`" in text, name


def test_every_loss_has_its_source():
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    names = [name for part in get_args(Loss) for name in (get_args(part) or (part,))]
    assert len(names) == 16
    for name in names:
        assert re.search(rf"^\|[^|]*`{name}`[^|]*\|", text, re.MULTILINE), name


def test_every_function_is_on_the_python_page():
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    for name in library.__all__:
        if name != "__version__":
            assert re.search(rf"\b{name}\b", text) or name == "Interrupted", name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_on_every_page_are_accepted(page: Path):
    for line in commands(page):
        assert parsed(line)[0], line
    for code in re.findall(r"`(pairtune [^`\n]+)`", page.read_text(encoding="utf-8")):
        if not re.search(r"\.\.\.|--help|COMMAND|THIS_FILE|^pairtune --", code):
            with contextlib.suppress(_Missing):  # within a sentence a command need not be whole
                parsed(code)


def test_a_flag_that_is_not_there_is_noticed():
    with pytest.raises(cli._UsageError):
        parsed("pairtune tune --data pairs.csv --learning-speed 3")
    with pytest.raises(AssertionError, match="there is no command tuen"):
        parsed("pairtune tuen --data pairs.csv")


class TestPagesRun:
    """What a reader would type, in order, with a tiny model in the place of the bundled one."""

    ALL = ("README.md", "docs/tutorial.md", *(f"docs/how-to/{name}.md" for name in ("own-data", "small-machines")))
    MORE = (*(f"docs/how-to/{name}.md" for name in ("publish", "votes", "from-trl")), "docs/python.md")

    @pytest.fixture
    def place(self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder with the files that pages name."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(models, "bundled_gguf", lambda: Path("smollm2.gguf"))
        monkeypatch.setattr(models, "_dequantised", lambda file, flag="--model": tiny_model)
        for commands in ("training", "serving", "data"):  # would slow the tests that follow
            monkeypatch.setattr(f"pairtune.cli.{commands}.share_processors", lambda *, give_way: None)
        (tmp_path / "tiny").symlink_to(tiny_model)
        texts = [
            (f"How many are {n} apples?", f"There are {n}, I counted.", "No idea" * (n % 3 + 1)) for n in range(24)
        ]
        for name, header in (("pairs", "prompt,chosen,rejected"), ("reviews", "question,good,bad")):
            lines = [",".join(f'"{part}"' for part in row) for row in texts]
            Path(f"{name}.csv").write_text("\n".join([header, *lines]))
        for name, numbers in (("held-out", range(60, 70)), ("other-pairs", range(70, 80)), ("pairs", range(30))):
            write_pairs(Path(f"{name}.jsonl"), numbers)
        write_rows("voted", (dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in texts))
        write_rows("thumbs", ({"prompt": f"{n}?", "completion": f"yes {n}", "label": n % 2 == 0} for n in range(40)))
        for name, numbers in (("train", range(30)), ("test", range(100, 112))):
            write_rows(f"rm_{name}", map(static_row, numbers))
        Path("prompts.txt").write_text("What is a tree?\nWhat is a lake?\nWhere do birds sleep?\n")
        return tmp_path

    @pytest.mark.parametrize("name", [*ALL, *MORE])
    def test_page(
        self,
        name: str,
        place: Path,
        tiny_model: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        page, ran = ROOT / name, 0
        lines = commands(page)
        if "runs/hh" in "".join(lines) and not re.search(r"--out runs/hh(\s|$)", "\n".join(lines)):
            small_run(tiny_model, place / "before").root.rename(place / "moved")
            (place / "runs").mkdir()
            (place / "moved").rename(place / "runs" / "hh")
        for line in lines:
            if self.only_parsed(line):
                continue
            ended = run_command(line, monkeypatch)
            assert ended == 0 or line.startswith("pairtune compare"), (line, capsys.readouterr().err[-500:])
            ran += 1
        for code in blocks(page, "python"):
            exec(compile(code, name, "exec"), {})  # noqa: S102 - our own page
            ran += 1
        assert ran

    @staticmethod
    def only_parsed(line: str) -> bool:
        words = line.split()
        return words[1] in ELSEWHERE or _NO_GGUF in line or bool(PLACEHOLDER.search(line.split("#", maxsplit=1)[0]))


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command in this process, with an empty standard input, and return its exit code."""
    for named, there in INSTEAD.items():
        line = line.replace(named, there)
    monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def write_rows(name: str, rows: Iterator[dict]) -> None:
    Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def static_row(number: int) -> dict:
    """A row like those of Dahoas/rm-static."""
    pair = make_pair(number)
    return {
        "prompt": f"\n\nHuman: {pair.prompt[0]['content']}\n\nAssistant:",
        "response": f" {pair.chosen}",
        "chosen": f" {pair.chosen}",
        "rejected": f" {pair.rejected}",
    }
