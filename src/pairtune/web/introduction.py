"""The first screen: what a model has learned, in a sentence, and prompts to try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from django.conf import settings

from pairtune.report.verdict import learned
from pairtune.run.folder import Run

PROMPTS = 3
_LONGEST = 160  # characters of a prompt that fits a button
_GENERIC = ("What is a lighthouse for?", "How can I fall asleep faster?", "Explain inflation to a child.")


@dataclass(frozen=True)
class Introduction:
    """What the first screen says.

    Attributes:
        run: the run that is talked about; empty if nothing has been tuned.
        learned: what its model has learned.
        prompts: three prompts to press, of those that the model has not seen.
    """

    run: str
    learned: str
    prompts: tuple[str, ...]


def introduce(name: str) -> Introduction:
    """The first screen of a run's model, or of a site without one."""
    said = learned(Run.open(settings.PAIRTUNE_RUNS / name)) if name else ""
    return Introduction(name if said else "", said, tuple(held_out_prompts([name] if name else [])[:PROMPTS]))


def held_out_prompts(names: Sequence[str]) -> list[str]:
    """Short prompts that the models of some runs have not seen, and a few that any model can answer."""
    found = []
    for name in dict.fromkeys(names):
        answered = Run.open(settings.PAIRTUNE_RUNS / name).generations
        alone = (str(prompt[0]["content"]) for prompt in (answered.prompts if answered else []) if len(prompt) == 1)
        found += [text for text in alone if len(text) <= _LONGEST and "\n" not in text.strip()]
    return list(dict.fromkeys([*found, *_GENERIC]))
