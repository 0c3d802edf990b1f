"""The worker: batching that changes no answer, OpenAI's API with OpenAI's client, and errors."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch
from conftest import byte_tokenizer, pairtune, small_run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from pairtune.files import saved_fingerprint
from pairtune.models.generate import end_tokens, generate_answers
from pairtune.models.load import load_model, load_tuned, open_base
from pairtune.models.sampling import SamplingParams
from pairtune.serve import api, batch
from pairtune.serve.adapters import read_adapter
from pairtune.serve.batch import ContinuousBatch
from pairtune.serve.catalogue import Catalogue
from pairtune.serve.detokenizer import IncrementalDetokenizer
from pairtune.serve.model_runner import ModelRunner
from pairtune.serve.process import WorkerProcess
from pairtune.serve.request import (
    AdapterRef,
    Failed,
    Finished,
    GenerationRequest,
    Limits,
    NotBatchable,
    QueueFull,
    QueuePosition,
    TextDelta,
)
from pairtune.serve.scheduler import BatchScheduler

QUESTIONS = ["What is a lighthouse for?", "Are there 4 apples?", "Hi", "Tell me about " + "boats and gulls " * 20]


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    return small_run(tiny_model, folder, learning_rate=[3e-2, 1e-2], samples=0, out=folder / "small")


def greedy(prompt_model, tokenizer, questions, tokens=24):
    prompts = [[{"role": "user", "content": each}] for each in questions]
    return [
        generate_answers(prompt_model, tokenizer, [prompt], SamplingParams(max_tokens=tokens))[0] for prompt in prompts
    ]


class Asker:
    """Sends requests to a scheduler and collects their results."""

    def __init__(self, scheduler: BatchScheduler, tokenizer) -> None:
        self.scheduler, self.tokenizer = scheduler, tokenizer
        self.stop_token_ids = frozenset(end_tokens(scheduler.runner.model, tokenizer))

    def ask(self, question: str, adapter=None, **params):
        turns = question if isinstance(question, list) else [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        events: queue.SimpleQueue = queue.SimpleQueue()
        sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 24, **params})
        request = GenerationRequest(ids, sampling, adapter, self.tokenizer, self.stop_token_ids, events.put)
        self.scheduler.submit(request)
        return request, events

    @staticmethod
    def end(asked, seconds=60.0):
        text = ""
        while True:
            event = asked[1].get(timeout=seconds)
            if isinstance(event, TextDelta):
                text += event.text
            elif isinstance(event, Finished | Failed):
                return text, event


@pytest.fixture
def scheduler(tiny_model):
    base = open_base(str(tiny_model), "float32")
    made = []

    def make(**limits):
        made.append(BatchScheduler(load_model(base.source, torch.float32), Limits(**limits)))
        return Asker(made[-1], base.tokenizer)

    yield make
    for each in made:
        each.close()


@pytest.fixture
def passes(monkeypatch):
    """The numbers of decoding requests and prompt tokens in each forward pass."""
    seen = []
    forward = ModelRunner.forward

    def counted(self, decoding, prompts, copies=()):
        seen.append((len(decoding), sum(each.chunk.length for each in prompts)))
        return forward(self, decoding, prompts, copies)

    monkeypatch.setattr(ModelRunner, "forward", counted)
    return seen


def test_a_batch_of_base_and_adapters_says_what_each_says_alone(run, tiny_model, scheduler):
    base = open_base(str(tiny_model), "float32")
    folders = [None, *(run.paths.trial(f"lr-{rate}-beta-0.1").best for rate in ("0.03", "0.01"))]
    adapters = [None if each is None else AdapterRef(saved_fingerprint(each), each) for each in folders]
    models = [load_model(base.source, torch.float32) if each is None else load_tuned(each, base) for each in folders]
    asker = scheduler(concurrency=5)
    asked = [(number, question, asker.ask(question, adapters[number])) for question in QUESTIONS for number in range(3)]
    answers = {(number, question): asker.end(each) for number, question, each in asked}
    for number, model in enumerate(models):
        for question, expected in zip(QUESTIONS, greedy(model, base.tokenizer, QUESTIONS), strict=True):
            text, ended = answers[number, question]
            assert text.strip() == expected.text
            assert ended == Finished("stop" if expected.ended else "length", expected.tokens)
    assert len({answers[number, QUESTIONS[0]][0] for number in range(3)}) == 3  # three different models
    assert asker.scheduler.load["running"] == 0


def test_what_is_remembered_of_a_conversation_changes_nothing(run, tiny_model, scheduler, passes):
    base = open_base(str(tiny_model), "float32")
    adapter = AdapterRef(saved_fingerprint(run.paths.best), run.paths.best)
    asker = scheduler(concurrency=2)
    first = asker.end(asker.ask(QUESTIONS[3], adapter))[0]
    turns = [{"role": "user", "content": QUESTIONS[3]}, {"role": "assistant", "content": first}]
    turns.append({"role": "user", "content": "And now?"})
    passes.clear()
    again = asker.end(asker.ask(turns, adapter))[0]
    assert (
        0 < max(prompt for _, prompt in passes) < 150
    )  # of about 500: the new turn, and bytes that are not valid text
    model = load_tuned(run.paths.best, base)
    expected = generate_answers(model, base.tokenizer, [turns], SamplingParams(max_tokens=24))[0]
    assert again.strip() == expected.text
    passes.clear()
    asker.end(asker.ask(turns, None))
    assert max(prompt for _, prompt in passes) > 400  # nothing is shared with the base


def test_what_begins_alike_is_read_once_in_a_pass(run, tiny_model, scheduler, passes):
    base = open_base(str(tiny_model), "float32")
    adapter = AdapterRef(saved_fingerprint(run.paths.best), run.paths.best)
    asker = scheduler(concurrency=6)
    questions = [f"{QUESTIONS[3]} {number}" for number in range(3)]
    asked = [(key, asker.ask(question, key)) for key in (adapter, None) for question in questions]
    answers = [asker.end(each)[0].strip() for _, each in asked]
    length = len(QUESTIONS[3])
    assert sum(prompt for _, prompt in passes) < 2 * length + 6 * 60  # each model has prefilled the prefix once
    for answer, (key, model) in zip(
        (answers[:3], answers[3:]),
        ((adapter, load_tuned(run.paths.best, base)), (None, load_model(base.source, torch.float32))),
        strict=True,
    ):
        assert answer == [each.text for each in greedy(model, base.tokenizer, questions)], key


def test_a_long_prompt_is_prefilled_in_chunks_while_others_are_answered(scheduler, passes, monkeypatch):
    monkeypatch.setattr(batch, "PREFILL_TOKENS", 32)
    asker = scheduler()
    asker.stop_token_ids = frozenset()
    short = asker.ask("Hi", max_tokens=40)
    while not isinstance(short[1].get(timeout=60), TextDelta):
        pass
    long = asker.ask(QUESTIONS[3], max_tokens=4)
    assert isinstance(asker.end(long)[1], Finished)
    asker.end(short)
    assert max(prompt for _, prompt in passes) <= 32
    assert any(decoding and prompt for decoding, prompt in passes)


def test_who_waits_knows_the_place_and_who_leaves_frees_it(scheduler):
    asker = scheduler(concurrency=1, waiting=2)
    asker.stop_token_ids = frozenset()
    first = asker.ask("Hi", max_tokens=400)
    while not isinstance(first[1].get(timeout=60), TextDelta):
        pass
    second, third = asker.ask("Hi"), asker.ask("Hi")
    assert second[1].get(timeout=5) == QueuePosition(0)
    assert third[1].get(timeout=5) == QueuePosition(1)
    with pytest.raises(QueueFull):
        asker.ask("Hi")
    asker.scheduler.cancel(second[0])
    assert third[1].get(timeout=5) == QueuePosition(0)
    asker.scheduler.cancel(first[0])
    assert isinstance(asker.end(third, 10)[1], Finished)


def test_seeds_repeat_and_differ(scheduler):
    asker = scheduler()
    texts = [asker.end(asker.ask("Hi", temperature=1.5, seed=seed))[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_pass_that_fails_is_said_and_the_next_one_works(scheduler, monkeypatch):
    asker = scheduler()
    good = asker.end(asker.ask("Hi"))[0]
    forward = ModelRunner.forward
    monkeypatch.setattr(ModelRunner, "forward", lambda *_: 1 / 0)
    assert "division" in asker.end(asker.ask("Hi"))[1].message
    monkeypatch.setattr(ModelRunner, "forward", forward)
    assert asker.end(asker.ask("Hi"))[0] == good


@pytest.mark.parametrize("fault", ["gone", "cut off", "half", "other shape", "seed"])
def test_what_is_wrong_with_one_request_is_not_the_others_matter(run, scheduler, tmp_path, fault):
    asker = scheduler()
    adapter = AdapterRef(saved_fingerprint(run.paths.best), run.paths.best)
    expected = asker.end(asker.ask(QUESTIONS[0], adapter))
    spoilt = tmp_path / "adapter"
    shutil.copytree(run.paths.best, spoilt)
    file = spoilt / "adapter_model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    if fault == "gone":
        shutil.rmtree(spoilt)
    elif fault == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "half":
        save_file({name: tensor for name, tensor in tensors.items() if name != first}, file)
    elif fault == "other shape":
        save_file({name: torch.zeros(5, 5) for name in tensors}, file)
    drawing = {"seed": 2**70} if fault == "seed" else {}
    beside = asker.ask(QUESTIONS[0], adapter)
    bad = asker.ask("Hi", None if fault == "seed" else AdapterRef("bad", spoilt), **drawing)
    behind = asker.ask(QUESTIONS[0], adapter)
    assert isinstance(asker.end(bad)[1], Failed)
    assert asker.end(beside) == asker.end(behind) == expected


def test_the_smallest_temperatures_and_shares_take_the_likeliest(scheduler):
    asker = scheduler()
    expected = asker.end(asker.ask("Hi"))
    for drawing in ({"temperature": 1e-40}, {"temperature": 1e-4, "top_p": 1e-60}, {"top_p": 1e-60, "temperature": 1}):
        assert asker.end(asker.ask("Hi", **drawing)) == expected


def test_an_answer_that_cannot_be_drawn_fails_alone(scheduler, monkeypatch):
    asker = scheduler()
    expected = asker.end(asker.ask("Hi"))
    sample = SamplingParams.sample
    monkeypatch.setattr(SamplingParams, "sample", lambda self, *more: 1 / 0 if self.seed == 13 else sample(self, *more))
    beside, bad = asker.ask("Hi"), asker.ask("Hi", seed=13)
    assert isinstance(asker.end(bad)[1], Failed)
    assert asker.end(beside) == expected


def test_soft_caps_and_windows_are_kept_in_mind(scheduler):
    torch.manual_seed(5)
    tokenizer = byte_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        eos_token_id=2,
    )
    model = Gemma2ForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data.normal_(std=0.5)
    model.set_attn_implementation("eager")
    expected = greedy(model, tokenizer, QUESTIONS)
    asker = Asker(BatchScheduler(model, Limits()), tokenizer)
    asked = [asker.ask(question) for question in QUESTIONS]
    assert [asker.end(each)[0].strip() for each in asked] == [each.text for each in expected]
    asker.scheduler.close()


def test_what_cannot_be_served_is_refused(run, tmp_path):
    with pytest.raises(NotBatchable, match="family gpt2"):
        BatchScheduler(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2)), Limits())
    settings = json.loads((run.paths.best / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    (tmp_path / "adapter_model.safetensors").write_bytes((run.paths.best / "adapter_model.safetensors").read_bytes())
    with pytest.raises(NotBatchable, match="more than plain LoRA"):
        read_adapter(tmp_path, torch.float32, torch.device("cpu"))


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=2))
def test_streamed_text_is_the_text_up_to_its_stop(text, stops):
    tokenizer = byte_tokenizer()
    stream, shown = IncrementalDetokenizer(tokenizer, stops), ""
    for token in tokenizer(text)["input_ids"]:
        shown += stream.push(token)
        if stream.stopped:
            break
    shown += stream.flush()
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    assert stream.stopped == bool(places)
    if not places:
        assert shown == text
    else:
        # The stop string that is completed first ends the answer.
        first = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        assert text.startswith(shown)
        assert len(shown) < first


# The worker process, over HTTP.


@pytest.fixture(scope="module")
def worker(run):
    with WorkerProcess([str(run.root), "--context", "400"]) as process:
        yield process


@pytest.fixture
def client(worker):
    return openai.OpenAI(base_url=f"{worker.url}/v1", api_key=worker.key, max_retries=0)


def ask(model="small", **more):
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 16, "temperature": 0, **more}


def test_openais_client_lists_completes_and_streams(client, run, tiny_model):
    models = {each.id: each.pairtune for each in client.models.list()}
    assert list(models) == [str(tiny_model), "small", "small/lr-0.03-beta-0.1", "small/lr-0.01-beta-0.1"]
    base, adapter = saved_fingerprint(tiny_model), saved_fingerprint(run.paths.best)
    whole = client.chat.completions.create(**ask())
    assert whole.system_fingerprint == f"{base}+{adapter}" == models["small"]["fingerprint"]
    assert whole.usage.completion_tokens <= 16
    stream = client.chat.completions.create(**ask(), stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == (
        whole.choices[0].message.content
    )
    assert chunks[-1].usage == whole.usage
    assert {each.system_fingerprint for each in chunks} == {whole.system_fingerprint}
    assert client.chat.completions.create(**ask(str(tiny_model))).system_fingerprint == base


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        ({"model": "none"}, 404, "no model 'none'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 2}, 400, "n:"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty: Value error, penalties are not supported"),
        ({"presence_penalty": -1}, 400, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type"),
        ({"logit_bias": {"7": 5}}, 400, "logit_bias"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"extra_body": {"continue_final_message": True}}, 400, "needs add_generation_prompt false"),
        ({"messages": [{"role": "user", "content": "x" * 1_000_000}]}, 400, "longer than this model's 400 tokens"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, 400, "too many for this model"),
        ({"messages": [{"role": "user", "content": "x" * 3_000_000}]}, 413, "more than 2,000,000 bytes"),
    ],
)
def test_what_cannot_be_answered_is_said(client, more, status, message):
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**{**ask(), **more})
    assert refused.value.status_code == status
    assert message in str(refused.value)


def test_an_answer_that_has_begun_goes_on(client):
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes, 4"}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    answer = client.chat.completions.create(**ask(messages=begun), extra_body=more)
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes, 4"
    ids = byte_tokenizer()(rendered, add_special_tokens=False)["input_ids"]
    assert answer.usage.prompt_tokens == len(ids)
    assert not answer.choices[0].message.content.startswith("Yes, 4")


def test_odd_text_is_answered(client):
    for content in ("", "\x00\x1b[31m\u202e", "<script>alert(1)</script>", "😀" * 20):
        answer = client.chat.completions.create(**ask(messages=[{"role": "user", "content": content}]))
        assert answer.choices[0].finish_reason in ("stop", "length")


def test_other_hosts_and_no_json_are_refused(worker):
    key, json_ = {"Authorization": f"Bearer {worker.key}"}, {"Content-Type": "application/json"}
    assert httpx.get(f"{worker.url}/v1/models", headers={**key, "Host": "evil.example"}).status_code == 400
    assert httpx.post(f"{worker.url}/v1/chat/completions", content=b"{", headers=key | json_).status_code == 400


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; x=1"])
def test_what_any_page_can_post_is_refused(worker, kind):
    """Browsers send these to other sites without asking them first."""
    headers = {"Authorization": f"Bearer {worker.key}"} | ({"Content-Type": kind} if kind else {})
    said = httpx.post(f"{worker.url}/v1/chat/completions", content=json.dumps(ask()), headers=headers)
    assert (said.status_code, said.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer none"}, {"Authorization": "Basic none"}])
def test_without_its_key_a_worker_only_says_whether_it_lives(worker, headers):
    assert httpx.get(f"{worker.url}/health", headers=headers).json().keys() == {"status"}
    for said in (
        httpx.get(f"{worker.url}/v1/models", headers=headers),
        httpx.post(f"{worker.url}/v1/chat/completions", json=ask(), headers=headers),
    ):
        assert (said.status_code, said.json()["error"]["code"]) == (401, "invalid_api_key")
        assert worker.key not in said.text
    assert worker.key not in " ".join(psutil.Process(worker.pid).cmdline())


def test_a_worker_for_other_machines_has_a_key_that_it_shows_once(run):
    command = [sys.executable, "-m", "pairtune", "worker", str(run.root), "--host", "0.0.0.0", "--port", "0"]  # noqa: S104
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        key = process.stderr.readline().rpartition(": ")[2].strip()
        port = process.stdout.readline().partition("/v1")[0].rpartition(":")[2]
        url = f"http://127.0.0.1:{port}/v1"
        assert httpx.get(f"{url}/models", timeout=60).status_code == 401
        assert list(openai.OpenAI(base_url=url, api_key=key).models.list())
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_nulls_mean_not_given(client):
    names = ("temperature", "top_p", "top_k", "max_completion_tokens", "stop", "n", "seed", "logprobs", "top_logprobs")
    more = dict.fromkeys(
        (*names, "tools", "tool_choice", "stream_options", "response_format", "logit_bias", "pairtune")
    )
    nulls = dict.fromkeys(("frequency_penalty", "presence_penalty", "functions", "continue_final_message", "stream"))
    answer = client.chat.completions.create(**ask(), extra_body=more | nulls)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_a_list_of_models_does_not_wait_for_models_that_are_loaded(monkeypatch, run):
    loading, go_on = threading.Event(), threading.Event()

    class Slow(Catalogue):
        def open(self, model):
            loading.set()
            assert go_on.wait(60)
            return super().open(model)

    monkeypatch.setattr(api, "_SILENCE_SECONDS", 0.2)
    catalogue = Slow([str(run.root)], None, Limits())
    with (
        TestClient(api.make_app(catalogue, ["testserver"]), client=("127.0.0.1", 1)) as client,
        ThreadPoolExecutor(24) as pool,
    ):
        asked = [pool.submit(client.post, "/v1/chat/completions", json=ask(stream=bool(n % 2))) for n in range(24)]
        assert loading.wait(60)
        assert len(client.get("/v1/models").json()["data"]) == 4
        time.sleep(0.5)
        go_on.set()
        said = [each.result() for each in asked]
    assert [each.status_code for each in said] == [200] * 24
    streamed = [each.text for each in said if "event-stream" in each.headers["content-type"]]
    assert len(streamed) == 12
    assert all(text.startswith(": waiting") and text.endswith("data: [DONE]\n\n") for text in streamed)


def test_a_dead_engine_is_not_healthy_and_the_next_request_starts_another(monkeypatch, run):
    catalogue = Catalogue([str(run.root)], None, Limits())
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with TestClient(api.make_app(catalogue, ["testserver"])) as client:
        assert client.post("/v1/chat/completions", json=ask()).status_code == 200
        assert client.get("/health").json()["status"] == "ok"
        with monkeypatch.context() as patch:
            patch.setattr(ContinuousBatch, "step", lambda self: sys.exit(1))  # which is not caught as an Exception
            failed = client.post("/v1/chat/completions", json=ask())
        assert (failed.status_code, failed.json()["error"]["message"]) == (500, "the server is closing")
        assert client.get("/health").status_code == 503
        assert client.post("/v1/chat/completions", json=ask()).status_code == 200
        assert client.get("/health").json()["status"] == "ok"


def test_who_hangs_up_frees_the_place(worker, client):
    with client.chat.completions.create(**ask(max_tokens=300), stream=True) as stream:
        next(iter(stream))
    until = time.monotonic() + 10
    while any(load["running"] for load in _health(worker)["load"].values()):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_worker_that_is_killed_comes_back(run):
    with WorkerProcess([str(run.root)]) as worker:
        before = worker.pid
        client = openai.OpenAI(base_url=f"{worker.url}/v1", api_key=worker.key, max_retries=0)
        os.kill(before, signal.SIGKILL)
        until = time.monotonic() + 60
        while True:
            try:
                answer = client.chat.completions.create(**ask())
                break
            except openai.APIConnectionError:
                client.base_url = f"{worker.url}/v1"  # it has chosen another port
                assert time.monotonic() < until
                time.sleep(0.2)
        assert answer.choices[0].message is not None
        assert worker.pid != before
        after = worker.pid
    assert not psutil.pid_exists(after)


def test_runs_come_and_go_while_it_serves(run, tmp_path):
    with WorkerProcess(["--runs", str(tmp_path)]) as worker:
        client = openai.OpenAI(base_url=f"{worker.url}/v1", api_key=worker.key, max_retries=0)
        assert not list(client.models.list())
        shutil.copytree(run.root, tmp_path / "later")
        (tmp_path / "unfinished").mkdir()
        shutil.copytree(run.root, tmp_path / "slim")
        shutil.rmtree(tmp_path / "slim" / "trials")  # to save space
        shutil.copytree(run.root, tmp_path / "lost")
        config = (tmp_path / "lost" / "config.yaml").read_text()
        model = json.loads((run.root / "environment.json").read_text())["base"]["name"]
        (tmp_path / "lost" / "config.yaml").write_text(config.replace(model, f"{model}-gone"))
        names = {each.id for each in client.models.list()}
        assert {"later", "slim"} <= names
        assert "lost" not in names
        assert client.chat.completions.create(**ask("later")).choices
        shutil.rmtree(tmp_path / "later")
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**ask("later"))


def test_a_whole_model_is_served_as_it_is(tiny_model, tmp_path):
    full = small_run(tiny_model, tmp_path, method="full", learning_rate=[1e-3], samples=0, out=tmp_path / "whole")
    with WorkerProcess([str(full.root)]) as worker:
        client = openai.OpenAI(base_url=f"{worker.url}/v1", api_key=worker.key, max_retries=0)
        answer = client.chat.completions.create(**ask("whole"))
        assert answer.system_fingerprint.endswith(saved_fingerprint(full.paths.best))
        base = open_base(str(tiny_model), "float32")
        expected = greedy(load_tuned(full.paths.best, base), base.tokenizer, ["Hi"], 16)[0]
        assert answer.choices[0].message.content.strip() == expected.text


def test_a_worker_without_such_a_run_says_so(tmp_path):
    for name in ("config.yaml", "data.json"):
        (tmp_path / name).write_text("{}")
    done = pairtune("worker", tmp_path)
    assert (done.returncode, "unfinished" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(("said", "pauses"), [("http://127.0.0.1:9/v1 is the API", [1, 1, 1, 1]), ("", [2, 4, 8, 16])])
def test_only_a_worker_that_cannot_start_is_waited_for(monkeypatch, said, pauses):
    """One that has come up is started again after a second, however often it is killed."""
    waited: list[float] = []

    class Ending(threading.Event):
        def wait(self, timeout=None):
            waited.append(timeout)
            if len(waited) == len(pauses):
                self.set()
            return self.is_set()

    worker = WorkerProcess([])
    worker._command = [sys.executable, "-c", f"print({said!r})"]
    worker._ending = Ending()
    worker._process = worker._start()
    listened = worker._read_address()
    assert listened == bool(said)
    worker._restart()
    worker._end()
    # The first one had come up: `with WorkerProcess` waits for it.
    assert waited == [1, *pauses[:-1]]


def _health(worker) -> dict:
    return httpx.get(f"{worker.url}/health", headers={"Authorization": f"Bearer {worker.key}"}).json()


def test_the_terminal_needs_no_worker():
    code = "import sys, pairtune.serve.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parent).returncode == 0
