"""The pair browser: search, filter and sort a run's pairs by what a trial makes of them, and mark wrong ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from django import forms
from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_POST

from pairtune.config import SourceConfig
from pairtune.data.edits import Edit, pair_hash
from pairtune.data.inspection import odd_lengths
from pairtune.data.preference import PreferencePair
from pairtune.data.source_reader import SourceReader
from pairtune.data.splits import Prompt, group_prompts
from pairtune.errors import BadInput
from pairtune.run.examples import PARTS, Examples, PairIndex
from pairtune.web.pair_edits import Key, by_pair, edits_of, key_of, mark_pair
from pairtune.web.run_pages import part_or_page
from pairtune.web.run_view import ShownRun, find_run
from pairtune.web.text import marked_differences, plain

_PAGE = 20


@dataclass(frozen=True)
class Judged:
    """What a model makes of one pair.

    Attributes:
        margin: the reward margin: beta times the change against the base.
        change: the change of the log-prob per token against the base, chosen minus rejected, in nats.
        surprise: the chosen answer's negative log-prob per token, in nats.
    """

    margin: float
    change: float
    surprise: float


@dataclass(frozen=True)
class ShownPair:
    """One pair of a run.

    Attributes:
        source: the source that its texts were read from; empty if they are not available.
        split: train, validation or test.
        tokens: token counts of prompt, chosen and rejected.
        judged: what the model makes of it; None if it was not evaluated on this pair.
        pair: its texts; None if the source no longer has them.
        group: number shared by pairs whose prompts are related.
    """

    origin: str
    source: str
    split: str
    tokens: tuple[int, int, int]
    judged: Judged | None
    pair: PreferencePair | None
    group: int

    @property
    def findings(self) -> list[str]:
        """What the model's margin and the data inspection say about this pair."""
        found = []
        if self.judged and self.judged.margin <= 0:
            found.append("model disagrees with the label")
        return found + odd_lengths(*self.answer_tokens)

    @property
    def answer_tokens(self) -> tuple[int, int]:
        """Token counts of the answers; of a single one twice."""
        _, chosen, rejected = self.tokens
        return chosen or rejected, rejected or chosen

    @property
    def differences(self) -> tuple[str, str]:
        """Rejected and chosen, with what chosen lacks and adds marked."""
        if self.pair is None:
            return "", ""
        if self.pair.single:
            return plain(self.pair.rejected), plain(self.pair.chosen)
        return marked_differences(self.pair.rejected, self.pair.chosen)

    @property
    def hash(self) -> str:
        """A hash of its texts."""
        return pair_hash(self.pair) if self.pair else ""

    def has(self, words: list[str]) -> bool:
        """Whether the pair contains all words."""
        if not self.pair:
            return not words
        prompt = " ".join(str(turn["content"]) for turn in self.pair.prompt)
        text = f"{prompt} {self.pair.chosen} {self.pair.rejected} {self.origin}".lower()
        return all(word in text for word in words)


@dataclass(frozen=True)
class Order:
    """A way of sorting pairs: what it is called, and the key; pairs that were not evaluated come last."""

    name: str
    key: Callable[[Judged], float]


ORDERS = {
    "margin": Order("lowest reward margin first", lambda judged: judged.margin),
    "change": Order("smallest change against the base first", lambda judged: judged.change),
    "surprise": Order("most surprising chosen answer first", lambda judged: -judged.surprise),
}


class Filter(forms.Form):
    """The filter form."""

    q = forms.CharField(required=False)
    split = forms.CharField(required=False)
    order = forms.ChoiceField(choices=[(each, each) for each in ("", *ORDERS)], required=False)
    longest = forms.IntegerField(required=False, min_value=1)
    shortest = forms.IntegerField(required=False, min_value=1)
    disagrees = forms.BooleanField(required=False)
    found = forms.BooleanField(required=False)
    marked = forms.BooleanField(required=False)
    near = forms.CharField(required=False)


