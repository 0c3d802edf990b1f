"""Generations: the base model and every trial's best epoch answer the same held-out prompts.

Losses can fall while answers collapse into a few words or never end, so a run looks at the answers too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pairtune.conversation import Message
from pairtune.data.preference import PreferencePair
from pairtune.data.splits import prompt_key
from pairtune.evaluate.answers import summarise
from pairtune.evaluate.winrate import RuleJudge, win_rate
from pairtune.models.generate import generate_answers
from pairtune.models.load import LoadedBase, load_model, load_tuned
from pairtune.models.sampling import SamplingParams
from pairtune.run.records import Answer, AnswersRecord, Decoding, ModelAnswers

if TYPE_CHECKING:
    from peft import PeftModel

R = TypeVar("R", bound=AnswersRecord)

# Sampled, as in a chat: greedy decoding sends small models into loops that no user would see.
CHECK_SAMPLING = SamplingParams(max_tokens=160, temperature=0.7)

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
    """A base model and models tuned from it, ready to answer. All adapters share one base in memory.

    Args:
        base: the base model of all of them; "base" answers as the reference does that they were measured against.
        tuned: weight folders by model name.
    """

    def __init__(self, base: LoadedBase, tuned: dict[str, Path]) -> None:
        self.names = ["base", *tuned]
        self._base, self._folders = base, dict(tuned)
        if base.reference_adapter:
            self._folders["base"] = base.reference_adapter
        elif base.reference and base.reference.folder != base.source.folder:
            self._folders["base"] = base.reference.folder
        self._adapted: PeftModel | None = None
        self._plain = load_model(base.source, base.dtype, base.device)

    @contextmanager
    def active(self, name: str) -> Iterator[Any]:
        """Load the model called `name`, or switch to it."""
        folder = self._folders.get(name)
        if folder is None:
            with self._adapted.disable_adapter() if self._adapted else nullcontext():
                yield self._adapted or self._plain
        elif (folder / "adapter_config.json").is_file():
            yield self._with_adapter(name, folder)
        else:
            yield load_tuned(folder, self._base)

    def answer(
        self, name: str, prompts: Sequence[Prompt], seed: int, on_progress: Callable[[int], None] = lambda done: None
    ) -> list[Answer]:
        """One answer per prompt from the model called `name`."""
        with self.active(name) as model:
            return generate_answers(
                model, self._base.tokenizer, prompts, CHECK_SAMPLING, seed=seed, on_progress=on_progress
            )

    def _with_adapter(self, name: str, folder: Path) -> PeftModel:
        adapter = str(self.names.index(name))  # PEFT accepts no name with a dot
        if self._adapted is None or adapter not in self._adapted.peft_config:
            self._adapted = load_tuned(folder, self._base, self._adapted or self._plain, adapter)
        self._adapted.set_adapter(adapter)
        return self._adapted.eval()


def affordable(models: AnsweringModels, prompts: Sequence[Prompt], run_seconds: float, seed: int) -> int:
    """How many prompts all models can answer in a tenth of the run's time, at the base model's speed."""
    started = time.monotonic()
    models.answer("base", prompts[:FEWEST], seed)
    each = (time.monotonic() - started) / min(FEWEST, len(prompts)) * len(models.names)
    # Larger batches are faster per prompt, so this errs on the low side.
    return max(FEWEST, min(MOST, int(TIME_SHARE * run_seconds / each)))


def compare_answers(
    kind: type[R],
    models: AnsweringModels,
    prompts: Sequence[Prompt],
    seed: int,
    on_progress: Callable[[str, int], None] = lambda model, done: None,
) -> R:
    """Answer the prompts with every model, the base first; `winrate.RuleJudge` judges the tuned ones against it.

    Args:
        kind: the type of record to return.
        models: the models.
        prompts: the prompts to answer.
        seed: for sampling.
        on_progress: called with a model's name and the number of prompts it has answered.
    """
    answered: dict[str, ModelAnswers] = {}
    of_base: list[Answer] = []
    asked = [str(prompt[-1]["content"]) for prompt in prompts]
    for name in models.names:
        answers = models.answer(name, prompts, seed, partial(on_progress, name))
        won = None
        if name == "base":
            of_base = answers
        else:
            won = win_rate(RuleJudge().judge(prompts, answers, of_base, lambda done: None), answers, of_base)
        answered[name] = ModelAnswers(summary=summarise(asked, answers), answers=answers, win_rate=won)
    params = CHECK_SAMPLING
    sampling = Decoding(max_new_tokens=params.max_tokens, temperature=params.temperature, top_k=params.top_k, seed=seed)
    return kind(sampling=sampling, prompts=[list(prompt) for prompt in prompts], models=answered)
