"""What models say: the same held-out prompts answered by the base and by every trial's best epoch.

Losses can fall while answers collapse into a few words or never end, so a run looks at the answers as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from pairtune.data.pairs import Message, PreferencePair
from pairtune.data.splits import prompt_key
from pairtune.models.generate import Answer, Sampling, generate_answers
from pairtune.models.load import LoadedBase, load_model, load_tuned

# Sampled, as in a chat: greedy decoding sends small models into loops that people would never see.
CHECK_SAMPLING = Sampling(max_new_tokens=160, temperature=0.7)


def held_out_prompts(pairs: Sequence[PreferencePair], count: int) -> list[tuple[Message, ...]]:
    """The first `count` different prompts of held-out pairs, in their order."""
    different = {prompt_key(pair.prompt): pair.prompt for pair in reversed(pairs)}
    return list(different.values())[::-1][:count]


def summarise(answers: Sequence[Answer]) -> dict[str, float]:
    """Length and completeness of answers.

    Returns:
        `median_tokens`; `ended_share`, the share of answers that ended by themselves within the token limit;
        `different_words_share`, distinct over all words within an answer, averaged (low: the answer repeats itself).
    """
    words = [answer.text.lower().split() for answer in answers]
    different = [len(set(said)) / len(said) for said in words if said]
    return {
        "median_tokens": float(median(answer.tokens for answer in answers)),
        "ended_share": sum(answer.ended for answer in answers) / len(answers),
        "different_words_share": round(sum(different) / len(different), 4) if different else 0.0,
    }


def compare_answers(
    base: LoadedBase,
    tuned: dict[str, Path],
    prompts: Sequence[tuple[Message, ...]],
    seed: int,
    progress: Callable[[str, int], None] = lambda model, done: None,
) -> dict[str, Any]:
    """Answer the prompts with the base model and with each of `tuned` (folders of weights, by the trial's name).

    `progress` is called with a model's name and the number of prompts it has answered.

    Returns:
        The content of `generations.json`: `sampling`, `prompts` (each a list of messages) and `models`, by name
        (`base` first): `summary` (see `summarise`) and `answers` (`text`, `tokens`, `ended`), one per prompt.
    """
    models = {}
    for name, folder in {"base": None, **tuned}.items():
        model = load_model(base.source, base.dtype, base.device) if folder is None else load_tuned(folder, base)
        answers = generate_answers(
            model,
            base.tokenizer,
            prompts,
            CHECK_SAMPLING,
            seed=seed,
            progress=partial(progress, name),
        )
        models[name] = {"summary": summarise(answers), "answers": [vars(answer) for answer in answers]}
    sampling = {**vars(CHECK_SAMPLING), "seed": seed}
    return {"sampling": sampling, "prompts": [list(prompt) for prompt in prompts], "models": models}
