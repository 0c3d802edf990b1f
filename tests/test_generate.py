"""Answers: order, ends, seeds, streaming, and what is counted about them."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import make_pair

from pairtune.evaluate.generations import compare_answers, held_out_prompts, summarise
from pairtune.models.generate import Answer, Sampling, end_tokens, generate_answers, stream_answer
from pairtune.models.load import load_model


def asked(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


@pytest.fixture
def model(tiny_base):
    return load_model(tiny_base.source, torch.float32)


def test_batches_do_not_change_greedy_answers_or_their_order(model, tiny_base):
    conversations = asked("a", "a much longer question than the others", "ccc", "dd")
    sampling = Sampling(max_new_tokens=12)
    single = [generate_answers(model, tiny_base.tokenizer, [one], sampling)[0] for one in conversations]
    done = []
    batched = generate_answers(model, tiny_base.tokenizer, conversations, sampling, batch_size=3, progress=done.append)
    assert batched == single
    assert done == [3, 4]


def test_the_seed_decides_sampled_answers(model, tiny_base):
    sampling = Sampling(max_new_tokens=16, temperature=1.0)
    first, again, other = (
        generate_answers(model, tiny_base.tokenizer, asked("a", "b"), sampling, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_an_answer_ends_at_its_end_token(model, tiny_base):
    end = tiny_base.tokenizer.eos_token_id
    assert end_tokens(model, tiny_base.tokenizer) == {end}
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[end] = 0.0
        model.get_input_embeddings().weight.zero_()  # every token as likely as the next: greedy takes the first
    (cut,) = generate_answers(model, tiny_base.tokenizer, asked("a"), Sampling(max_new_tokens=5))
    assert (cut.tokens, cut.ended) == (5, False)
    model.generation_config.eos_token_id = [end, 0]  # token 0 is what greedy takes
    (ended,) = generate_answers(model, tiny_base.tokenizer, asked("a"), Sampling(max_new_tokens=5))
    assert (ended.tokens, ended.ended, ended.text) == (0, True, "")


def test_a_stream_says_what_the_batch_says(model, tiny_base):
    sampling = Sampling(max_new_tokens=20)
    (whole,) = generate_answers(model, tiny_base.tokenizer, asked("hello"), sampling)
    assert "".join(stream_answer(model, tiny_base.tokenizer, asked("hello")[0], sampling)).strip() == whole.text


def test_a_closed_stream_stops_the_model(model, tiny_base):
    before = set(threading.enumerate())  # others may end meanwhile
    stream = stream_answer(model, tiny_base.tokenizer, asked("hello")[0], Sampling(max_new_tokens=100_000))
    next(stream)
    assert len(set(threading.enumerate()) - before) == 1
    stream.close()
    assert not set(threading.enumerate()) - before


def test_a_failure_in_the_model_reaches_the_reader(model, tiny_base, monkeypatch):
    def broken(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream_answer(model, tiny_base.tokenizer, asked("hello")[0], Sampling()))


def test_summary_by_hand():
    answers = [Answer("a b a b", 4, True), Answer("one", 1, True), Answer("", 0, True), Answer("x y z w", 9, False)]
    assert summarise(answers) == {"median_tokens": 2.5, "ended_share": 0.75, "different_words_share": 0.8333}


def test_held_out_prompts_are_different_and_in_order():
    pairs = [make_pair(3), make_pair(3, chosen="other"), make_pair(1), make_pair(2)]
    assert held_out_prompts(pairs, 2) == [pairs[0].prompt, pairs[2].prompt]


def test_base_and_tuned_answer_the_same_prompts(tiny_base):
    result = compare_answers(tiny_base, {"same": tiny_base.source.folder}, [make_pair(1).prompt], seed=3)
    assert list(result["models"]) == ["base", "same"]
    assert result["models"]["base"] == result["models"]["same"]
    assert result["prompts"] == [list(make_pair(1).prompt)]
    assert result["sampling"]["seed"] == 3
