"""Serving: eight concurrent chats through the worker against sequential answers from transformers' `generate`.

Both answer the same prompts with the same number of tokens, greedily and without an end token, on the same weights
(adapter and base in turn), in several rounds. Also compares the time to the first token of eight concurrent chats with
that of a single chat. Then the answers of a run's report: base and adapters, 26 sampled answers each, in one continuous
batch and in one batch a model through `generate`. `--run` is a finished run; by default `runs/demo`.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from pairtune.evaluation.generations import CHECK_SAMPLING, AnsweringModels
from pairtune.files import saved_fingerprint
from pairtune.models.generate import generate_answers
from pairtune.models.load import LoadedBase, load_model, load_tuned, open_base
from pairtune.models.sampling import SamplingParams
from pairtune.run.folder import Run
from pairtune.serve.request import AdapterRef, Finished, GenerationRequest, Limits, TextDelta
from pairtune.serve.scheduler import BatchScheduler

PROMPTS = [
    f"Tell me a long story about {what}, with many details."
    for what in (
        *("a lighthouse", "two gulls", "the last ferry", "a baker at sea"),
        *("an old map", "a storm in May", "the harbour cat", "a letter in a bottle"),
    )
]

LIKED = (
    *("tea", "coffee", "bread", "cats", "dogs", "rain", "snow", "lakes", "hills", "trains", "bikes", "ships", "stars"),
    *("maps", "books", "songs", "films", "games", "chess", "salt", "sugar", "milk", "eggs", "rice", "soup", "cake"),
)


def main() -> None:
    """Measure, and print one line per round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    run = Run.finished(asked.run)
    from pairtune.resolve_config import resolve

    config = resolve(run.paths.config, {}).config
    base = open_base(config.model, config.dtype)
    tuned = load_tuned(run.paths.best, base)
    scheduler = BatchScheduler(load_model(base.source, base.dtype, base.device), Limits(concurrency=8))
    adapter = AdapterRef(saved_fingerprint(run.paths.best), run.paths.best)
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    ids = [
        base.tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=True)["input_ids"]
        for each in turns
    ]
    print(f"{base.source.name}, {base.dtype}, {asked.tokens} tokens each, {torch.get_num_threads()} threads")
    ratios, waits = [], []
    for number in range(asked.rounds + 1):
        one_by_one = sequential(tuned, ids, asked.tokens)
        together, first = at_once(scheduler, base.tokenizer, ids, adapter, asked.tokens)
        alone = statistics.median(at_once(scheduler, base.tokenizer, [each], adapter, 4)[1][0] for each in ids)
        if number == 0:
            continue  # warm-up
        ratios.append(one_by_one / together)
        waits.append(statistics.median(first) / alone)
        total = asked.tokens * len(ids)
        print(
            f"round {number}: generate one by one {total / one_by_one:.1f} tokens/s, worker with 8 at once "
            f"{total / together:.1f} tokens/s ({ratios[-1]:.2f} times); first token {alone:.2f} s alone, median "
            f"{statistics.median(first):.2f} s, last {max(first):.2f} s of 8 ({waits[-1]:.2f} times)"
        )
    print(f"median: {statistics.median(ratios):.2f} times the tokens/s, {statistics.median(waits):.2f} times the wait")
    scheduler.close()
    del tuned, scheduler
    report_answers(run, base, asked.rounds)


def report_answers(run: Run, base: LoadedBase, rounds: int) -> None:
    """Compare the ways to answer for a report; tokens differ, since each way draws its own."""
    tuned = {trial.name: trial.paths.best for trial in run.trials if trial.paths.best.is_dir()}
    prompts = [({"role": "user", "content": f"Explain in a few words why people like {what}."},) for what in LIKED]
    together, model = AnsweringModels(base, tuned), load_model(base.source, base.dtype, base.device)
    for folder in tuned.values():
        model = load_tuned(folder, base, model, str(len(getattr(model, "peft_config", ()))))

    def in_turn() -> int:
        total = 0
        for number in range(-1, len(tuned)):
            if number >= 0:
                model.set_adapter(str(number))
            with model.disable_adapter() if number < 0 else nullcontext():
                total += sum(each.tokens for each in generate_answers(model, base.tokenizer, prompts, CHECK_SAMPLING))
        return total

    def at_once() -> int:
        return sum(each.tokens for answers in together.answer(prompts, 0).values() for each in answers)

    ratios = []
    for number in range(1, rounds + 1):
        rates = []
        for way in (in_turn, at_once):
            started = time.perf_counter()
            tokens = way()
            rates.append(tokens / (time.perf_counter() - started))
        ratios.append(rates[1] / rates[0])
        print(
            f"round {number}: {len(prompts)} prompts, base and {len(tuned)} adapters: generate a model at a time "
            f"{rates[0]:.1f} tokens/s, all in one batch {rates[1]:.1f} tokens/s ({ratios[-1]:.2f} times)"
        )
    print(f"median: {statistics.median(ratios):.2f} times the tokens/s")


def sequential(tuned, ids: list[list[int]], tokens: int) -> float:
    """Seconds for all answers one after another, from adapter and base in turn."""
    started = time.perf_counter()
    with torch.inference_mode():
        for number, each in enumerate(ids):
            row = torch.tensor([each])
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            options["attention_mask"] = torch.ones_like(row)
            if number % 2:
                with tuned.disable_adapter():
                    tuned.generate(input_ids=row, **options)
            else:
                tuned.generate(input_ids=row, **options)
    return time.perf_counter() - started


def at_once(scheduler: BatchScheduler, tokenizer, ids, adapter, tokens: int) -> tuple[float, list[float]]:
    """Seconds until all answers have ended, and until the first token of each; no prefix of another round is reused.

    No token ends an answer, so that all answers have full length.
    """
    scheduler._batch.fail("")  # nothing runs; forgets what is cached
    events: list[queue.SimpleQueue] = []
    started = time.perf_counter()
    for number, each in enumerate(ids):
        events.append(queue.SimpleQueue())
        emit = lambda event, to=events[-1]: to.put((time.perf_counter() - started, event))  # noqa: E731
        params, asked = SamplingParams(max_tokens=tokens), None if number % 2 else adapter
        scheduler.submit(GenerationRequest(each, params, asked, tokenizer, frozenset(), emit))
    first = []
    for each in events:
        seen = None
        while True:
            at, event = each.get()
            seen = at if seen is None and isinstance(event, TextDelta) else seen
            if isinstance(event, Finished):
                break
        first.append(at if seen is None else seen)
    return time.perf_counter() - started, first


if __name__ == "__main__":
    main()
