"""What a run's records come to: a sentence, a few big numbers, and where tuning hurt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pairtune.config import source_name
from pairtune.errors import BadInput, plural
from pairtune.evaluation.winrate import FAULTS, faults_of
from pairtune.report.phrases import p_value, short
from pairtune.report.report_data import before_and_after
from pairtune.run.examples import Examples
from pairtune.run.folder import Run
from pairtune.run.records import LEVELS, Answer, Generations, RankedTrial, RegressedPair, Selection, TestRecord
from pairtune.statistics import ALPHA


@dataclass(frozen=True)
class BigNumber:
    """A number to be seen first.

    Attributes:
        label: what it is.
        value: the number.
        interval: its 95 % interval, or what it is compared with.
        meaning: how to read it.
    """

    label: str
    value: str
    interval: str
    meaning: str


@dataclass(frozen=True)
class Verdict:
    """The outcome of a run.

    Attributes:
        sentence: whether tuning helped, and whether the winner can be told from the other trials.
        numbers: the numbers behind it.
        hurt: where to look for what got worse, in a sentence.
    """

    sentence: str
    numbers: list[BigNumber]
    hurt: str


@dataclass(frozen=True)
class WorsePrompt:
    """A held-out prompt whose tuned answer has faults of form that the base's lacks."""

    prompt: str
    base: Answer
    tuned: Answer
    faults: tuple[str, ...]


@dataclass(frozen=True)
class FaultCount:
    """How many answers of base and winner have one kind of fault."""

    name: str
    base: int
    tuned: int


def verdict(run: Run) -> Verdict | None:
    """The outcome of a run; None if nothing has been selected yet."""
    selection = run.selection
    if selection is None:
        return None
    return Verdict(
        sentence=f"{_better(run, selection)}{_told_apart(run, selection)}.",
        numbers=list(_numbers(run, selection)),
        hurt=_hurt(run),
    )


def learned(run: Run) -> str:
    """What a model has learned, in one sentence: from which pairs, and what they and its answers say."""
    selection, data = run.selection, run.data
    if selection is None or data is None or "train" not in data.splits:
        return ""
    longer = selection.examples[selection.winner].longer_wins if selection.winner in selection.examples else None
    names = ", ".join(dict.fromkeys(source_name(source.source) for source in data.sources if source.split == "train"))
    base = run.environment.base if run.environment else None
    of = source_name(base.hub_id or base.name).rpartition("/")[2] if base else "A model"
    bias = ""
    if longer and longer.value is not None and not longer.interval[0] <= 0.5 <= longer.interval[1]:
        which, share = ("longer", longer.value) if longer.value > 0.5 else ("shorter", 1 - longer.value)
        compared = selection.measured.compared if selection.measured else "pairs"
        bias = f", where the {which} answer is preferred in {share:.0%} of the held-out {compared}"
    said = f"{of}, tuned on {plural(data.splits['train'].pairs, selection.noun)} of {names}{bias}"
    if lengths := _lengths(run.generations, selection.winner):
        before, after = lengths
        said += f": its answers now have {after:.0f} tokens instead of {before:.0f} (medians)"
    return f"{said}. {_better(run, selection)}{_audited(run)}."


def _audited(run: Run) -> str:
    """What the audit of the run came to, as the end of a sentence."""
    if run.audit is None:
        return ""
    counts = Counter(finding.level for finding in run.audit.findings)
    if counts["error"]:
        return f", but the audit found {plural(counts['error'], 'error')}"
    return f"; the audit has {plural(counts['warning'], 'warning')}" if counts["warning"] else "; the audit is clean"


def worse_prompts(generations: Generations | None, winner: str) -> list[WorsePrompt]:
    """The prompts whose tuned answer has a fault of form that the base's answer to it lacks."""
    found = []
    for each in before_and_after(generations, winner):
        known = faults_of(each.prompt, each.base)
        if new := [fault for fault in faults_of(each.prompt, each.tuned) if fault not in known]:
            found.append(WorsePrompt(each.prompt, each.base, each.tuned, tuple(new)))
    return found


def fault_counts(generations: Generations | None, winner: str) -> list[FaultCount]:
    """How often each fault of form occurs before and after tuning."""
    of_base: Counter[str] = Counter()
    of_tuned: Counter[str] = Counter()
    for each in before_and_after(generations, winner):
        of_base.update(faults_of(each.prompt, each.base))
        of_tuned.update(faults_of(each.prompt, each.tuned))
    return [FaultCount(name, of_base[name], of_tuned[name]) for name in FAULTS]


def regressed_pairs(run: Run) -> list[RegressedPair]:
    """The held-out pairs on which tuning hurt most, with their texts."""
    return run.regressions.pairs if run.regressions else []


def disagreements(run: Run) -> tuple[str, int, int] | None:
    """On how many held-out pairs the winner moved towards the rejected answer: split, number, and of how many."""
    if found := run.regressions:
        return found.split, found.count, found.of
    selection = run.selection
    if selection is None:
        return None
    tested = run.paths.test_examples.is_file()
    evaluated = run.paths.trial(selection.winner).examples(selection.best_epoch)
    try:
        margins = Examples.read(run.paths.test_examples if tested else evaluated).metric("rewards/margins")
    except (BadInput, KeyError):
        return None
    return ("test" if tested else "validation"), int((margins < 0).sum()), len(margins)


