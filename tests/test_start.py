"""Runs that start from a tuned model: the same start in every engine, a chain of parents, results that are whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Lines, make_pair, pairtune, small_run, train_one
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_equivalence import CLOSE, assert_equal, trial
from transformers import AutoModelForCausalLM

from pairtune.data.table import PairTable
from pairtune.engine import native, trl
from pairtune.engine.trial import BaseOutputs, TrialInputs, load_start
from pairtune.errors import BadInput, Interrupted
from pairtune.files import saved_fingerprint
from pairtune.models.load import load_model, load_tuned, weights_fingerprint
from pairtune.models.start import open_base_of, open_start
from pairtune.pipeline import resume, tune
from pairtune.publish.export import export_run
from pairtune.resolve_config import resolve
from pairtune.run.folder import Run
from pairtune.serve.catalogue import Catalogue
from pairtune.serve.request import Limits

BUILT = ["continue", "new"]
AGAINST = ["start", "base"]


@pytest.fixture(scope="module")
def first(tiny_model, tmp_path_factory) -> Run:
    """Round one: a run whose winner has learned something."""
    folder = tmp_path_factory.mktemp("first")
    return small_run(tiny_model, folder, learning_rate=[1e-2], lora_rank=4, epochs=[2], out=folder / "round-1")


@pytest.fixture(scope="module")
def second(first, tmp_path_factory) -> dict[str, Run]:
    """Round two on top of it, both ways."""
    folder = tmp_path_factory.mktemp("second")
    return {built: small_run(first.root, folder, on_top=built, out=folder / built, samples=1) for built in BUILT}


def inputs_from(first: Run, built: str, against: str) -> TrialInputs:
    base = open_start(str(first.root), "float32", built, against, "lora").base
    pairs = [make_pair(number, rejected="No {0}" * (number % 3 + 1)) for number in range(8)]
    start = weights_fingerprint(load_start(trial(), base))
    tables = (PairTable.of(each, base.tokenizer) for each in (pairs[:7], pairs[7:]))
    return TrialInputs(base, start, *tables, "eval_loss")


def rewards(line) -> list[float]:
    return [line["rewards/chosen"], line["rewards/rejected"]]


@pytest.mark.parametrize("against", AGAINST)
@pytest.mark.parametrize("built", BUILT)
def test_the_trajectory_is_trls(first, built, against, tmp_path):
    inputs = inputs_from(first, built, against)
    ours, theirs = (
        train_one(engine, trial(epochs=2), replace(inputs, base_outputs=BaseOutputs()), tmp_path / engine.__name__)[1]
        for engine in (native, trl)
    )
    assert_equal(ours, theirs, CLOSE)
    if against == "start":
        assert rewards(ours[0]) == pytest.approx([0, 0], abs=1e-6)
    else:
        assert min(map(abs, rewards(ours[0]))) > 0.01  # what round one has learned already


@pytest.mark.parametrize("against", AGAINST)
@pytest.mark.parametrize("built", BUILT)
def test_side_by_side_is_one_by_one(first, built, against, tmp_path):
    inputs = inputs_from(first, built, against)
    trials = [trial(learning_rate=rate) for rate in (3e-3, 1e-3)]
    together, alone = Lines(), Lines()
    native.run_trials(trials, replace(inputs, base_outputs=BaseOutputs()), Run(tmp_path / "together"), together)
    for each in trials:
        native.run_trials([each], replace(inputs, base_outputs=BaseOutputs()), Run(tmp_path / each.name), alone)
    for each in trials:
        assert_equal(together.of[each.name], alone.of[each.name], 1e-5)


@pytest.mark.parametrize("built", BUILT)
def test_an_interrupted_run_goes_on_without_its_parent(first, built, tmp_path, monkeypatch):
    """The run keeps what it started from: parent and merged weights may be gone."""
    parent = shutil.copytree(first.root, tmp_path / "parent")
    whole = small_run(parent, tmp_path / "whole", on_top=built, epochs=[2], checkpoint_steps=1)
    calls = iter(range(100))
    train_step = native._TrialGroup._train_step

    def stop(*arguments):
        if next(calls) == 5:
            raise Interrupted("stopped")
        train_step(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(native._TrialGroup, "_train_step", stop)
        with pytest.raises(Interrupted):
            small_run(parent, tmp_path / "cut", on_top=built, epochs=[2], checkpoint_steps=1)
    monkeypatch.setenv("PAIRTUNE_CACHE", str(tmp_path / "empty"))
    shutil.rmtree(parent)
    cut = resume(tmp_path / "cut" / "run", Console(quiet=True))
    assert cut is not None
    assert saved_fingerprint(cut.paths.best) == saved_fingerprint(whole.paths.best)


@pytest.mark.parametrize("built", BUILT)
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_exports_are_whole(second, tiny_model, built, kind, tmp_path):
    run = second[built]
    parity = export_run(run, kind, tmp_path / "out")
    assert parity.holds
    base = open_base_of(run)
    expected = load_tuned(run.paths.best, base)
    if kind == "merged":
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    else:  # with nothing but what the adapter itself names
        named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert (Path(named) == tiny_model) == (built == "continue")
        plain = AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32)
        found = PeftModel.from_pretrained(plain, tmp_path / "out")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(found(ids).logits, expected(ids).logits, atol=1e-4)
        start = load_model(base.source, torch.float32, base.device)
        assert not torch.allclose(found(ids).logits, start(ids).logits, atol=1e-3)


def test_the_chain_of_parents_is_recorded_and_told(first, second, tmp_path):
    third = small_run(second["continue"].root / second["continue"].selection.winner, tmp_path, samples=0)
    lineage = third.lineage
    assert lineage is not None
    winner = second["continue"].selection.winner
    assert [parent.name for parent in lineage.parents] == [f"continue/{winner}", "round-1"]
    assert [parent.weights for parent in lineage.parents] == [
        saved_fingerprint(second["continue"].paths.best),
        saved_fingerprint(first.paths.best),
    ]
    assert lineage.round == 3
    card = third.paths.card.read_text()
    assert "Tuned in 3 rounds: tiny → round-1 (weights" in card
    assert f"→ continue/{winner} (weights {lineage.start.weights}, tuned on train.jsonl) → run" in card
    report = third.paths.report_text.read_text()
    assert f"The trials train the adapter of continue/{winner} further (weights {lineage.start.weights})" in report


def test_audits_of_rounds_are_clean_and_say_what_they_cannot_see(first, second, tmp_path):
    assert all(not [each for each in run.audit.findings if each.level == "error"] for run in second.values())
    run = small_run(first.root, tmp_path, reference="base", samples=0)
    assert "start-not-base" not in {each.rule for each in run.audit.findings}
    assert "it started from round-1 and is measured against the base" in json.dumps(run.audit.model_dump(mode="json"))


def test_every_round_is_served(second, monkeypatch, tmp_path):
    monkeypatch.setenv("PAIRTUNE_CACHE", str(tmp_path / "empty"))
    catalogue = Catalogue([str(run.root) for run in second.values()], None, Limits())
    try:
        served = {model.id: model for model in catalogue.available()}
        assert {"continue", "new"} <= served.keys()
        for name in ("continue", "new"):
            opened = catalogue.open(served[name])
            assert opened.fingerprint.endswith(f"+{saved_fingerprint(second[name].paths.best)}")
    finally:
        catalogue.close()


def test_a_fully_tuned_model_is_a_start_too(first, tmp_path):
    whole = small_run(first.root, tmp_path / "1", method="full", learning_rate=[1e-4], out=tmp_path / "whole")
    assert whole.lineage is not None
    assert whole.lineage.on_top == "new"  # all weights are trained, so the adapter is merged first
    after = small_run(whole.root, tmp_path / "2", reference="base", samples=1)
    assert after.lineage is not None
    assert (after.lineage.on_top, after.lineage.round) == ("whole", 3)
    assert min(map(abs, rewards(after.trials[0].log.steps[0].metrics()))) > 0.001


def test_a_long_chain_goes_back_to_the_plain_model(tiny_model, first, second, tmp_path, monkeypatch):
    """After a merged round the base is still the base, and everything is made anew when the cache is gone."""
    third = small_run(second["new"].root, tmp_path / "3", samples=0)
    fourth = small_run(third.root, tmp_path / "4", on_top="new", reference="base", samples=0)
    for run, merged in ((third, 1), (fourth, 2)):
        assert run.lineage is not None
        assert (run.lineage.base, run.lineage.merged) == (str(tiny_model), merged)
    line = third.trials[0].log.steps[0].metrics()
    assert rewards(line) == pytest.approx([0, 0], abs=1e-6)
    assert open_base_of(fourth).reference.folder == tiny_model
    before = export_run(fourth, "merged", tmp_path / "before")
    monkeypatch.setenv("PAIRTUNE_CACHE", str(tmp_path / "empty"))
    assert export_run(fourth, "merged", tmp_path / "after").answers == before.answers
    assert saved_fingerprint(tmp_path / "before") == saved_fingerprint(tmp_path / "after")


def test_a_fully_tuned_parent_that_has_changed_is_noticed(first, tmp_path):
    whole = small_run(
        first.root, tmp_path / "1", method="full", learning_rate=[1e-4], samples=0, out=tmp_path / "whole"
    )
    after = small_run(whole.root, tmp_path / "2", samples=0)
    again = small_run(first.root, tmp_path / "3", method="full", learning_rate=[1e-2], samples=0)
    shutil.rmtree(whole.root)
    shutil.copytree(again.root, whole.root)
    with pytest.raises(BadInput, match="holds other weights than those that this run was built on"):
        open_base_of(after)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lora_rank": 8}, "--lora-rank 8: the adapter that is trained further has 4; omit the flag, or use --on-top"),
        ({"lora_rank": [4, 8]}, "--lora-rank 4: the adapter that is trained further has 4"),
        ({"lora_dropout": 0.1}, "--lora-dropout: would drop parts"),
        ({"method": "full", "on_top": "continue"}, "--on-top continue: all weights are trained"),
    ],
)
def test_settings_that_do_not_fit_the_start(first, settings, told, tmp_path):
    with pytest.raises(BadInput, match=told):
        small_run(first.root, tmp_path, **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flag", "value"), [("--on-top", "new"), ("--on-top", "continue"), ("--reference", "base")])
def test_a_plain_model_has_no_adapter_to_build_on(tiny_model, flag, value, tmp_path):
    told = pairtune("tune", "--model", tiny_model, "--data", "bundled:concise", flag, value, "--out", tmp_path / "run")
    assert told.returncode == 2
    assert "is not a tuned model, which this is for; omit the flag" in told.stderr
    assert "Traceback" not in told.stderr
    assert not (tmp_path / "run").exists()


def test_adapters_from_elsewhere(tiny_model, tmp_path):
    """An adapter that peft made is trained further; one that our kernels cannot run gets a new one on top."""
    for name, more in {"plain": {}, "dora": {"use_dora": True}}.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        settings = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **more)
        adapted = get_peft_model(model, settings)
        for weights_name, weights in adapted.named_parameters():
            if "lora_B" in weights_name:
                torch.nn.init.normal_(weights, std=0.1)
        adapted.save_pretrained(tmp_path / name)
    run = small_run(tmp_path / "plain", tmp_path / "1", samples=0)
    assert run.lineage is not None
    assert (run.lineage.start.kind, run.lineage.start.name) == ("adapter", "plain")
    config = run.settings
    assert (config.lora_rank, config.lora_alpha, config.lora_targets) == (2, 8, ("q_proj", "v_proj"))
    with pytest.raises(BadInput, match=r"is not a plain LoRA adapter \(use_dora\)"):
        small_run(tmp_path / "dora", tmp_path / "2", samples=0)
    on_top = small_run(tmp_path / "dora", tmp_path / "3", on_top="new", samples=0)
    assert rewards(on_top.trials[0].log.steps[0].metrics()) == pytest.approx([0, 0], abs=1e-6)


def test_a_config_repeats_a_round(first, second, tmp_path):
    again = tune(resolve(second["continue"].paths.config, {"out": tmp_path / "again"}), Console(quiet=True))
    assert again is not None
    assert saved_fingerprint(again.paths.best) == saved_fingerprint(second["continue"].paths.best)


def _claims_a_rank(folder: Path) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "r": 10**9}))


def _of_other_sizes(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    (name, *_) = tensors
    save_file({**tensors, name: torch.zeros(4, 7)}, folder / "adapter_model.safetensors")


def _of_other_layers(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("layers.0", "layers.77"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_claims_a_rank, "says rank 1,000,000,000, and the weights have 4"),
        (_of_other_sizes, "does not fit its base model"),
        (_of_other_layers, "layers.77"),
        (_pickled, "cannot be loaded"),
    ],
)
def test_an_adapter_is_compared_with_its_base_before_memory_is_taken(first, tmp_path, spoil, said):
    """A thousand million ranks would need terabytes; nothing of that size is asked for."""
    adapter = tmp_path / "adapter"
    shutil.copytree(first.paths.best, adapter)
    spoil(adapter)
    base = open_base_of(first)
    beside_another = load_tuned(first.paths.best, base)
    for model in (None, beside_another):
        with pytest.raises(BadInput, match=said):
            load_tuned(adapter, base, model, "other")
    with pytest.raises(BadInput, match=said):
        small_run(adapter, tmp_path)
    assert not (tmp_path / "run").exists()
