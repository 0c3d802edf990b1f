"""Answers: order, endings, seeds, streaming, and their statistics."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import make_pair

from pairtune.engine.lora import LoraSettings, add_adapters, peft_config, peft_tensors
from pairtune.errors import RunFailed
from pairtune.evaluation import generations
from pairtune.evaluation.generations import (
    AnsweringModels,
    affordable,
    compare_answers,
    held_out_prompts,
)
from pairtune.models.generate import end_tokens, generate_answers, stream_answer
from pairtune.models.load import load_model, load_tuned
from pairtune.models.sampling import SamplingParams
from pairtune.models.save import save_adapter
from pairtune.run.records import Generations
from pairtune.serve import model_runner, offline
from pairtune.serve.kv_cache import bytes_per_token
from pairtune.serve.model_runner import ModelRunner
from pairtune.serve.offline import Question
from pairtune.serve.request import AdapterRef


def asked(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


@pytest.fixture
def model(tiny_base):
    return load_model(tiny_base.source, torch.float32)


def test_batches_do_not_change_greedy_answers_or_their_order(model, tiny_base):
    conversations = asked("a", "a much longer question than the others", "ccc", "dd")
    sampling = SamplingParams(max_tokens=12)
    single = [generate_answers(model, tiny_base.tokenizer, [one], sampling)[0] for one in conversations]
    done = []
    batched = generate_answers(
        model, tiny_base.tokenizer, conversations, sampling, batch_size=3, on_progress=done.append
    )
    assert batched == single
    assert done == [3, 4]


def test_the_seed_decides_sampled_answers(model, tiny_base):
    sampling = SamplingParams(max_tokens=16, temperature=1.0)
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
    (cut,) = generate_answers(model, tiny_base.tokenizer, asked("a"), SamplingParams(max_tokens=5))
    assert (cut.tokens, cut.ended) == (5, False)
    model.generation_config.eos_token_id = [end, 0]  # token 0 is what greedy takes
    (ended,) = generate_answers(model, tiny_base.tokenizer, asked("a"), SamplingParams(max_tokens=5))
    assert (ended.tokens, ended.ended, ended.text) == (0, True, "")


def test_a_stream_says_what_the_batch_says(model, tiny_base):
    sampling = SamplingParams(max_tokens=20)
    (whole,) = generate_answers(model, tiny_base.tokenizer, asked("hello"), sampling)
    assert "".join(stream_answer(model, tiny_base.tokenizer, asked("hello")[0], sampling)).strip() == whole.text


def test_a_closed_stream_stops_the_model(model, tiny_base):
    before = set(threading.enumerate())  # others may end meanwhile
    stream = stream_answer(model, tiny_base.tokenizer, asked("hello")[0], SamplingParams(max_tokens=100_000))
    next(stream)
    assert len(set(threading.enumerate()) - before) == 1
    stream.close()
    assert not set(threading.enumerate()) - before


def test_a_failure_in_the_model_reaches_the_reader(model, tiny_base, monkeypatch):
    def broken(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream_answer(model, tiny_base.tokenizer, asked("hello")[0], SamplingParams()))


def test_held_out_prompts_are_different_and_in_order():
    pairs = [make_pair(3), make_pair(3, chosen="other"), make_pair(1), make_pair(2)]
    assert held_out_prompts(pairs, 2) == [pairs[0].prompt, pairs[2].prompt]


def tuned_adapter(base, folder, seed):
    """An adapter that changes the model's answers."""
    model = load_model(base.source, base.dtype)
    layers = add_adapters(model, LoraSettings(), [seed])
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        layer.lora_b.data = torch.randn(layer.lora_b.shape, generator=generator) / 8
    tensors, config = peft_tensors(layers, 0), peft_config(layers, LoraSettings())
    save_adapter(tensors, config, base.tokenizer, folder, base.source)
    return folder