def _measured(run: Run, selection: Selection) -> tuple[TestRecord | RankedTrial, int]:
    """The winner's evaluation that counts, on the test pairs if there are some, and its number of pairs."""
    if run.test:
        return run.test, run.test.pairs
    return selection.ranking[0], selection.validation_pairs


def _better(run: Run, selection: Selection) -> str:
    measured, count = _measured(run, selection)
    accuracy, against = measured.metrics.accuracy, measured.against_base
    pairs = f"{plural(count, selection.noun)} that {'it never saw' if run.test else 'chose it'}"
    summary = run.test.examples if run.test else selection.measured
    if summary and summary.accuracy_of != "pairs":
        pairs = f"the {summary.compared}, among {pairs}"
    if against.better and accuracy > 0.5:
        return f"Better than its base on {accuracy:.0%} of {pairs}"
    if against.better:
        return f"Better than its base on average, though only on {accuracy:.0%} of {pairs}"
    if against.margin < 0 and against.p < ALPHA:
        return f"Worse than its base: {1 - accuracy:.0%} of {pairs} speak against it"
    return f"Not shown to be better than its base: {accuracy:.0%} of {pairs} speak for it, which may be chance"


def _told_apart(run: Run, selection: Selection) -> str:
    if len(selection.ranking) < 2:
        return ""
    if selection.settled:
        return "; it differs from every other trial"
    open_ones = [each for each in selection.comparisons if not each.differs]
    first = open_ones[0]
    said = f"; {_both(run, selection.winner, first.name)} cannot be told apart"
    if first.pairs_needed:
        noun = "prompts" if selection.rule == "fewer_faults" else f"{selection.noun}s"
        said += f": that would take about {first.pairs_needed:,} {noun}"
    return said


def _both(run: Run, one: str, other: str) -> str:
    """Two trials by what sets them apart: `learning rates 0.0003 and 0.0001`."""
    a, b = run.trial(one).config, run.trial(other).config
    if a is None or b is None:
        return f"{one} and {other}"
    names = [name for name in ("learning_rate", "beta", *a.varied) if getattr(a, name) != getattr(b, name)]
    if len(names) == 1:
        (name,) = names
        return f"{name.replace('_', ' ')}s {short(getattr(a, name))} and {short(getattr(b, name))}"
    return f"{run.trial(one).label} and {run.trial(other).label}"


def _numbers(run: Run, selection: Selection) -> list[BigNumber]:
    measured, pairs = _measured(run, selection)
    noun = selection.noun
    of = f"test {noun}s, evaluated once" if run.test else f"validation {noun}s, which also chose the winner"
    summary = run.test.examples if run.test else selection.measured
    share = f"share of {pairs:,} {of}, on which tuning moved the model towards the preferred answer; chance is 50%"
    if summary and summary.accuracy_of != "pairs":
        share = (
            f"share of the {summary.compared} in which tuning favours the desirable one, among {pairs:,} {of}; chance "
            "is 50%"
        )
    accuracy, (low, high) = measured.metrics.accuracy, measured.intervals["eval_rewards/accuracies"]
    margin, (least, most) = measured.metrics.margin, measured.intervals["eval_rewards/margins"]
    found = [
        BigNumber(
            "Preference accuracy",
            f"{accuracy:.0%}",
            f"{low:.0%} to {high:.0%}",
            share,
        ),
        BigNumber(
            "Reward margin",
            f"{margin:.2f}",
            f"{least:.2f} to {most:.2f}",
            f"mean over the same {noun}s; the base's is 0 ({p_value(measured.against_base.p)})",
        ),
    ]
    if lengths := _lengths(run.generations, selection.winner):
        before, after = lengths
        prompts = len(run.generations.prompts) if run.generations else 0
        found.append(
            BigNumber(
                "Answer length",
                f"{after:.0f}",
                f"before {before:.0f}",
                f"median tokens of the answers to {plural(prompts, 'held-out prompt')}",
            )
        )
    if audit := run.audit:
        counts = Counter(finding.level for finding in audit.findings)
        worst = next((level for level in LEVELS if counts[level]), None)
        rest = ", ".join(plural(counts[level], level) for level in LEVELS if counts[level] and level != worst)
        found.append(
            BigNumber(
                "Audit",
                plural(counts[worst], worst) if worst else "clean",
                rest or ("nothing else" if worst else f"{len(audit.passed)} rules passed"),
                "what the numbers themselves reveal about how they came about",
            )
        )
    return found


def _lengths(generations: Generations | None, winner: str) -> tuple[float, float] | None:
    if generations is None or not {"base", winner} <= generations.models.keys():
        return None
    return generations.models["base"].summary.median_tokens, generations.models[winner].summary.median_tokens


def _hurt(run: Run) -> str:
    selection = run.selection
    said = []
    if counted := disagreements(run):
        split, count, of = counted
        noun = selection.noun if selection else "pair"
        said.append(f"{count:,} of {plural(of, f'{split} {noun}')}")
    prompts: Sequence[WorsePrompt] = worse_prompts(run.generations, selection.winner) if selection else ()
    if run.generations and selection:
        said.append(f"{len(prompts)} of {plural(len(run.generations.prompts), 'answer')}")
    return " and ".join(said)
