"""Checked exports, and pushes with the real client to a fake Hub on the loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import pairtune, small_run, write_pairs
from markupsafe import escape
from model_hub import TOKEN, online, serve_models

from pairtune.errors import BadInput, RunFailed
from pairtune.publish import export
from pairtune.publish.export import export_run
from pairtune.publish.hub import collect
from pairtune.report.write import shared_report
from pairtune.run.folder import Run


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    return small_run(tiny_model, tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def full(tiny_model, tmp_path_factory):
    return small_run(tiny_model, tmp_path_factory.mktemp("full"), method="full", learning_rate=[1e-4])


def logits(model, tokenizer):
    ids = tokenizer("Are there 4 apples?", return_tensors="pt")
    with torch.inference_mode():
        return model(**ids).logits


def test_an_adapter_and_a_merged_model_are_the_trained_one(run, tmp_path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parities = {kind: export_run(run, kind, tmp_path / kind) for kind in ("adapter", "merged")}
    assert all(parity.holds for parity in parities.values())
    assert parities["adapter"].logp_difference == 0
    assert json.loads((tmp_path / "merged" / "parity.json").read_text())["same_answers"] == 2
    tokenizer = AutoTokenizer.from_pretrained(run.paths.best)
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(run.paths.best), tokenizer)
    adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(adapter, tokenizer), expected)
    torch.testing.assert_close(logits(merged, again), expected, rtol=1e-4, atol=1e-4)
    assert not list((tmp_path / "merged").glob("*.bin"))


def test_a_whole_model_has_no_adapter_but_can_be_exported(full, tmp_path):
    assert export_run(full, "merged", tmp_path / "merged").logp_difference == 0
    with pytest.raises(BadInput, match="there is no adapter; use merged"):
        export_run(full, "adapter", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_what_is_not_the_trained_model_does_not_leave(run, tmp_path, monkeypatch):
    write = export._write

    def spoilt(run, weights, kind, base, folder, quantisation):
        write(run, weights, kind, base, folder, quantisation)
        from safetensors.torch import load_file, save_file

        (file,) = folder.glob("*.safetensors")
        save_file({name: tensor * 1.2 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})

    monkeypatch.setattr(export, "_write", spoilt)
    for kind in ("adapter", "merged"):
        with pytest.raises(RunFailed, match="the exported model does not match the trained one"):
            export_run(run, kind, tmp_path / kind)
        assert not (tmp_path / kind).exists()


def test_another_chat_template_does_not_leave(run, tmp_path, monkeypatch):
    write = export._write

    def spoilt(run, weights, kind, base, folder, quantisation):
        write(run, weights, kind, base, folder, quantisation)
        for file in folder.glob("*.jinja"):
            file.write_text(file.read_text().replace("<|im_start|>", "<|im_end|>"))

    monkeypatch.setattr(export, "_write", spoilt)
    with pytest.raises(RunFailed, match="same prompt tokens: False"):
        export_run(run, "merged", tmp_path / "merged")


def test_the_command_says_what_the_check_found(run, tmp_path):
    done = pairtune("export", run.root, "--format", "merged", "--to", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "identical greedy answers: 2 of 2" in done.stdout
    again = pairtune("export", run.root, "--format", "merged", "--to", tmp_path / "out")
    assert (again.returncode, "already exists" in again.stderr) == (2, True)
    wrong = pairtune("export", run.root, "--format", "onnx", "--to", tmp_path / "other")
    assert (wrong.returncode, "--format: should be adapter, merged or gguf" in wrong.stderr) == (2, True)


@pytest.fixture
def hub():
    with serve_models() as hub:
        yield hub


def test_what_is_pushed_arrives_whole_in_one_commit(run, hub, tmp_path):
    done = pairtune(
        "push", run.root, "--repo", "someone/demo", "--what", "merged", "--private", **online(hub, tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/someone/demo"
    assert hub.private == {"someone/demo": True}
    assert len(hub.commits) == 1
    arrived = hub.repositories["someone/demo"]["main"]
    texts = [prompt[-1]["content"] for prompt in run.generations.prompts]
    texts += [model.answers[0].text.split("\n")[0][:20].strip() for model in run.generations.models.values()]
    texts += [run.data.example.chosen, *(each.chosen for each in run.regressions.pairs)]
    own = (run.root / "report.html").read_text()
    assert all(str(escape(text)) in own for text in texts if text)
    for name, content in arrived.items():  # other people's texts stay here
        said = content.decode("utf-8", "replace")
        assert not [text for text in texts if len(text) > 3 and (text in said or str(escape(text)) in said)], name
    for name in ("report.html", "report.md", "README.md"):
        assert "left out of reports that are shared" in arrived[name].decode()
    assert "answers" not in json.loads(arrived["parity.json"])
    for file in run.paths.figures.iterdir():
        assert arrived[f"figures/{file.name}"] == file.read_bytes()
    export_run(run, "merged", tmp_path / "merged")
    for file in (tmp_path / "merged").iterdir():
        if file.name in ("tokenizer_config.json", "parity.json"):  # says whether it was found offline; has answers
            continue
        assert arrived[file.name] == file.read_bytes(), file.name
    card = arrived["README.md"].decode()
    assert 'from_pretrained("someone/demo")' in card
    assert "library_name: transformers" in card
    for content in arrived.values():
        assert TOKEN.encode() not in content
        assert str(run.root.parent).encode() not in content
    assert TOKEN not in done.stdout + done.stderr


def test_prompts_are_published_where_somebody_says_so(run, hub, tmp_path):
    flags = ("--repo", "someone/open", "--what", "merged", "--share-prompts")
    assert pairtune("push", run.root, *flags, **online(hub, tmp_path)).returncode == 0
    arrived = hub.repositories["someone/open"]["main"]
    for name in ("report.html", "report.md"):
        assert arrived[name] == (run.root / name).read_bytes()


def test_a_run_that_shares_its_prompts_can_be_published_without_them(run, tmp_path):
    root = shutil.copytree(run.root, tmp_path / "open")
    with (root / "config.yaml").open("a") as file:
        file.write("share_prompts: true\n")
    sharing = Run.finished(root)
    for asked, whole in ((None, True), (True, True), (False, False)):
        scratch = tmp_path / str(asked)
        scratch.mkdir()
        files = collect(sharing, "someone/open", "merged", scratch, share_prompts=asked)
        assert ("left out of reports that are shared" not in files["report.md"].decode()) == whole


def test_an_adapter_from_the_hub_answers_as_the_runs_best(tiny_model, hub, tmp_path):
    """Base and adapter both come from the Hub: tuned from a Hub id, pushed, and loaded by PEFT from the upload."""
    hub.repositories["someone/tiny"] = {"main": {file.name: file.read_bytes() for file in tiny_model.iterdir()}}
    hub.private["someone/tiny"] = False
    environment = online(hub, tmp_path / "home")
    rows = {
        name: write_pairs(tmp_path / f"{name}.jsonl", numbers)
        for name, numbers in (("train", range(8)), ("held", range(20, 24)))
    }
    done = pairtune(
        *("tune", "--model", "someone/tiny", "--data", rows["train"], "--eval-data", rows["held"], "--lr", "3e-3"),
        *("--beta", "0.1", "--epochs", "1", "--dtype", "float32", "--samples", "1", "--out", tmp_path / "run"),
        *("--push", "someone/demo"),
        **environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == f"{hub.address}/someone/demo"  # --push did it
    arrived = hub.repositories["someone/demo"]["main"]
    commit = hub.commit_of(hub.repositories["someone/tiny"]["main"])
    run = Run.finished(tmp_path / "run")
    assert run.settings.model == f"someone/tiny#{commit}"
    assert run.environment.base.revision == commit
    named = json.loads(arrived["adapter_config.json"])
    assert (named["base_model_name_or_path"], named["revision"]) == ("someone/tiny", commit)
    # The base's author goes on; the run and its adapter stay with the commit that they were made from.
    hub.repositories["someone/tiny"]["main"] = {**hub.repositories["someone/tiny"]["main"], "model.safetensors": b"{}"}
    shutil.rmtree(tmp_path / "home")
    assert "base_model: someone/tiny" in arrived["README.md"].decode()
    script = (
        "import sys, torch\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer('Are there 4 apples?', return_tensors='pt')\n"
        "there = AutoPeftModelForCausalLM.from_pretrained('someone/demo')\n"
        "here = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "with torch.inference_mode():\n"
        "    assert torch.equal(there(**ids).logits, here(**ids).logits)\n"
        "    with there.disable_adapter():\n"
        "        assert not torch.equal(there(**ids).logits, here(**ids).logits)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run" / "best")]
    loaded = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert loaded.returncode == 0, loaded.stderr
    evaluated = [
        pairtune("eval", target, "--data", rows["held"], "--samples", 0, "--dtype", "float32", "--json", **environment)
        for target in ("someone/demo", tmp_path / "run")
    ]
    there, here = (json.loads(done.stdout)["metrics"] for done in evaluated)
    assert there == pytest.approx(here, abs=1e-6)


def test_a_push_that_could_not_be_loaded_is_refused_before_training(tiny_model, tmp_path):
    rows = write_pairs(tmp_path / "pairs.jsonl", range(12))
    done = pairtune("tune", "--model", tiny_model, "--data", rows, "--push", "someone/demo", "--out", tmp_path / "run")
    assert (done.returncode, "--push someone/demo: the base model exists only on this machine" in done.stderr) == (
        2,
        True,
    )
    assert not (tmp_path / "run").exists()


def test_a_push_that_fails_leaves_a_finished_run(full, hub, tmp_path):
    rows = {name: full.root.parent / f"{name}.jsonl" for name in ("train", "held")}
    hub.fault = lambda method, path: (403, {}) if path == "/api/repos/create" else None
    model = json.loads(full.paths.environment.read_text())["base"]["name"]
    done = pairtune(
        *("tune", "--model", model, "--method", "full", "--data", rows["train"], "--eval-data", rows["held"]),
        *("--lr", "1e-4", "--beta", "0.1", "--epochs", "1", "--dtype", "float32", "--samples", "0"),
        *("--push", "someone/demo", "--out", tmp_path / "run"),
        **online(hub, tmp_path / "home"),
    )
    assert done.returncode == 1
    assert "may not write there" in done.stderr
    assert "the run is complete; `pairtune push" in done.stderr
    assert (tmp_path / "run" / "COMPLETE").is_file()


def test_chat_takes_an_adapter(run):
    command = [sys.executable, "-m", "pairtune", "chat", str(run.paths.best)]
    done = subprocess.run(command, input="hello\n/base\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "talking to the base model" in " ".join(done.stdout.split())


def test_a_dry_run_lists_everything_and_sends_nothing(run, hub, tmp_path):
    done = pairtune(
        "push", run.root, "--repo", "someone/demo", "--what", "merged", "--dry-run", **online(hub, tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    assert f"{len(shared_report(run, prompts=False).html.encode()):,}  report.html" in done.stdout
    assert not hub.asked


def test_what_may_not_be_published_is_refused(run, hub, tmp_path):
    environment = online(hub, tmp_path / "home")
    push = ("push", tmp_path / "run", "--repo", "someone/demo", "--what")
    shutil.copytree(run.root, tmp_path / "run")
    refused = pairtune(*push, "adapter", **environment)
    assert "the adapter's base model exists only on this machine" in refused.stderr
    audit = json.loads(run.paths.audit.read_text())
    wrong = {**audit["findings"][0], "level": "error", "rule": "start-not-base"}
    (tmp_path / "run" / "audit.json").write_text(json.dumps({**audit, "findings": [wrong]}))
    refused = pairtune(*push, "merged", **environment)
    assert "start-not-base" in refused.stderr
    assert "--anyway" in refused.stderr
    assert refused.returncode == 2
    (tmp_path / "run" / "best" / "training_args.bin").write_bytes(b"pickled")
    refused = pairtune(*push, "merged", "--anyway", **environment)
    assert "training_args.bin; only safetensors are published" in refused.stderr
    (tmp_path / "run" / "COMPLETE").unlink()
    assert "unfinished" in pairtune(*push, "merged", **environment).stderr
    assert not hub.asked


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, 2, "log in first"),
        (403, 2, "may not write there"),
        (404, 1, "no such repository"),
        (409, 1, "someone else is writing"),
        (429, 1, "(wait 7 s)"),
        (500, 1, "the Hub answered 500; try again"),
    ],
)
def test_the_hubs_refusals_are_said(run, hub, tmp_path, status, code, message):
    hub.fault = lambda method, path: (
        (status, {"Retry-After": "7"} if status == 429 else {}) if "/commit/" in path else None
    )
    done = pairtune("push", run.root, "--repo", "someone/demo", "--what", "merged", **online(hub, tmp_path))
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr
    assert not hub.repositories["someone/demo"]["main"]


def test_a_connection_lost_in_an_upload_leaves_nothing_and_the_second_try_completes(run, hub, tmp_path):
    hub.fault = lambda method, path: "drop" if path.startswith("/upload/") and hub.uploaded else None
    push = ("push", run.root, "--repo", "someone/demo", "--what", "merged")
    done = pairtune(*push, **online(hub, tmp_path))
    assert done.returncode == 1, done.stderr
    assert "nothing was published" in done.stderr.lower()
    assert not hub.repositories["someone/demo"]["main"]
    before = hub.uploaded
    hub.fault = lambda method, path: None
    done = pairtune(*push, **online(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    lfs = [name for name in hub.repositories["someone/demo"]["main"] if name.endswith((".json", ".safetensors"))]
    assert hub.uploaded <= len(lfs)
    assert before >= 1


def test_a_branch_can_be_named(run, hub, tmp_path):
    done = pairtune(
        *("push", run.root, "--repo", "someone/demo", "--what", "merged", "--revision", "second"),
        **online(hub, tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.repositories["someone/demo"]["second"]
    assert not hub.repositories["someone/demo"]["main"]


def test_a_name_that_is_none_is_said(run, hub, tmp_path):
    done = pairtune("push", run.root, "--repo", "a/b/c", "--what", "merged", **online(hub, tmp_path))
    assert (done.returncode, "USER/NAME" in done.stderr) == (2, True), done.stderr
