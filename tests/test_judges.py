"""Judges that need a model: a tiny reward model, and a chat model behind a loopback endpoint."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import byte_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from pairtune.errors import BadInput, RunFailed
from pairtune.evaluation.judges import EndpointJudge, RewardModelJudge, open_judge, read_verdict
from pairtune.evaluation.winrate import LOSS, TIE, WIN, RuleJudge
from pairtune.files import user_cache
from pairtune.run.records import Answer

SECRET = "sk-planted-0123456789"  # noqa: S105 - no key, but something to look for


def answers(*texts: str) -> list[Answer]:
    return [Answer(text=text, tokens=len(text), ended=True) for text in texts]


def prompts(*texts: str):
    return [[{"role": "user", "content": text}] for text in texts]


@pytest.fixture
def reward_model(tmp_path):
    """A random reward model with one output."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path / "reward"
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_prefers_what_it_scores_higher(reward_model):
    judge = open_judge(str(reward_model), None)
    assert isinstance(judge, RewardModelJudge)
    asked = prompts("Is it?", "Is it?", "Is it?")
    ours, base = answers("Yes.", "No idea at all.", "Yes."), answers("No idea at all.", "Yes.", "Yes.")
    ahead = judge.score(asked[0], "Yes.") > judge.score(asked[0], "No idea at all.")
    done = []
    assert judge.judge(asked, ours, base, done.append) == ([WIN, LOSS, TIE] if ahead else [LOSS, WIN, TIE])
    assert done == [1, 2, 3]


def test_what_is_no_reward_model_is_said(reward_model, tiny_model, tmp_path):
    with pytest.raises(BadInput, match=r"is not a reward model: it has no weights for score\.weight"):
        open_judge(str(tiny_model), None)
    model = LlamaForSequenceClassification.from_pretrained(reward_model, num_labels=2, ignore_mismatched_sizes=True)
    model.save_pretrained(reward_model)
    with pytest.raises(BadInput, match="has 2 outputs; a reward model has one"):
        open_judge(str(reward_model), None)
    with pytest.raises(BadInput, match="--judge .*nothing"):
        open_judge(str(tmp_path / "nothing"), None)
    with pytest.raises(BadInput, match="--judge-model: is required"):
        open_judge("http://127.0.0.1:1/v1", None)
    assert isinstance(open_judge("rule", None), RuleJudge)


class Endpoint(BaseHTTPRequestHandler):
    """Prefers the answer that says yes; if both are alike, the first one."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers["Authorization"], body))
        if self.server.failing:
            self.send_error(401, "wrong key")
            return
        asked = body["messages"][-1]["content"]
        first, second = asked.split("# Answer A\n")[1].split("# Answer B\n")
        if self.server.says is not None:
            letter = self.server.says
        else:
            letter = "B" if "yes" in second.split("Reply")[0] and "yes" not in first else "A"
        reply = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": letter}}],
        }
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.seen, server.failing, server.says = [], False, None
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("PAIRTUNE_JUDGE_KEY", SECRET)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_endpoint_is_asked_in_both_orders_and_once(endpoint):
    judge = open_judge(f"http://127.0.0.1:{endpoint.server_port}/v1/", "oracle")
    assert isinstance(judge, EndpointJudge)
    asked = prompts("one?", "two?", "three?")
    ours, base = answers("yes", "no", "no"), answers("no", "yes", "not at all")
    cost = judge.estimate(asked, ours, base)
    assert cost["calls"] == 6
    assert 300 < cost["tokens"] < 1000
    assert judge.judge(asked, ours, base, lambda done: None) == [WIN, LOSS, TIE]  # the last one by place alone
    assert len(endpoint.seen) == 6
    path, key, body = endpoint.seen[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", f"Bearer {SECRET}", "oracle", 0)
    assert judge.judge(asked, ours, base, lambda done: None) == [WIN, LOSS, TIE]
    assert len(endpoint.seen) == 6
    assert judge.estimate(asked, ours, base) == {"calls": 0, "tokens": 0}
    kept = [file.read_text() for file in (user_cache() / "judged").iterdir()]
    assert kept
    assert not any(SECRET in text for text in kept)


@pytest.mark.parametrize(("said", "score"), [("**A**", TIE), ("Answer B.", TIE), ("a, because it is", TIE)])
def test_verdicts_are_read_as_judges_write_them(endpoint, said, score):
    """The same letter in both orders is a position bias."""
    endpoint.says = said
    judge = EndpointJudge(f"http://127.0.0.1:{endpoint.server_port}/v1", f"talks {said}")
    assert judge.judge(prompts("one?"), answers("yes"), answers("no"), lambda done: None) == [score]


def test_a_judge_that_gives_no_verdict_is_none(endpoint):
    endpoint.says = "<think>Let me see"
    url = f"http://user:{SECRET}@127.0.0.1:{endpoint.server_port}/v1"
    with pytest.raises(RunFailed, match=r"no verdict \(A, B or T\) in 2 of 2 replies") as failure:
        EndpointJudge(url, "thinks").judge(prompts("one?"), answers("yes"), answers("no"), lambda done: None)
    assert SECRET not in str(failure.value)
    assert SECRET not in EndpointJudge(url, "thinks").name


def test_an_endpoint_that_refuses_is_said_without_the_key(endpoint):
    endpoint.failing = True
    judge = EndpointJudge(f"http://127.0.0.1:{endpoint.server_port}/v1", "refusing")
    with pytest.raises(RunFailed, match="401") as failure:
        judge.judge(prompts("one?"), answers("yes"), answers("no"), lambda done: None)
    assert SECRET not in str(failure.value)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("A", "A"), ("b", "B"), ("T", "T"), ("Tie", "T"), ("tie.", "T"), ("A tie", "T"), ("It's a tie.", "T"),
        ("It is a tie", "T"), ("Answer: A", "A"), ("Answer: Tie", "T"), ("**B**", "B"), ("A.", "A"), ("(B)", "B"),
        ("[[A]]", "A"), ("Answer A is better.", "A"), ("Answer B wins", "B"), ("The better answer is A", "A"),
        ("My verdict: B", "B"), ("Final answer: **T**", "T"), ("Option A", "A"), (" \n B\n", "B"),
        ("As an AI, I cannot choose", ""), ("Both are good", ""), ("A good question", ""), ("But A is better", ""),
        ("A or B", ""), ("Answer A and answer B are equal", ""), ("", ""), ("I would say A", ""), ("A, B", ""),
        ("C", ""), ("A, because it is shorter", "A"), ("B. Because A is wrong.", "B"),
        ("A's answer is wrong", ""), ("Tied to the facts, B", ""), ("not A", ""),
    ],
)  # fmt: skip
def test_replies_are_read_for_what_they_say(reply, said):
    assert read_verdict(reply) == said