@require_GET
def pairs(request: HttpRequest, name: str) -> HttpResponse:
    """Show the pairs; htmx requests get the list alone."""
    run, form = find_run(name), Filter(request.GET)
    trial, epoch = _evaluation(run, request.GET)
    every, fault = _pairs_of(run, trial, epoch)
    edits: dict[Key, Edit] = {}
    try:
        for source in {each.source for each in every if each.source}:
            edits |= by_pair(edits_of(source))
    except BadInput as error:
        fault = fault or str(error)
    shown = every
    if form.is_valid():
        shown = _filtered(every, form.cleaned_data, edits)
        if order := ORDERS.get(form.cleaned_data["order"]):
            shown = sorted(shown, key=lambda each: (each.judged is None, order.key(each.judged) if each.judged else 0))
    page = Paginator(shown, _PAGE).get_page(request.GET.get("page"))
    page.object_list = [(each, _action(each, edits)) for each in page]
    query = request.GET.copy()
    query.pop("page", None)
    context = {
        "run": run,
        "form": form,
        "pairs": page,
        "fault": fault,
        "query": query.urlencode(),
        "splits": dict(Counter(each.split for each in every)),
        "orders": {key: order.name for key, order in ORDERS.items()},
        "trial": trial,
        "epoch": epoch,
        "marked": len(edits),
        "page": "runs",
    }
    return part_or_page(request, "site/_pairs.html", "site/pairs.html", context)


def _action(each: ShownPair, edits: dict[Key, Edit]) -> str:
    """How a pair was marked; empty if it was not."""
    edit = edits.get(key_of(each.pair)) if each.pair else None
    return edit.action if edit else ""


def _evaluation(run: ShownRun, asked: Mapping[str, str]) -> tuple[str, int | None]:
    """The trial and epoch that the pairs are shown with: those asked for, or the winner's best."""
    names = {each.name for each in run.trials}
    trial, epoch = asked.get("trial", ""), asked.get("epoch", "")
    if trial in names and epoch.isdecimal():
        return trial, int(epoch)
    return (run.selection.winner, run.selection.best_epoch) if run.selection else ("", None)


def _filtered(every: list[ShownPair], asked: dict[str, Any], edits: dict[Key, Edit]) -> list[ShownPair]:
    words = asked["q"].lower().split()
    near = next((each.group for each in every if each.origin == asked["near"]), None)
    return [
        each
        for each in every
        if (not asked["split"] or each.split == asked["split"])
        and (not asked["longest"] or max(each.answer_tokens) <= asked["longest"])
        and (not asked["shortest"] or min(each.answer_tokens) >= asked["shortest"])
        and (not asked["disagrees"] or (each.judged is not None and each.judged.margin <= 0))
        and (not asked["found"] or each.findings)
        and (not asked["marked"] or (each.pair and key_of(each.pair) in edits))
        and (near is None or each.group == near)
        and (not words or each.has(words))
    ]


def _pairs_of(run: ShownRun, trial: str, epoch: int | None) -> tuple[list[ShownPair], str]:
    file = run.paths.pairs
    if not file.is_file():
        return [], "This run has no list of pairs yet."
    files = _scores(run, trial, epoch)
    scored = [each.stat().st_mtime_ns for each in files if each.is_file()]
    try:
        return _read(run.paths.root, trial, epoch, file.stat().st_mtime_ns, *scored)
    except (BadInput, KeyError, OSError) as error:
        return [], f"The run's pair files are damaged ({error})."


@lru_cache(maxsize=4)  # a run's pairs with their texts may take several hundred MB
def _read(root: Path, trial: str, epoch: int | None, *_: int) -> tuple[list[ShownPair], str]:
    run = ShownRun(root)
    texts, fault = _texts(root, (root / "data.json").stat().st_mtime_ns)
    judged = _judged(run, trial, epoch)
    index = PairIndex.read(run.paths.pairs)
    tokens = zip(*(index.tokens(part).tolist() for part in PARTS), strict=True)
    rows = list(zip(index.origins, index.splits, tokens, strict=True))
    groups = _groups([texts.get(origin, ("", None))[1] for origin, _, _ in rows])
    return [
        ShownPair(origin, source, split, lengths, judged.get(origin), pair, group)
        for (origin, split, lengths), group in zip(rows, groups, strict=True)
        for source, pair in [texts.get(origin, ("", None))]
    ], fault


