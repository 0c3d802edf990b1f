"""Models are prompted as they were trained, BOS included, and stop at their template's end-of-answer token."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import gemma_tokenizer, pairtune, save_tiny, small_run, write_pairs
from test_serve import Asker

from pairtune.data.preference import PreferencePair
from pairtune.data.tokens import PairTokenizer
from pairtune.models.generate import end_tokens, generate_answers, stream_answer
from pairtune.models.load import DEFAULT_TEMPLATE, load_model, load_tokenizer
from pairtune.models.sampling import SamplingParams
from pairtune.models.start import open_base_of
from pairtune.publish import export
from pairtune.publish.export import export_run
from pairtune.run.folder import Run
from pairtune.serve import api
from pairtune.serve.catalogue import OpenedModel
from pairtune.serve.request import Finished, Limits
from pairtune.serve.scheduler import BatchScheduler

ASKED = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho."},
    {"role": "user", "content": "Who?"},
]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """The folder of a random model with a tokenizer like Gemma's."""
    return save_tiny(tmp_path_factory.mktemp("gemma") / "base", gemma_tokenizer(), "<bos>")


@pytest.fixture(scope="module")
def plain_run(bos_model, tmp_path_factory):
    """A run on a base without a template, whose tokenizer begins text with BOS."""
    return small_run(bos_model, tmp_path_factory.mktemp("plain"))


def says(model, token):
    """Make the model generate only one token: its last hidden state is all ones, which one row of the head matches."""
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.zero_()
        model.get_input_embeddings().weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 1.0
    return model


def test_bos_stands_once_before_a_prompt_wherever_it_is_rendered(bos_model, monkeypatch):
    tokenizer, model = load_tokenizer(bos_model), load_model(bos_model, torch.float32)
    (pair,) = PairTokenizer(tokenizer).encode([PreferencePair(tuple(ASKED), "you", "me", "t:1")])
    trained = pair.prompt_ids
    assert trained.count(tokenizer.bos_token_id) == 1
    asked = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: asked.append(given["input_ids"]) or generate(**given))
    generate_answers(model, tokenizer, [ASKED], SamplingParams(max_tokens=1))
    list(stream_answer(model, tokenizer, ASKED, SamplingParams(max_tokens=1)))
    opened = OpenedModel(SimpleNamespace(limits=Limits()), None, tokenizer, frozenset(), "")
    request = api.ChatRequest.model_validate({"model": "m", "messages": ASKED})
    assert [ids[0].tolist() for ids in asked] == [trained, trained]
    assert api._encode(opened, request) == trained
    assert export._ids(tokenizer, ASKED) == trained


def test_answers_stop_at_an_end_of_turn_token_without_a_role(gemma):
    tokenizer, model = load_tokenizer(gemma), load_model(gemma, torch.float32)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end_tokens(model, tokenizer) == {tokenizer.eos_token_id, end}
    says(model, end)
    (answer,) = generate_answers(model, tokenizer, [ASKED], SamplingParams(max_tokens=5))
    assert (answer.tokens, answer.ended) == (0, True)
    asker = Asker(BatchScheduler(model, Limits()), tokenizer)
    assert asker.end(asker.ask("Hi")) == ("", Finished("stop", 0))
    asker.scheduler.close()


def test_a_template_that_wants_a_system_message_leaves_the_tokenizers_end(gemma):
    tokenizer, model = load_tokenizer(gemma), load_model(gemma, torch.float32)
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    assert end_tokens(model, tokenizer) == {tokenizer.eos_token_id}


def test_a_merged_model_tells_other_tools_where_answers_end(gemma, tmp_path):
    run = small_run(gemma, tmp_path)
    assert export_run(run, "merged", tmp_path / "merged").holds
    settings = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [1, 4]  # <eos>, <end_of_turn>


def test_a_base_with_bos_is_tuned_and_leaves_with_it(plain_run, tmp_path):
    for kind in ("adapter", "merged"):
        assert export_run(plain_run, kind, tmp_path / kind).holds
        assert load_tokenizer(tmp_path / kind).chat_template == "{{ bos_token }}" + DEFAULT_TEMPLATE
    record = json.loads(plain_run.paths.data.read_text())
    assert record["example"]["prompt"].startswith("<bos>User: ")
    assert record["template_warnings"] == []


def test_what_was_tuned_under_an_older_default_template_goes_on_under_it(plain_run, tmp_path):
    copy = Run(shutil.copytree(plain_run.root, tmp_path / "run"))
    (copy.paths.best / "chat_template.jinja").write_text(DEFAULT_TEMPLATE)
    assert open_base_of(copy).tokenizer.chat_template == DEFAULT_TEMPLATE
    assert export_run(copy, "adapter", tmp_path / "adapter").holds


@pytest.mark.slow
def test_a_run_whose_pairs_are_rendered_otherwise_now_does_not_go_on(plain_run, tmp_path):
    copy = Run(shutil.copytree(plain_run.root, tmp_path / "run"))
    copy.paths.complete.unlink()
    shutil.rmtree(copy.paths.best)  # stopped before the choice
    record = json.loads(copy.paths.data.read_text())
    record["example"]["prompt"] = record["example"]["prompt"].removeprefix("<bos>")
    copy.paths.data.write_text(json.dumps(record))
    done = pairtune("resume", copy.root)
    assert (done.returncode, "the pairs have changed since" in done.stderr) == (2, True)


@pytest.mark.slow
def test_a_run_says_that_its_models_template_leaves_bos_out(gemma, tmp_path):
    folder = shutil.copytree(gemma, tmp_path / "base")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.removeprefix("{{ bos_token }}"))
    data, held = write_pairs(tmp_path / "a.jsonl", range(4)), write_pairs(tmp_path / "b.jsonl", range(8, 10))
    settings = ("--lr", 1e-3, "--beta", 0.1, "--epochs", 1, "--samples", 0, "--out", tmp_path / "run")
    done = pairtune("tune", "--model", folder, "--data", data, "--eval-data", held, *settings)
    assert done.returncode == 0, done.stderr
    (warning,) = json.loads((tmp_path / "run" / "data.json").read_text())["template_warnings"]
    assert "does not write it" in warning
    assert f"warning: {warning}" in done.stderr
