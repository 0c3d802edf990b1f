"""Which prompts are related, and which pairs go to the training, validation and test splits.

Two prompts are related if they are equal apart from case and whitespace, if one conversation begins with the other, or
if they are nearly the same: the estimated Jaccard similarity of their three-word shingles is 0.8 or more (MinHash;
Broder 1997, "On the resemblance and containment of documents"). In scripts that are written without spaces, characters
take the place of words and shingles have two of them, since a question may have no more than a dozen; such short ones
are near as well if one lacks a single character of the other. Related prompts are never in different splits.

System messages do not count for the similarity, because a long one that all rows share would make all of them similar.
The same question under two system messages is therefore related, which errs on the safe side. A long text that all
user turns share, such as an instruction with examples, does relate short questions: a sketch is made before the other
prompts are known.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rensa import RMinHash, RMinHashLSH

from pairtune.conversation import Message

SAME, CONTINUED, NEAR = "prompt is in another split", "conversation is in another split", "nearly in another split"

NEAR_SIMILARITY = 0.8
_PERMUTATIONS = 128
# 32 bands of 4: a pair with similarity 0.8 is missed once in ten million times; candidates are verified.
_BANDS = 32
_SHINGLE, _UNSPACED_SHINGLE = 3, 2
# Prompts without spaces of this many characters are compared exactly: shorter ones say too little, in longer ones a
# single character hardly matters.
_SHORT = range(8, 40)

# Scripts without spaces, in which only a dictionary could find words: Thai, Lao, Tibetan, Myanmar, Khmer, the Tai
# scripts, Balinese, Javanese; kana and bopomofo; Han. Korean uses spaces.
_UNSPACED = (
    "\u0e00-\u109f\u1780-\u17ff\u1950-\u1aaf\u1b00-\u1b7f\ua980-\ua9ff\uaa60-\uaadf"
    "\u3041-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f"
    "\u2e80-\u2fdf\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_HAS_UNSPACED, _UNITS = re.compile(f"[{_UNSPACED}]"), re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


@dataclass(frozen=True)
class Prompt:
    """What decides whether two prompts are related.

    Attributes:
        whole: hashes of the prompt as it was read and, if it lost its oldest turns, as it is used.
        begun: hashes of the shorter conversations that it begins with.
        sketch: MinHash of its user and assistant turns.
        shingles: what the sketch is of, for short prompts in scripts without spaces; else empty.
    """

    whole: tuple[int, ...]
    begun: tuple[int, ...]
    sketch: RMinHash
    shingles: frozenset[str] = frozenset()

    def is_near(self, other: Prompt) -> bool:
        """Whether two prompts are nearly the same."""
        if self.shingles and other.shingles:
            less, more = sorted((len(self.shingles - other.shingles), len(other.shingles - self.shingles)))
            # Taking one character out of a text removes two of its pairs of characters and makes one, or removes one.
            without_one = less < more <= 2
            return without_one or len(self.shingles & other.shingles) >= NEAR_SIMILARITY * len(
                self.shingles | other.shingles
            )
        return bool(self.sketch.jaccard(other.sketch) >= NEAR_SIMILARITY)

    @classmethod
    def of(cls, *prompts: Sequence[Message]) -> Prompt:
        """From a prompt as it was read, followed by any other forms in which it is used."""
        whole, begun = [], []
        for turns in prompts:
            digest = hashlib.blake2b(digest_size=8)
            for number, turn in enumerate(turns, 1):
                digest.update(f"{turn['role']}: {_words(turn)}\n".encode())
                if turn["role"] == "user" and number < len(turns):
                    begun.append(int.from_bytes(digest.digest()))
            whole.append(int.from_bytes(digest.digest()))
        dialogue = [turn for turn in prompts[0] if turn["role"] != "system"]
        units, unspaced = _units(dialogue)
        if not units:
            units, unspaced = _units(prompts[0])
        size = _UNSPACED_SHINGLE if unspaced else _SHINGLE
        shingles = [" ".join(units[at : at + size]) for at in range(max(1, len(units) - size + 1))]
        sketch = RMinHash(num_perm=_PERMUTATIONS, seed=1)
        sketch.update(shingles)
        return cls(
            tuple(whole),
            tuple(begun),
            sketch,
            frozenset(shingles) if unspaced and len(units) in _SHORT else frozenset(),
        )


def _words(turn: Message) -> str:
    return " ".join(turn["content"].casefold().split())


def _units(turns: Sequence[Message]) -> tuple[list[str], bool]:
    """The units of shingles, words or characters, and whether the text is in a script without spaces."""
    text = " ".join(_words(turn) for turn in turns)
    unspaced = not text.isascii() and bool(_HAS_UNSPACED.search(text))
    return (_UNITS.findall(text) if unspaced else text.split()), unspaced


def prompt_key(turns: Sequence[Message]) -> int:
    """A hash of a prompt's roles and words; case and whitespace do not count."""
    return Prompt.of(turns).whole[0]


