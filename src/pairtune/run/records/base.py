"""What records are made of."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

# A 95 % interval: low, high.
Interval = tuple[float, float]

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


class Part(BaseModel):
    """A part of a record."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Record(Part):
    """The content of one JSON file of a run folder."""

    file: ClassVar[str]


def dump(record: Part) -> dict[str, Any]:
    """A record as it is written: with TRL's names for metrics, and lists for tuples."""
    return record.model_dump(mode="json", by_alias=True)
