"""The command line as users run it: real processes, exit codes, one-line errors for what they can fix."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_pair

PAIRTUNE = [sys.executable, "-m", "pairtune"]


def pairtune(*arguments, **options):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*PAIRTUNE, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False, **options
    )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [make_pair(number).conversational() for number in range(8)]
    lines = [
        {"prompt": row["prompt"][0]["content"], **{side: row[side][0]["content"] for side in ("chosen", "rejected")}}
        for row in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def flags(tiny_model, pairs):
    return ["--model", tiny_model, "--data", pairs, "--dtype", "float32", "--epochs", 2, "--lr", 3e-3, "--samples", 2]


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory) -> Path:
    """A finished run with a 1 x 2 grid."""
    out = tmp_path_factory.mktemp("runs") / "small"
    done = pairtune("tune", *flags, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["run"] == str(out)
    assert [trial["status"] for trial in answer["trials"]] == ["finished", "finished"]
    return out


def test_a_run_folder_holds_what_the_design_says(run):
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    for trial in ("lr-0.003-beta-0.1", "lr-0.003-beta-0.2"):
        expected = {"trial.json", "metrics.jsonl", "evals/epoch-1.parquet", "evals/epoch-2.parquet"}
        expected |= {"best/adapter_model.safetensors", "best/adapter_config.json", "best/tokenizer.json"}
        assert {f"trials/{trial}/{name}" for name in expected} <= files
    assert {"config.yaml", "data.json", "sweep.json", "selection.json", "generations.json", "COMPLETE"} <= files
    assert {"best/adapter_model.safetensors", "best/adapter_config.json", "best/tokenizer.json"} <= files
    written = [path for path in run.rglob("*") if path.is_file()]
    assert max(written, key=lambda path: path.stat().st_mtime_ns).name == "COMPLETE"


def test_best_loads_with_peft_and_is_the_winners(run):
    from peft import AutoPeftModelForCausalLM

    winner = json.loads((run / "selection.json").read_text())["winner"]
    best = (run / "best" / "adapter_model.safetensors").read_bytes()
    assert best == (run / "trials" / winner / "best" / "adapter_model.safetensors").read_bytes()
    model = AutoPeftModelForCausalLM.from_pretrained(run / "best")
    assert any(bool(weights.any()) for name, weights in model.named_parameters() if "lora_B" in name)


def test_the_report_shows_every_trial_in_the_assignments_columns(run):
    from rich.console import Console

    from pairtune.report.render_run import render_run
    from pairtune.run.folder import Run

    console = Console(record=True, width=200, file=io.StringIO())
    console.print(render_run(Run(run)))
    shown = console.export_text()
    sweep, selection = (json.loads((run / f"{name}.json").read_text()) for name in ("sweep", "selection"))
    for trial in sweep["trials"]:
        assert f"lr=0.003, beta={trial['beta']:g}" in shown
        assert f"{trial['metrics']['eval_loss']:.6f}" in shown
        assert f"{trial['metrics']['eval_logits/rejected']:.6f}" in shown
    assert selection["why"] in shown
    assert f"pairtune chat {run}" in shown.replace("\n", "")
    assert shown.count("before (") == shown.count("after (") == 1  # one validation prompt


def test_chat_answers_switches_and_ends(run):
    said = "hello\n/base\nhello\n/help\n\n/new\n/tuned\n/quit\nnever read\n"
    done = pairtune("chat", run, input=said)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())  # lines are wrapped, and folders' names are long or short
    assert "talking to the base model" in shown
    assert "talking to the tuned model" in shown
    assert shown.count("/quit (or Ctrl-D) ends") == 2
    assert "never read" not in done.stdout


@pytest.mark.parametrize("kind", ["BatchedModels", "PlainModels"])
def test_base_and_tuned_in_a_chat_are_the_base_and_the_tuned_model(run, kind):
    import torch

    from pairtune.models.generate import stream_answer
    from pairtune.models.load import load_model, load_tuned
    from pairtune.models.sampling import SamplingParams
    from pairtune.models.start import open_base_of
    from pairtune.run.folder import Run
    from pairtune.serve import terminal

    greedy = SamplingParams(max_tokens=24)
    models, opened = getattr(terminal, kind)(str(run)), open_base_of(Run(run))
    asked = [{"role": "user", "content": "Are there 3 apples?"}]
    answers = {name: "".join(models.stream(name, asked, greedy)) for name in ("tuned", "base", "tuned")}
    models.close()
    base = load_model(opened.source, torch.float32)
    assert answers["base"] == "".join(stream_answer(base, opened.tokenizer, asked, greedy))
    tuned = load_tuned(run / "best", opened)
    assert answers["tuned"] == "".join(stream_answer(tuned, opened.tokenizer, asked, greedy))
    assert answers["tuned"] != answers["base"]


def test_chat_with_a_plain_model_has_no_tuned_one(tiny_model):
    done = pairtune("chat", tiny_model, input="/tuned\nhello\n")
    assert done.returncode == 0, done.stderr
    assert "this is a plain model" in done.stdout


def test_a_runs_own_config_repeats_it_bit_for_bit(run, tmp_path):
    done = pairtune("tune", run / "config.yaml", "--out", tmp_path / "again", "--beta", 0.1, "--samples", 0)
    assert done.returncode == 0, done.stderr
    adapter = "trials/lr-0.003-beta-0.1/best/adapter_model.safetensors"
    assert (tmp_path / "again" / adapter).read_bytes() == (run / adapter).read_bytes()
    assert not (tmp_path / "again" / "generations.json").exists()


def test_a_full_run_saves_a_full_model_and_chats(flags, tmp_path):
    out = tmp_path / "full"
    done = pairtune("tune", *flags, "--method", "full", "--beta", 0.1, "--out", out)
    assert done.returncode == 0, done.stderr
    assert (out / "best" / "model.safetensors").is_file()
    assert pairtune("chat", out, input="hello\n/base\nhello\n").returncode == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--lr", "-1e-5"], "--lr: must be greater than 0, not -1e-05"),
        (["--lr", "fast"], "--lr"),
        (["--frob"], "No such option: --frob"),
        (["--data", "missing.jsonl"], "--data missing.jsonl: no such file"),
        (["--model", "missing.gguf"], "--model missing.gguf: no such file"),
        (["--model", "nobody/nothing"], "cannot be loaded from the Hub"),
        (["--out", "taken"], "--out taken: already exists"),
        (["--data", "bad.jsonl"], "bad.jsonl: row 2: field chosen is missing"),
        (["--data", "empty.jsonl"], "empty.jsonl: row 1: field rejected is empty"),
        (["--data", "same.jsonl"], "same.jsonl: row 1: field rejected is the same as chosen"),
        (["--data", "broken.jsonl"], "broken.jsonl: row 1: is not valid JSON"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, tmp_path, changes, message):
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({"prompt": "p", "rejected": "r"}) + "\n")
    (tmp_path / "empty.jsonl").write_text(json.dumps({**good, "rejected": " "}) + "\n")
    (tmp_path / "same.jsonl").write_text(json.dumps({**good, "rejected": "c"}) + "\n")
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    before = {path.name for path in tmp_path.iterdir()}
    done = pairtune("tune", *flags, "--out", "new", *changes, cwd=tmp_path)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("opening ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == before, "bad input leaves nothing behind"


def test_one_ctrl_c_stops_a_run_with_a_checkpoint_and_resume_ends_it(flags, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [*PAIRTUNE, *map(str, ["tune", *flags, "--out", out, "--epochs", 60])],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    metrics = out / "trials" / "lr-0.003-beta-0.1-epochs-60" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping after this step" in errors
    assert f"`pairtune resume {out}` continues from there" in errors
    assert "Traceback" not in errors
    assert not (out / "COMPLETE").exists()
    refused = pairtune("chat", out, input="")
    assert (refused.returncode, "unfinished" in refused.stderr) == (2, True)

    done = pairtune("resume", out, "--json")
    assert done.returncode == 0, done.stderr
    assert (out / "COMPLETE").is_file()
    trials = json.loads(done.stdout)["trials"]
    assert [trial["status"] for trial in trials] == ["finished"] * 4
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if "eval_loss" not in line]
    assert steps == list(range(1, 3 * 60 + 1))
    again = pairtune("resume", out, "--json")
    assert (again.returncode, json.loads(again.stdout)["trials"]) == (0, trials), "nothing is left to do"


def test_resuming_what_is_no_run_is_bad_input(tmp_path):
    done = pairtune("resume", tmp_path / "none")
    assert done.returncode == 2
    assert "not a run folder" in done.stderr


def test_pairs_that_have_changed_since_are_bad_input(flags, pairs, run, tmp_path):
    """A run without COMPLETE whose data file has gained a row."""
    copy, data = tmp_path / "run", tmp_path / "pairs.jsonl"
    shutil.copytree(run, copy)
    (copy / "COMPLETE").unlink()
    data.write_text(pairs.read_text() + json.dumps({"prompt": "new", "chosen": "a", "rejected": "b"}) + "\n")
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(str(pairs), str(data)))
    done = pairtune("resume", copy)
    assert done.returncode == 2
    assert "the pairs have changed since" in done.stderr


def test_help_answers_without_loading_anything_heavy():
    code = "import sys; sys.argv = ['pairtune', '--help']\ntry:\n  from pairtune.cli import main; main()\nfinally:\n"
    code += "  heavy = {'torch', 'transformers', 'trl', 'pyarrow', 'pydantic', 'datasets'} & set(sys.modules)\n"
    code += "  print('heavy:', sorted(heavy), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "heavy: []" in done.stderr
    for command in ("demo", "tune", "chat", "data"):
        assert command in done.stdout


def test_chatting_waits_for_no_peft(run):
    """Nor for any other library that only training needs."""
    code = "import sys; sys.argv = ['pairtune', 'chat', sys.argv[1]]\ntry:\n  from pairtune.cli import main; main()\n"
    code += "finally:\n  print('heavy:', sorted({'peft', 'trl', 'datasets'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], input="hello\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stderr


def test_a_terminal_shows_at_once_that_libraries_are_loaded(tiny_model):
    """Before the first library that takes seconds is imported; where it is not a terminal, nothing is."""
    ours, theirs = pty.openpty()
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['pairtune', 'chat', sys.argv[1]]\n"
    code += "from pairtune.cli import main; main()"
    command = [sys.executable, "-c", code, str(tiny_model)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, check=False)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode != 0
    assert "loading PyTorch" in shown.partition("Traceback")[0]
    assert "loading" not in subprocess.run(command, capture_output=True, text=True, check=False).stderr.split("\n")[0]


def test_no_command_shows_the_help():
    done = pairtune()
    assert (done.returncode, "tune" in done.stdout) == (0, True)
