"""The pair browser: search and filter a run's pairs, with the tuned model's reward margins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from django import forms
from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse
from django.views.decorators.http import require_GET

from pairtune.config import SourceConfig
from pairtune.data.inspection import odd_lengths
from pairtune.data.preference import PreferencePair
from pairtune.data.source_reader import SourceReader
from pairtune.errors import BadInput
from pairtune.run.examples import PARTS, Examples, PairIndex
from pairtune.web.run_pages import part_or_page
from pairtune.web.run_view import ShownRun, find_run
from pairtune.web.text import marked_differences

_PAGE = 20


@dataclass(frozen=True)
class ShownPair:
    """One pair of a run.

    Attributes:
        split: train, validation or test.
        tokens: token counts of prompt, chosen and rejected.
        margin: the tuned model's reward margin; None if it was not evaluated on this pair.
        pair: its texts; None if the source no longer has them.
    """

    origin: str
    split: str
    tokens: tuple[int, int, int]
    margin: float | None
    pair: PreferencePair | None

    @property
    def findings(self) -> list[str]:
        """What the model's margin and the data inspection say about this pair."""
        found = []
        if self.margin is not None and self.margin <= 0:
            found.append("model disagrees with the label")
        return found + odd_lengths(*self.tokens[1:])

    @property
    def differences(self) -> tuple[str, str]:
        """Chosen and rejected, with differences marked."""
        return marked_differences(self.pair.chosen, self.pair.rejected) if self.pair else ("", "")

    def has(self, words: list[str]) -> bool:
        """Whether the pair contains all words."""
        if not self.pair:
            return not words
        prompt = " ".join(str(turn["content"]) for turn in self.pair.prompt)
        text = f"{prompt} {self.pair.chosen} {self.pair.rejected} {self.origin}".lower()
        return all(word in text for word in words)


class Filter(forms.Form):
    """The filter form."""

    q = forms.CharField(required=False)
    split = forms.ChoiceField(choices=[(each, each) for each in ("", "train", "validation", "test")], required=False)
    longest = forms.IntegerField(required=False, min_value=1)
    shortest = forms.IntegerField(required=False, min_value=1)
    disagrees = forms.BooleanField(required=False)
    found = forms.BooleanField(required=False)


@require_GET
def pairs(request: HttpRequest, name: str) -> HttpResponse:
    """Show the pairs; htmx requests get the list alone."""
    run, form = find_run(name), Filter(request.GET)
    shown, fault = _pairs_of(run)
    if form.is_valid():
        shown = _filtered(shown, form.cleaned_data)
    page = Paginator(shown, _PAGE).get_page(request.GET.get("page"))
    query = request.GET.copy()
    query.pop("page", None)
    context = {"run": run, "form": form, "pairs": page, "fault": fault, "query": query.urlencode(), "page": "runs"}
    return part_or_page(request, "site/_pairs.html", "site/pairs.html", context)


def _filtered(shown: list[ShownPair], asked: dict[str, Any]) -> list[ShownPair]:
    words = asked["q"].lower().split()
    return [
        each
        for each in shown
        if (not asked["split"] or each.split == asked["split"])
        and (not asked["longest"] or max(each.tokens[1:]) <= asked["longest"])
        and (not asked["shortest"] or min(each.tokens[1:]) >= asked["shortest"])
        and (not asked["disagrees"] or (each.margin is not None and each.margin <= 0))
        and (not asked["found"] or each.findings)
        and (not words or each.has(words))
    ]


def _pairs_of(run: ShownRun) -> tuple[list[ShownPair], str]:
    file = run.paths.pairs
    if not file.is_file():
        return [], "This run has no list of pairs yet."
    scored = [each.stat().st_mtime_ns for each in _scores(run) if each.is_file()]
    try:
        return _read(run.paths.root, file.stat().st_mtime_ns, *scored)
    except (BadInput, KeyError) as error:
        return [], f"The run's pair files are damaged ({error})."


@lru_cache(maxsize=2)  # a run's pairs with their texts may take several hundred MB
def _read(root: Path, *_: int) -> tuple[list[ShownPair], str]:
    run = ShownRun(root)
    texts, fault = _texts(run)
    margins = _margins(run)
    index = PairIndex.read(run.paths.pairs)
    tokens = zip(*(index.tokens(part).tolist() for part in PARTS), strict=True)
    return [
        ShownPair(origin, split, lengths, margins.get(origin), texts.get(origin))
        for origin, split, lengths in zip(index.origins, index.splits, tokens, strict=True)
    ], fault


def _margins(run: ShownRun) -> dict[str, float]:
    """The winner's reward margins on validation and test pairs, by origin."""
    found: dict[str, float] = {}
    for file in _scores(run):
        if file.is_file():
            examples = Examples.read(file)
            found |= dict(zip(examples.origins, examples.metric("rewards/margins").tolist(), strict=True))
    return found


def _scores(run: ShownRun) -> list[Path]:
    """The files of the winner's per-pair results."""
    files = [run.paths.test_examples]
    if run.selection:
        files.append(run.paths.trial(run.selection.winner).examples(run.selection.best_epoch))
    return files


def _texts(run: ShownRun) -> tuple[dict[str, PreferencePair], str]:
    """Read the texts from the sources; runs hold no copies."""
    config = run.config
    if config is None:
        return {}, run.fault
    found: dict[str, PreferencePair] = {}
    fault = ""
    # Drawn splits come from one source, which has an account for each of them.
    splits = {account.source: account.split for account in run.data.sources} if run.data else {}
    for name, split in splits.items():
        try:
            source = next((each for each in config.sources if each.source == name), SourceConfig(source=name))
            reader = SourceReader.open(source, "--data", config.reading, config.row_limit(split))
            for _, pair in reader.parsed():
                if isinstance(pair, PreferencePair):
                    found[pair.origin] = pair
        except BadInput as error:
            fault = f"The texts of {name} can no longer be read: {error}"
    return found, fault
