"""Generations: the base model and every trial's best epoch answer the same held-out prompts.

Losses can fall while answers collapse into a few words or never end, so a run looks at the answers too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from pairtune.conversation import Message
from pairtune.data.preference import PreferencePair
from pairtune.data.splits import prompt_key
from pairtune.evaluation.answers import summarise
from pairtune.evaluation.winrate import RuleJudge, win_rate
from pairtune.footprint import ANSWER_TOKENS
from pairtune.models.generate import generate_answers
from pairtune.models.load import LoadedBase, blank_model, check_adapter, load_answering, load_model, load_tuned
from pairtune.models.resolve import ADAPTER_SETTINGS
from pairtune.models.sampling import SamplingParams
from pairtune.run.records import Answer, AnswersRecord, Decoding, ModelAnswers
from pairtune.serve.adapters import read_adapter
from pairtune.serve.model_runner import ModelRunner
from pairtune.serve.offline import Question, answer_all
from pairtune.serve.request import AdapterRef, NotBatchable

R = TypeVar("R", bound=AnswersRecord)

# Sampled, as in a chat: greedy decoding sends small models into loops that no user would see.
CHECK_SAMPLING = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.7)

# Without --samples: as many prompts as can be answered in this share of the run's time, within bounds.
TIME_SHARE, FEWEST, MOST = 0.1, 4, 32

Prompt = tuple[Message, ...]


def held_out_prompts(pairs: Sequence[PreferencePair], count: int) -> list[Prompt]:
    """The first `count` distinct prompts of held-out pairs, in order; prompts with tools cannot be answered in text."""
    different: dict[int, Prompt] = {}
    for pair in pairs:
        if len(different) == count:
            break
        if pair.tools or any(turn["role"] == "tool" for turn in pair.prompt):
            continue
        different.setdefault(prompt_key(pair.prompt), pair.prompt)
    return list(different.values())


class AnsweringModels:
    """A base model and models tuned from it, ready to answer.

    All adapters share one base in memory and answer in the same forward passes; whole models answer one after the
    other, and so do those that cannot be batched.

    Args:
        base: the base model of all of them; "base" answers as the reference does that they were measured against.
        tuned: weight folders by model name.
    """

    def __init__(self, base: LoadedBase, tuned: dict[str, Path]) -> None:
        self.names = ["base", *tuned]
        self._base = base
        self._adapters: dict[str, Path] = {}
        self._whole: dict[str, Path] = {}
        reference = base.reference_adapter or (base.reference and base.reference.folder)
        for name, folder in {"base": reference or base.source.folder, **tuned}.items():
            if (folder / ADAPTER_SETTINGS).is_file():
                self._adapters[name] = folder
            elif folder != base.source.folder:
                self._whole[name] = folder
        self._runner: ModelRunner | None = None

    def answer(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        on_progress: Callable[[int], None] = lambda done: None,
        params: SamplingParams = CHECK_SAMPLING,
    ) -> dict[str, list[Answer]]:
        """Every model's answers, one per prompt, by model name.

        A prompt has the same seed for every model.

        Args:
            prompts: the prompts.
            seed: of the first prompt; the others have the following ones.
            on_progress: called with the number of answers so far, of all models together.
            params: sampling parameters.
        """
        asked = _Asked(self._base.tokenizer, prompts, params, seed, on_progress)
        shared = [name for name in self.names if name not in self._whole]
        try:
            found = self._batched(asked, shared)
        except NotBatchable:
            found = {name: self._alone(asked, name) for name in shared}
        for name, folder in self._whole.items():
            model = load_model(folder, self._base.dtype, self._base.device)
            try:
                found[name] = asked.of(ModelRunner(model, 1, 1), [None])[0]
            except NotBatchable:
                found[name] = asked.of_plain(model)
        return {name: found[name] for name in self.names}

    def _batched(self, asked: _Asked, names: Sequence[str]) -> dict[str, list[Answer]]:
        """Answers of the base and its adapters together."""
        base = self._base
        adapters = [AdapterRef(name, self._adapters[name]) if name in self._adapters else None for name in names]
        for each in adapters:
            if each:  # before the base takes memory
                check_adapter(each.folder, blank_model(base.source))
                read_adapter(each.folder, base.dtype, torch.device("cpu"))
        if self._runner is None and names:
            self._runner = ModelRunner(load_answering(base), 1, 1)
        return dict(zip(names, asked.of(self._runner, adapters), strict=True)) if self._runner else {}

    def _alone(self, asked: _Asked, name: str) -> list[Answer]:
        """Answers of the base or one adapter through transformers."""
        base, folder = self._base, self._adapters.get(name)
        model = load_tuned(folder, base) if folder else load_answering(base)
        return asked.of_plain(model)


@dataclass
class _Asked:
    """Prompts that several models answer."""

    tokenizer: Any
    prompts: Sequence[Prompt]
    params: SamplingParams
    seed: int
    on_progress: Callable[[int], None]
    done: int = 0

    def of(self, runner: ModelRunner, adapters: Sequence[AdapterRef | None]) -> list[list[Answer]]:
        """Answers of a model with each adapter, in continuous batches."""
        encoded = [
            self.tokenizer(
                self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True),
                add_special_tokens=False,
            )["input_ids"]
            for prompt in self.prompts
        ]
        questions = [
            Question(ids, replace(self.params, seed=self.seed + number), adapter)
            for adapter in adapters
            for number, ids in enumerate(encoded)
        ]
        answers = answer_all(runner, self.tokenizer, questions, lambda done: self.on_progress(self.done + done))
        self.done += len(answers)
        count = len(encoded)
        return [answers[number * count : (number + 1) * count] for number in range(len(adapters))]

    def of_plain(self, model: Any) -> list[Answer]:
        """Answers of a model through transformers."""
        answers = generate_answers(
            model,
            self.tokenizer,
            self.prompts,
            self.params,
            seed=self.seed,
            on_progress=lambda done: self.on_progress(self.done + done),
        )
        self.done += len(answers)
        return answers


def affordable(models: AnsweringModels, prompts: Sequence[Prompt], run_seconds: float, seed: int) -> int:
    """How many prompts all models can answer in a tenth of the run's time."""
    started = time.monotonic()
    models.answer(prompts[:FEWEST], seed)
    each = (time.monotonic() - started) / min(FEWEST, len(prompts))
    # Larger batches are faster per prompt, so this errs on the low side.
    return max(FEWEST, min(MOST, int(TIME_SHARE * run_seconds / each)))


def compare_answers(
    kind: type[R],
    models: AnsweringModels,
    prompts: Sequence[Prompt],
    seed: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> R:
    """Answer the prompts with every model, the base first; `winrate.RuleJudge` judges the tuned ones against it.

    Args:
        kind: the type of record to return.
        models: the models.
        prompts: the prompts to answer.
        seed: for sampling.
        on_progress: called with the number of answers so far, of all models together.
    """
    answered: dict[str, ModelAnswers] = {}
    asked = [str(prompt[-1]["content"]) for prompt in prompts]
    found = models.answer(prompts, seed, on_progress)
    of_base = found["base"]
    for name, answers in found.items():
        won = None
        if name != "base":
            won = win_rate(RuleJudge().judge(prompts, answers, of_base, lambda done: None), answers, of_base)
        answered[name] = ModelAnswers(summary=summarise(asked, answers), answers=answers, win_rate=won)
    params = CHECK_SAMPLING
    sampling = Decoding(max_new_tokens=params.max_tokens, temperature=params.temperature, top_k=params.top_k, seed=seed)
    return kind(sampling=sampling, prompts=[list(prompt) for prompt in prompts], models=answered)
