"""The first screen: what a model has learned, in a sentence, and prompts to try."""

from __future__ import annotations

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
    run = Run.open(settings.PAIRTUNE_RUNS / name) if name else None
    said = learned(run) if run else ""
    prompts = run.generations.prompts if run and run.generations else []
    alone = (str(prompt[0]["content"]) for prompt in prompts if len(prompt) == 1)
    fitting = [text for text in alone if len(text) <= _LONGEST and "\n" not in text.strip()]
    return Introduction(name if said else "", said, tuple([*fitting, *_GENERIC][:PROMPTS]))