@dataclass
class PromptIndex:
    """An index of prompts, for finding those related to another one. Of equal prompts only the first is kept."""

    _prompts: dict[int, Prompt] = field(default_factory=dict)
    _known: set[tuple[int, ...]] = field(default_factory=set)
    _whole: dict[int, list[int]] = field(default_factory=dict)
    _begun: dict[int, list[int]] = field(default_factory=dict)
    _near: RMinHashLSH = field(
        default_factory=lambda: RMinHashLSH(threshold=NEAR_SIMILARITY, num_perm=_PERMUTATIONS, num_bands=_BANDS)
    )

    def add(self, number: int, prompt: Prompt) -> None:
        """Add a prompt under a unique number."""
        if prompt.whole in self._known:
            return
        self._known.add(prompt.whole)
        self._prompts[number] = prompt
        self._near.insert(number, prompt.sketch)
        for key in prompt.whole:
            self._whole.setdefault(key, []).append(number)
        for key in prompt.begun:
            self._begun.setdefault(key, []).append(number)

    def related(self, prompt: Prompt) -> Iterator[tuple[int, str]]:
        """The numbers of prompts related to this one, each with the reason, the simplest reasons first."""
        for key in prompt.whole:
            yield from ((number, SAME) for number in self._whole.get(key, ()))
        for keys, index in ((prompt.begun, self._whole), (prompt.whole, self._begun)):
            yield from ((number, CONTINUED) for key in keys for number in index.get(key, ()))
        for number in self._near.query(prompt.sketch):
            if self._prompts[number].is_near(prompt):
                yield number, NEAR


def group_prompts(prompts: Sequence[Prompt]) -> list[int]:
    """The group number of each prompt; prompts that are related, directly or through others, share one."""
    parents = list(range(len(prompts)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = number = parents[parents[number]]
        return number

    index = PromptIndex()
    for number, prompt in enumerate(prompts):
        for other, _ in index.related(prompt):
            parents[root(other)] = root(number)
        index.add(number, prompt)
    return [root(number) for number in range(len(prompts))]


def draw_splits(
    prompts: Sequence[Prompt],
    shares: Sequence[float],
    seed: int,
    known: Mapping[int, int] | None = None,
    kinds: Sequence[bool] = (),
) -> list[int]:
    """Draw groups of prompts for splits 1, 2, …; the rest is split 0.

    A group's rank in the draw depends only on its own hash and the seed, so adding prompts does not reorder the others.
    A split with a share above 0 gets at least one group, but split 0 comes first. A group with prompts of earlier
    rounds is not drawn: it stays in its split, and in split 0 if any of it was there, since that has been trained on.

    Args:
        prompts: the prompts of all pairs.
        shares: the shares of the groups for splits 1, 2, …
        seed: a different seed draws different groups.
        known: the splits of the prompts of earlier rounds, by hash.
        kinds: of single answers, whether each is desirable. A split of one kind gets a group with the other kind too,
            if split 0 keeps one.

    Returns:
        The split of each prompt.
    """
    groups = group_prompts(prompts)
    smallest: dict[int, int] = {}
    for group, prompt in zip(groups, prompts, strict=True):
        smallest[group] = min(smallest.get(group, prompt.whole[0]), prompt.whole[0])
    split_of = _stay(prompts, groups, known or {})
    drawn = sorted(
        smallest.keys() - split_of.keys(),
        key=lambda group: hashlib.sha256(f"{seed}\0{smallest[group]}".encode()).digest(),
    )
    start, trained = 0, 0 in split_of.values()
    for split, share in enumerate(shares, 1):
        has = sum(stays == split for stays in split_of.values())
        wanted = max(1, round(len(smallest) * share)) - has if share else 0
        count = min(max(0, wanted), max(0, len(drawn) - start - (not trained)))
        split_of |= dict.fromkeys(drawn[start : start + count], split)
        start += count
        if kinds and count:
            more = _missing_kinds(split, split_of, drawn[start:], _kinds_of(groups, kinds))
            split_of |= dict.fromkeys(more, split)
            drawn = [group for group in drawn if group not in more]
    return [split_of.get(group, 0) for group in groups]


def _kinds_of(groups: Sequence[int], kinds: Sequence[bool]) -> dict[int, set[bool]]:
    """The kinds of answers in each group."""
    found: dict[int, set[bool]] = {}
    for group, kind in zip(groups, kinds, strict=True):
        found.setdefault(group, set()).add(kind)
    return found


def _missing_kinds(
    split: int, split_of: Mapping[int, int], left: Sequence[int], kinds: Mapping[int, set[bool]]
) -> list[int]:
    """The first groups left with the kinds of answers that a split lacks, unless they are the last of a kind."""
    more: list[int] = []
    for kind in (True, False):
        inside = [*(group for group, of in split_of.items() if of == split), *more]
        having = [group for group in left if kind in kinds[group] and group not in more]
        if not any(kind in kinds[group] for group in inside) and len(having) > 1:
            more.append(having[0])
    return more


def _stay(prompts: Sequence[Prompt], groups: Sequence[int], known: Mapping[int, int]) -> dict[int, int]:
    """The splits of the groups that have prompts of earlier rounds."""
    found: dict[int, int] = {}
    for group, prompt in zip(groups, prompts, strict=True):
        for key in prompt.whole:
            if key in known:
                found[group] = min(found.get(group, known[key]), known[key])
    return found


def find_leaks(splits: Sequence[Sequence[Prompt]]) -> list[dict[int, str]]:
    """For each split, its prompts that are related to one of an earlier split, each with the reason.

    A leaking prompt counts as removed: later splits are not compared with it.
    """
    index, leaks, added = PromptIndex(), [], 0
    for prompts in splits:
        found = {
            number: reason
            for number, prompt in enumerate(prompts)
            if (reason := next((why for _, why in index.related(prompt)), None))
        }
        leaks.append(found)
        for number, prompt in enumerate(prompts):
            if number not in found:
                index.add(added + number, prompt)
        added += len(prompts)
    return leaks
