"""Votes as training data: pairs and labels, with their provenance, and an account of every vote.

Votes on the same two answers to the same conversation count once: of each voter the last one, and then the majority. A
draw between voters is a contradiction and gives no pair.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pairtune.files import write_atomic, write_json
from pairtune.votes.records import Vote, VotedAnswer

WITHDRAWN, THUMB, TIE, BAD = "withdrawn", "a thumb, not a comparison", "tie", "both bad"
CONTRADICTED, SAME = "contradicted by as many votes", "both answers are the same"
DIVERGED, EMPTY, REPEATED = (
    "the conversations differ before the answers",
    "an empty answer",
    "changed by the same voter",
)

Row = dict[str, Any]


@dataclass
class Harvest:
    """What became of all votes; `len(votes) == used + left_out.total()`.

    Attributes:
        pairs: rows in TRL's conversational preference format, each with its provenance in `votes`.
        labels: rows in TRL's unpaired format, with `label` true for answers that were liked.
        used: number of votes behind the pairs.
        left_out: number of votes that gave no pair, by reason.
        votes: all votes as they were given.
    """

    pairs: list[Row] = field(default_factory=list)
    labels: list[Row] = field(default_factory=list)
    used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    votes: Sequence[Vote] = ()

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Why votes gave no pair, the most frequent reason first."""
        return [(reason, count) for reason, count in self.left_out.most_common() if count]

    def write_rows(self, path: Path, *, single: bool = False) -> None:
        """Write the pairs, or the single answers with their labels, as JSON lines."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _lines(self.labels if single else self.pairs))

    def write(self, folder: Path) -> None:
        """Write `pairs.jsonl`, `unpaired.jsonl`, `votes.jsonl` and the account, `votes.json`, into a folder."""
        self.write_rows(folder / "pairs.jsonl")
        self.write_rows(folder / "unpaired.jsonl", single=True)
        write_atomic(folder / "votes.jsonl", _lines([vote.model_dump(mode="json") for vote in self.votes]))
        write_json(folder / "votes.json", self.account())

    def account(self) -> dict[str, Any]:
        """How many votes there are, and what became of them; the most frequent reason first."""
        return {
            "votes": len(self.votes),
            "pairs": len(self.pairs),
            "labels": len(self.labels),
            "votes_in_pairs": self.used,
            "left_out": dict(self.reasons),
        }


def harvest(votes: Sequence[Vote]) -> Harvest:
    """Pairs and labels of votes."""
    found = Harvest(votes=votes)
    by_answers: dict[Any, list[Vote]] = defaultdict(list)
    for vote in votes:
        if reason := _not_a_pair(vote):
            found.left_out[reason] += 1
        else:
            key = (_text(vote.prompt), frozenset(answer.text for answer in vote.answers))
            by_answers[key].append(vote)
    for given in by_answers.values():
        _decide(given, found)
    found.labels = list(_labels(votes))
    return found


def _not_a_pair(vote: Vote) -> str:
    """Why a vote cannot say which of two answers is the better one; empty if it can."""
    if vote.withdrawn is not None:
        return WITHDRAWN
    if vote.kind == "thumb":
        return THUMB
    left, right = vote.answers
    if left.context != right.context or left.context:
        return DIVERGED
    if not (left.text.strip() and right.text.strip()):
        return EMPTY
    return SAME if left.text == right.text else ""


def _decide(given: list[Vote], found: Harvest) -> None:
    last = {vote.voter: vote for vote in given}  # of each voter the last vote
    found.left_out[REPEATED] += len(given) - len(last)
    sides: dict[str, list[Vote]] = defaultdict(list)
    for voter, vote in list(last.items()):
        if vote.outcome in ("tie", "bad"):
            found.left_out[TIE if vote.outcome == "tie" else BAD] += 1
            del last[voter]
        else:
            sides[_chosen(vote).text].append(vote)
    if not sides:
        return
    best, *rest = sorted(sides.values(), key=len, reverse=True)
    if rest and len(rest[0]) == len(best):
        found.left_out[CONTRADICTED] += len(last)
        return
    found.used += len(last)
    chosen, rejected = _chosen(best[-1]), _rejected(best[-1])
    found.pairs.append(
        {
            "prompt": best[-1].prompt,
            "chosen": [{"role": "assistant", "content": chosen.text}],
            "rejected": [{"role": "assistant", "content": rejected.text}],
            "votes": {
                "for": len(best),
                "against": len(last) - len(best),
                "kinds": sorted({vote.kind for vote in last.values()}),
                "ids": sorted(vote.id for vote in last.values()),
                "chosen_model": chosen.model,
                "chosen_fingerprint": chosen.fingerprint,
                "rejected_model": rejected.model,
                "rejected_fingerprint": rejected.fingerprint,
                "reasons": [vote.reason for vote in last.values() if vote.reason],
            },
        }
    )


def _chosen(vote: Vote) -> VotedAnswer:
    return vote.answers[0 if vote.outcome == "left" else 1]


def _rejected(vote: Vote) -> VotedAnswer:
    return vote.answers[1 if vote.outcome == "left" else 0]


def _labels(votes: Sequence[Vote]) -> Iterator[Row]:
    """One label for each answer that was voted on: liked or not; ties say nothing, `bad` says that neither was."""
    given: dict[tuple[str, str], dict[str, tuple[bool, Vote, VotedAnswer]]] = defaultdict(dict)
    for vote in votes:
        if vote.withdrawn is not None or vote.outcome == "tie":
            continue
        for answer, side in zip(vote.answers, ("left", "right"), strict=False):
            liked = vote.outcome in (side, "up")
            if answer.text.strip():
                prompt = answer.context or vote.prompt
                given[_text(prompt), answer.text][vote.voter] = (liked, vote, answer)
    for by_voter in given.values():
        said = [liked for liked, _, _ in by_voter.values()]
        if 2 * sum(said) == len(said):
            continue  # contradicted
        _, vote, answer = next(iter(by_voter.values()))
        yield {
            "prompt": [turn if isinstance(turn, dict) else dict(turn) for turn in answer.context or vote.prompt],
            "completion": [{"role": "assistant", "content": answer.text}],
            "label": 2 * sum(said) > len(said),
            "votes": {
                "liked": sum(said),
                "disliked": len(said) - sum(said),
                "kinds": sorted({vote.kind for _, vote, _ in by_voter.values()}),
                "ids": sorted(vote.id for _, vote, _ in by_voter.values()),
                "model": answer.model,
                "fingerprint": answer.fingerprint,
            },
        }


def _text(prompt: Sequence[Any]) -> str:
    return json.dumps(list(prompt), sort_keys=True, ensure_ascii=False)


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
