"""Rounds: what a run goes back to, how each round fares, and which of them answers when nobody has chosen a model."""

from __future__ import annotations

from dataclasses import dataclass

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_POST

from pairtune.config import source_name
from pairtune.run.folder import Run
from pairtune.run.records import Parent
from pairtune.votes.standings import Standing
from pairtune.web import ballots
from pairtune.web.models import Answering
from pairtune.web.run_view import ShownRun, find_run


@dataclass(frozen=True)
class Round:
    """One round of a lineage.

    Attributes:
        name: of the model.
        run: its run, if it is still here with the same weights; else empty.
        data: what it was tuned on.
        accuracy: on its held-out pairs, with the interval; None if unknown.
        margin: the same of the reward margin.
        standing: in the arena; None if nobody has voted on it.
    """

    name: str
    run: str = ""
    data: str = ""
    accuracy: str = ""
    margin: str = ""
    standing: Standing | None = None


def rounds_of(run: Run) -> list[Round]:
    """The base, every round before a run, and the run itself; empty for a first round."""
    lineage = run.lineage
    if lineage is None:
        return []
    found = ballots.current_standings()
    standings = {each.weights.rpartition("+")[2]: each for each in found.models} if found else {}
    base = next((each for each in standings.values() if each.model == lineage.base), None)
    rounds = [Round(source_name(lineage.base), standing=base)]
    rounds += [_of_parent(parent, standings.get(parent.weights)) for parent in reversed(lineage.parents)]
    data = ", ".join(source_name(each.source) for each in run.config.data) if run.config else ""
    own = standings.get(run.selection.best_fingerprint) if run.selection else None
    return [*rounds, Round(run.name, run.name, data, *_measured(run), own)]


def _of_parent(parent: Parent, standing: Standing | None) -> Round:
    """A round before; its numbers are shown if its run is here and still has the same weights."""
    name, _, trial = parent.name.partition("/")
    run = Run.open(settings.PAIRTUNE_RUNS / name)
    record = run.trial_record(trial or (run.selection.winner if run.selection else ""))
    data = ", ".join(parent.data)
    if record is None or record.best_fingerprint != parent.weights:
        return Round(parent.name, data=data, standing=standing)
    return Round(parent.name, name, data, *_measured(run), standing)


def _measured(run: Run) -> tuple[str, str]:
    """Accuracy and margin on held-out pairs, each with its interval."""
    measured = run.test or (run.selection.ranking[0] if run.selection else None)
    if measured is None:
        return "", ""
    return measured.with_interval("eval_rewards/accuracies"), measured.with_interval("eval_rewards/margins")


def answering() -> tuple[str, str]:
    """The model that answers when nobody has chosen one, and the one before it; empty: the one tuned last."""
    last = list(Answering.objects.order_by("-pk").values_list("model", flat=True)[:2])
    return last[0] if last else "", last[1] if len(last) > 1 else ""


@require_POST
def answer_with(request: HttpRequest, name: str) -> HttpResponse:
    """Make a run the one that answers."""
    shown: ShownRun = find_run(name)
    if shown.state == "finished" and answering()[0] != name:
        Answering.objects.create(model=name)
    return redirect("run", name)


@require_POST
def answer_as_before(request: HttpRequest) -> HttpResponse:
    """Go back to the model that answered before."""
    now, before = answering()
    if now:
        Answering.objects.create(model=before)
    back = request.POST.get("run", "")
    return redirect("run", find_run(back).name) if back else redirect("chat")
