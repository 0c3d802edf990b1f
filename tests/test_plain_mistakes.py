"""Plain mistakes on the command line: one line that names the flag or file and says what to do, exit code 2."""

from __future__ import annotations

import json
import stat
import subprocess
import sys

import pytest
from conftest import small_run, write_pairs

from pairtune.cli import main

LONG, DIGITS = "a" * 300, "9" * 5000


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    """A folder with what the commands name."""
    folder = tmp_path_factory.mktemp("mistakes")
    run = small_run(tiny_model, folder, samples=0)
    write_pairs(folder / "pairs.jsonl", range(24))
    files = {
        "digits.jsonl": f'{{{{"prompt": "a", "chosen": "b", "rejected": {DIGITS}}}}}\n',
        "digits.yaml": f"epochs: {DIGITS}\n",
        "digits.json": f'{{{{"log_history": [{{{{"loss": {DIGITS}, "step": 1}}}}]}}}}',
        "deep.yaml": "epochs: " + "[" * 5000,
        "mistyped.yaml": "lernrate: 1e-4\n",
        "odd.json": '{"log_history": [{"loss": [1], "step": {"a": 1}}, 5, null, {"eval_loss": "x"}]}',
        "ragged.csv": "step,loss,eval_loss\n1,0.5\n2,0.4,0.3,7,8\n",
        "not-utf8.csv": b"\xff\xfe\x00\x01",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return {"model": tiny_model, "run": run.root, "pairs": folder / "pairs.jsonl", "folder": folder}


TUNE = "tune --model {model} --samples 0 --data"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{TUNE} {{pairs}} --out {LONG}", "the name is too long; choose a shorter one"),
        (f"{TUNE} {LONG}", "the name is too long"),
        (f"tune --data {{pairs}} --model {LONG}", "the name is too long"),
        (f"tune {LONG}.yaml", "File name too long"),
        (f"resume {LONG}", "the name is too long"),
        (f"report {LONG}", "the name is too long"),
        (f"audit {LONG}", "File name too long"),
        (f"chat {LONG}", "the name is too long"),
        (f"export {{run}} --format adapter --to {LONG}", "the name is too long"),
        (f"data convert {{pairs}} {LONG}.jsonl", "the name is too long"),
        (f"eval {LONG} --data {{pairs}}", "the name is too long"),
        (f"{TUNE} {{folder}}/digits.jsonl", "digits.jsonl: row 1: is not valid JSON"),
        ("tune {folder}/digits.yaml", "digits.yaml: is not valid YAML"),
        ("tune {folder}/deep.yaml", "deep.yaml: is not valid YAML"),
        ("tune {folder}/mistyped.yaml", "mistyped.yaml: lernrate: is not a setting"),
        ("audit {folder}/digits.json", "digits.json: cannot be read as JSON"),
        ("audit {folder}/odd.json", "odd.json: has no logged rows"),
        ("audit {folder}/ragged.csv", "ragged.csv, row 2: has more or fewer cells than the header"),
        ("audit {folder}/not-utf8.csv", "not-utf8.csv: cannot be read as CSV"),
        (f"{TUNE} {{pairs}} --out /proc/x/y", "--out /proc/x/y: cannot be created"),
        ("export {run} --format adapter --to /proc/x", "/proc/x: there is no such file or folder"),
        ("audit {run} --markdown /proc/x.md", "/proc/x.md: there is no such file or folder"),
        ("data convert {pairs} /proc/x.jsonl", "/proc/x.jsonl: there is no such file or folder"),
        ("worker --port 70000", "--port 70000: a port is a number from 0 to 65535"),
        ("serve --port -5", "--port -5: a port is a number from 0 to 65535"),
        ("serve --port 0 --host nowhere.invalid", "--host nowhere.invalid: is no address of this machine"),
        ("serve --backend nowhere", "--backend nowhere: is not the URL of a server"),
        (f"{TUNE} ''", "--data: String should have at least 1 character"),
        ("data inspect ''", "SRC: is empty; name a file"),
        ("tune --data {pairs} --model ''", "--model: is empty; name a model"),
        (
            f"{TUNE} {{pairs}} --lora-target q_prok",
            "--lora-target q_prok: not a linear layer of this model; use some of",
        ),
        ("report {folder}", "not a run folder"),
        ("resume {folder}", "not a run folder"),
    ],
)
def test_a_mistake_is_one_line(place, command, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    words = [word.format(**place).removeprefix("''") for word in command.split()]
    monkeypatch.setattr(sys, "argv", ["pairtune", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert ended.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert len(lines[0]) < 900
    assert "Traceback" not in said
    assert not list(tmp_path.glob("**/config.yaml")), "a run was left behind"


def test_settings_that_are_hardly_meant_are_said(place, tiny_model, monkeypatch, tmp_path, capsys):
    flags = [
        "--model",
        str(tiny_model),
        "--data",
        str(place["pairs"]),
        "--beta",
        "0.1",
        "--epochs",
        "1",
        "--samples",
        "0",
    ]
    more = ["--lr", "1e9", "--batch-size", "500", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["pairtune", "tune", *flags, *more])
    with pytest.raises(SystemExit):
        main()
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: --batch-size 500: there are only 20 to train on, so that each epoch is one step" in said
    assert "warning: --lr 1e+09: is far above what fine-tuning uses" in said


def test_nothing_in_a_file_moves_the_cursor(monkeypatch, tmp_path, capsys):
    escape = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e"
    row = {"prompt": f"q{escape}", "chosen": f"Yes.{escape}", "rejected": "No.", f"name{escape}": 1}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    cells = ",".join(f"{name}{escape}" for name in ("prompt", "chosen", "rejected"))
    (tmp_path / "pairs.csv").write_text(f"{cells}\nq,a,b\n")
    for name in ("pairs.jsonl", "pairs.csv"):
        monkeypatch.setattr(sys, "argv", ["pairtune", "data", "inspect", str(tmp_path / name)])
        with pytest.raises(SystemExit):
            main()
        said = "".join(capsys.readouterr())
        assert "title" in said
        assert not set("\x1b\x07\x9b\u202e") & set(said)


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_new_files_are_as_open_as_the_user_wants(tmp_path, mask, file, folder):
    code = """
import sys
from pathlib import Path
from pairtune.files import fill_folder, write_atomic
root = Path(sys.argv[1])
write_atomic(root / "file", "x")
fill_folder(root / "folder", lambda made: (made / "file").write_text("x"))
"""
    command = [sys.executable, "-c", f"import os; os.umask({mask})\n{code}", str(tmp_path)]
    subprocess.run(command, check=True)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder", "folder/file")}
    assert modes == {"file": file, "folder": folder, "folder/file": file}