def _groups(found: list[PreferencePair | None]) -> list[int]:
    """The group of each pair by its prompt, as splits are drawn; pairs without texts are alone."""
    known = [pair for pair in found if pair]
    numbers = iter(group_prompts([Prompt.of(pair.prompt) for pair in known]) if known else [])
    return [next(numbers) if pair else -1 - at for at, pair in enumerate(found)]


def _judged(run: ShownRun, trial: str, epoch: int | None) -> dict[str, Judged]:
    """What the model of an evaluation makes of its pairs, by origin."""
    found: dict[str, Judged] = {}
    for file in _scores(run, trial, epoch):
        if not file.is_file():
            continue
        examples = Examples.read(file)
        surprise = -examples.metric("logps/chosen") / examples.tokens("chosen").clip(1)
        if examples.unpaired:
            undesirable = -examples.metric("logps/rejected") / examples.tokens("rejected").clip(1)
            surprise = np.where(np.isnan(surprise), undesirable, surprise)
        columns = (examples.metric("rewards/margins"), examples.metric("logps/margins_per_token"), surprise)
        values = zip(*(column.tolist() for column in columns), strict=True)
        found |= {origin: Judged(*three) for origin, three in zip(examples.origins, values, strict=True)}
    return found


def _scores(run: ShownRun, trial: str, epoch: int | None) -> list[Path]:
    """The files of a model's per-pair results; the test pairs were seen by the winner's best epoch only."""
    if epoch is None:
        return []
    files = [run.paths.trial(trial).examples(epoch)]
    if run.selection and (trial, epoch) == (run.selection.winner, run.selection.best_epoch):
        files.append(run.paths.test_examples)
    return files


@lru_cache(maxsize=2)
def _texts(root: Path, _: int) -> tuple[dict[str, tuple[str, PreferencePair]], str]:
    """Read the texts from the sources, by origin, each with its source; runs hold no copies."""
    run = ShownRun(root)
    config = run.config
    if config is None:
        return {}, run.fault
    found: dict[str, tuple[str, PreferencePair]] = {}
    fault = ""
    # Splits that were drawn from one source have an account each; all of it was read, as far as training may.
    splits = {account.source: account.split for account in reversed(run.data.sources)} if run.data else {}
    for name, split in splits.items():
        try:
            source = next((each for each in config.sources if each.source == name), SourceConfig(source=name))
            reader = SourceReader.open(source, "--data", config.reading, config.row_limit(split))
            reader.edits = None  # pairs as they are in the source, which marks are about
            for _row, pair in reader.parsed():
                if isinstance(pair, PreferencePair):
                    found[pair.origin] = name, pair
        except BadInput as error:
            fault = f"The texts of {name} can no longer be read: {error}"
    return found, fault


@require_POST
def mark(request: HttpRequest, name: str) -> HttpResponse:
    """Mark a pair as wrong (`drop`, or `swap` its answers), or take the mark away (`keep`)."""
    run = find_run(name)
    origin, action = request.POST.get("origin", ""), request.POST.get("action", "")
    trial, epoch = _evaluation(run, request.POST)
    every, _ = _pairs_of(run, trial, epoch)
    shown = next((each for each in every if each.origin == origin and each.pair), None)
    if shown and shown.pair and action in ("drop", "swap", "keep"):
        try:
            mark_pair(shown.source, shown.pair, action)
        except BadInput as error:
            return HttpResponseBadRequest(str(error), content_type="text/plain; charset=utf-8")
        if request.htmx:
            marked = "" if action == "keep" else action
            context = {"each": shown, "action": marked, "run": run, "trial": trial, "epoch": epoch}
            return render(request, "site/_pair.html", context)
    return redirect(reverse("pairs", args=(name,)))