def test_one_base_answers_with_every_adapter_as_each_would_alone(tiny_base, tmp_path):
    tuned = {name: tuned_adapter(tiny_base, tmp_path / name, seed) for seed, name in enumerate(("a.1", "b.2"), 1)}
    prompts = [make_pair(1).prompt, make_pair(2).prompt]
    models = AnsweringModels(tiny_base, tuned)
    done = []
    answers = models.answer(prompts, 3, done.append, SamplingParams(max_tokens=20))
    assert list(answers) == ["base", "a.1", "b.2"]
    alone = {"base": load_model(tiny_base.source, tiny_base.dtype)}
    alone |= {name: load_tuned(folder, tiny_base) for name, folder in tuned.items()}
    for name, model in alone.items():
        assert answers[name] == generate_answers(model, tiny_base.tokenizer, prompts, SamplingParams(max_tokens=20))
    assert len({str(each) for each in answers.values()}) == 3
    assert done == sorted(done)
    assert done[-1] == 6
    result = compare_answers(Generations, models, prompts, seed=3)
    assert result.prompts == [list(prompt) for prompt in prompts]
    assert result.sampling.seed == 3


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_sampled_answers_are_the_same_each_time_whatever_stands_beside_them(tiny_base, tmp_path, monkeypatch, slots):
    monkeypatch.setattr(offline, "ANSWERS_AT_ONCE", slots)
    tuned = {"a": tuned_adapter(tiny_base, tmp_path / "a", 1)}
    prompts = [make_pair(number).prompt for number in range(5)]
    whole = AnsweringModels(tiny_base, tuned).answer(prompts, 7)
    assert AnsweringModels(tiny_base, tuned).answer(prompts, 7) == whole
    models = AnsweringModels(tiny_base, tuned)
    for number, prompt in enumerate(prompts):  # one after the other, with the same model in memory
        alone = models.answer([prompt], 7 + number)
        assert {name: answers[number] for name, answers in whole.items()} == {
            name: only for name, (only,) in alone.items()
        }
    assert models.answer(prompts, 8) != whole


def test_little_memory_means_fewer_answers_at_once(tiny_base, monkeypatch):
    runner = ModelRunner(load_model(tiny_base.source, torch.float32), 1, 1)
    each = bytes_per_token(runner.model) * 100
    for room, slots in ((0, 1), (4 * 7.5 * each, 7), (1e12, 20)):
        monkeypatch.setattr(offline, "free_bytes", lambda _, room=room: room)
        answers = offline.answer_all(
            runner, tiny_base.tokenizer, [Question([5] * 90, SamplingParams(max_tokens=10))] * 20
        )
        assert len(answers) == 20
        assert runner.cache.slots == slots


def test_an_adapter_that_cannot_be_read_fails_the_answers(tiny_base, tmp_path):
    runner = ModelRunner(load_model(tiny_base.source, torch.float32), 1, 1)
    gone = Question([5], SamplingParams(max_tokens=2), AdapterRef("gone", tmp_path / "gone"))
    with pytest.raises(RunFailed, match=r"an answer failed .*gone: the adapter cannot be loaded"):
        offline.answer_all(runner, tiny_base.tokenizer, [Question([5], SamplingParams(max_tokens=2)), gone])


def test_what_cannot_be_batched_answers_through_transformers(tiny_base, tmp_path, monkeypatch):
    tuned = {"a": tuned_adapter(tiny_base, tmp_path / "a", 1), "whole": whole_model(tiny_base, tmp_path / "whole")}
    prompts, params = [make_pair(1).prompt, make_pair(2).prompt], SamplingParams(max_tokens=20)
    batched = AnsweringModels(tiny_base, tuned).answer(prompts, 3, params=params)
    monkeypatch.setattr(model_runner, "PACKED_FAMILIES", frozenset())
    done = []
    assert AnsweringModels(tiny_base, tuned).answer(prompts, 3, done.append, params) == batched
    assert done == [2, 4, 6]
    assert len({str(each) for each in batched.values()}) == 3


def whole_model(base, folder):
    """A model whose own weights differ from the base's."""
    model = load_model(base.source, torch.float32)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    model.save_pretrained(folder)
    return folder


def test_a_model_that_is_its_base_ties_with_it(tiny_base):
    models = AnsweringModels(tiny_base, {"same": tiny_base.source.folder})
    result = compare_answers(Generations, models, [make_pair(1).prompt], seed=3)
    assert result.models["base"].answers == result.models["same"].answers
    assert result.models["same"].win_rate.ties == 1


def test_prompts_are_as_many_as_a_tenth_of_the_time_allows(tiny_base, monkeypatch):
    models = AnsweringModels(tiny_base, {"a": tiny_base.source.folder})
    clock = iter(range(0, 1000, 8))  # eight seconds for four prompts, of two models together: two seconds a prompt
    monkeypatch.setattr(generations.time, "monotonic", lambda: next(clock))
    prompts = [make_pair(number).prompt for number in range(40)]
    assert [affordable(models, prompts, seconds, 0) for seconds in (1, 240, 10_000)] == [4, 12, 32]
