"""lineage.json: the tuned model that a run started from, and that model's own parents."""

from __future__ import annotations

from typing import Literal

from pairtune.config import Reference
from pairtune.run.records.base import Part, Record

# How a run starts from a tuned model: it trains its adapter further, puts a new adapter on the merged weights, or (a
# fully tuned model) takes its weights as they are.
Beginning = Literal["continue", "new", "whole"]


class Parent(Part):
    """A tuned model that a run started from.

    Attributes:
        name: the run's name, with the trial's if one was named, or the adapter's folder or Hub id.
        kind: where it came from.
        place: the folder (absolute) or Hub id.
        weights: fingerprint of its weight files.
        data: the sources that it was tuned on, by name; empty if unknown.
    """

    name: str
    kind: Literal["run", "trial", "adapter"]
    place: str
    weights: str
    data: list[str] = []


class Lineage(Record):
    """Where a run started, if not at a plain model.

    Attributes:
        base: the plain model that everything goes back to, as given to `--model`.
        ground: the whole weights that the start's adapters sit on: the base, or a fully tuned model's folder.
        ground_weights: fingerprint of the latter.
        on_top: how the trials build on the start.
        reference: what they are measured against.
        merged: how many adapters are merged into the ground, below the trials'; the run keeps them.
        merged_as: the name of the merged weights' folder in the user cache.
        parents: the model that the run started from, then that model's own parent, and so on.
    """

    file = "lineage.json"

    base: str
    ground: str
    on_top: Beginning
    reference: Reference = "start"
    ground_weights: str = ""
    merged: int = 0
    merged_as: str = ""
    parents: list[Parent]

    @property
    def start(self) -> Parent:
        """The model that the run started from."""
        return self.parents[0]

    @property
    def round(self) -> int:
        """How many times the base has been tuned with this run, itself included."""
        return len(self.parents) + 1
