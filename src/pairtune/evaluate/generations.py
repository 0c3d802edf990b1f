"""What models say: the same held-out prompts answered by the base and by every trial's best epoch.

Losses can fall while answers collapse into a few words or never end, so a run looks at the answers as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel

from pairtune.data.pairs import Message, PreferencePair
from pairtune.data.splits import prompt_key
from pairtune.evaluate.answers import summarise
from pairtune.evaluate.winrate import RuleJudge, win_rate
from pairtune.models.generate import Answer, Sampling, generate_answers
from pairtune.models.load import LoadedBase, load_model, load_tuned

# Sampled, as in a chat: greedy decoding sends small models into loops that people would never see.
CHECK_SAMPLING = Sampling(max_new_tokens=160, temperature=0.7)

# Where the number of prompts is left open: as many as this share of the run's time answers, within bounds.
TIME_SHARE, FEWEST, MOST = 0.1, 4, 32

Prompt = tuple[Message, ...]


def held_out_prompts(pairs: Sequence[PreferencePair], count: int) -> list[Prompt]:
    """The first `count` different prompts of held-out pairs, in their order."""
    different: dict[int, Prompt] = {}
    for pair in pairs:
        if len(different) == count:
            break
        different.setdefault(prompt_key(pair.prompt), pair.prompt)
    return list(different.values())


class Speakers:
    """Models that answer prompts: a base, and what was tuned from it. One base in memory serves all its adapters.

    Args:
        base: of all of them.
        tuned: folders of weights by name.
    """

    def __init__(self, base: LoadedBase, tuned: dict[str, Path]) -> None:
        self.names = ["base", *tuned]
        self._base, self._tuned = base, tuned
        self._adapted: PeftModel | None = None
        self._plain = load_model(base.source, base.dtype, base.device)

    @contextmanager
    def speaking(self, name: str) -> Iterator[Any]:
        """The model called `name`, in memory."""
        folder = self._tuned.get(name)
        if folder is None:
            with self._adapted.disable_adapter() if self._adapted else nullcontext():
                yield self._adapted or self._plain
        elif (folder / "adapter_config.json").is_file():
            yield self._with_adapter(name, folder)
        else:
            yield load_tuned(folder, self._base)

    def answer(
        self, name: str, prompts: Sequence[Prompt], seed: int, progress: Callable[[int], None] = lambda done: None
    ) -> list[Answer]:
        """One answer a prompt by the model called `name`."""
        with self.speaking(name) as model:
            return generate_answers(model, self._base.tokenizer, prompts, CHECK_SAMPLING, seed=seed, progress=progress)

    def _with_adapter(self, name: str, folder: Path) -> PeftModel:
        inside = str(self.names.index(name))  # PEFT takes no name with a dot
        if self._adapted is None:
            self._adapted = load_tuned(folder, self._base, self._plain, inside)
        elif inside not in self._adapted.peft_config:
            self._adapted.load_adapter(folder, inside)
        self._adapted.set_adapter(inside)
        return self._adapted.eval()


def affordable(speakers: Speakers, prompts: Sequence[Prompt], run_seconds: float, seed: int) -> int:
    """How many prompts all models can answer in a tenth of the run's time, at the speed of the base."""
    started = time.monotonic()
    speakers.answer("base", prompts[:FEWEST], seed)
    each = (time.monotonic() - started) / min(FEWEST, len(prompts)) * len(speakers.names)
    # Larger batches are faster a prompt, so this is rather too few than too many.
    return max(FEWEST, min(MOST, int(TIME_SHARE * run_seconds / each)))


def compare_answers(
    speakers: Speakers,
    prompts: Sequence[Prompt],
    seed: int,
    progress: Callable[[str, int], None] = lambda model, done: None,
) -> dict[str, Any]:
    """Answer the prompts with every model.

    `progress` is called with a model's name and the number of prompts it has answered.

    Returns:
        The content of `generations.json`: `sampling`, `prompts` (each a list of messages) and `models`, by name
        (`base` first): `summary` (see `summarise`), `answers` (`text`, `tokens`, `ended`), one per prompt, and of
        tuned models `win_rate` over the base by the rule of `winrate.RuleJudge`, with the `scores` prompt by prompt.
    """
    models: dict[str, dict[str, Any]] = {}
    of_base: list[Answer] = []
    asked = [str(prompt[-1]["content"]) for prompt in prompts]
    for name in speakers.names:
        answers = speakers.answer(name, prompts, seed, partial(progress, name))
        models[name] = {"summary": summarise(asked, answers), "answers": [vars(answer) for answer in answers]}
        if name == "base":
            of_base = answers
        else:
            scores = RuleJudge().judge(prompts, answers, of_base, lambda done: None)
            models[name]["win_rate"] = {**win_rate(scores, answers, of_base), "scores": scores}
    sampling = {**vars(CHECK_SAMPLING), "seed": seed}
    return {"sampling": sampling, "prompts": [list(prompt) for prompt in prompts], "models": models}
