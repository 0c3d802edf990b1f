"""The choice: the best epoch of the best trial by a recorded rule, and whether the data supports it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pairtune.config import UNPAIRED, Loss, Select
from pairtune.engine.summaries import RULES, score, summarise_examples
from pairtune.errors import RunFailed, plural
from pairtune.files import fill_folder, saved_fingerprint
from pairtune.run.examples import Examples
from pairtune.run.folder import Run
from pairtune.run.metrics import EXAMPLE_METRICS
from pairtune.run.records import (
    AgainstBase,
    Comparison,
    ExampleSummary,
    RankedTrial,
    Selection,
    SweepRecord,
    TrialRecord,
)
from pairtune.statistics import (
    ALPHA,
    Groups,
    Numbers,
    bootstrap_intervals,
    compare_all,
    metric_intervals,
    paired_p_values,
    pairs_needed,
)

_FEW_PAIRS = 30
# Settings that a loss depends on, besides beta.
_IN_THE_LOSS: dict[Loss, set[str]] = {
    "sigmoid": {"label_smoothing"},
    "robust": {"label_smoothing"},
    "exo_pair": {"label_smoothing"},
    "simpo": {"simpo_gamma"},
    "discopop": {"discopop_tau"},
    **{loss: {"desirable_weight", "undesirable_weight"} for loss in UNPAIRED},
}
_CHOSEN_BY = "the winner was chosen for having fewer faults on these prompts, so its count of faults there is too low"


def select_best(
    results: Sequence[TrialRecord],
    records: Mapping[str, Numbers],
    rule: Select,
    wins: Mapping[str, Sequence[float]] | None = None,
    groups: Groups | None = None,
    cases: int | None = None,
) -> Selection:
    """Rank the trials by their best epochs, and test whether the ranking is more than noise.

    Trials that failed or were pruned are not ranked. Of tied trials the earlier one ranks higher; of trials with equal
    scores, the one with the lower loss.

    Args:
        results: the records of all trials.
        records: [validation pairs, EXAMPLE_METRICS] of each ranked trial's best epoch, by name (see `best_examples`).
        rule: the selection rule.
        wins: for the rule fewer_faults, each ranked trial's score against the base model per prompt: 1, a half or 0.
        groups: the group of each validation pair, [pairs]; pairs of one conversation share a group.
        cases: of single answers, the number of those of the rarer kind.

    Returns:
        The choice, without the fingerprint of the weights, which `install_best` adds.
    """
    finished = [result for result in results if result.status == "finished"]
    if wins is None:
        metric, more_is_better = RULES[rule]
        values = {result.trial.name: result.best.metrics()[metric] for result in finished}
    else:
        metric, more_is_better = rule, True
        values = {name: float(np.mean(scores)) for name, scores in wins.items()}
    sign = 1 if more_is_better else -1
    ranked = sorted(
        finished,
        key=lambda result: (sign * values[result.trial.name], score(result.best, rule)),
        reverse=True,
    )
    winner, pairs = ranked[0], len(records[ranked[0].trial.name])
    value = values[winner.trial.name]
    thing = "pair" if cases is None else "answer"
    noun, count = (thing, pairs) if wins is None else ("prompt", len(wins[winner.trial.name]))
    why = (
        f"{winner.trial.name}, epoch {winner.best_epoch}: {'highest' if more_is_better else 'lowest'} {metric} "
        f"({value:.4f}) of {plural(sum(len(result.epochs) for result in ranked), 'evaluation')} of "
        f"{plural(len(ranked), 'trial')} on {plural(count, f'validation {noun}')}"
    )
    if len(ranked) > 1:
        why += f"; runner-up: {ranked[1].trial.name} ({values[ranked[1].trial.name]:.4f})"
    compared_by = metric if _one_scale(ranked, rule) else "eval_rewards/accuracies"
    columns = _columns(ranked, records, compared_by) if wins is None else [wins[each.trial.name] for each in ranked]
    examples = np.stack([np.asarray(column, np.float64) for column in columns], axis=1)
    grouped = groups if wins is None else None  # the groups are those of pairs, not of prompts
    p_values = compare_all(examples, grouped)
    comparisons = _comparisons(ranked, examples, p_values, compared_by, grouped)
    no_two_differ = all(p_value >= ALPHA for p_value in p_values.values())
    return Selection(
        rule=rule,
        metric=metric,
        winner=winner.trial.name,
        best_epoch=winner.best.epoch,
        value=value,
        validation_pairs=pairs,
        why=why,
        verdict=_verdict(winner, comparisons, compared_by, noun, count, no_two_differ=no_two_differ),
        settled=all(entry.differs for entry in comparisons),
        warnings=[*_warnings(ranked, rule, pairs, thing), *([] if wins is None else [_CHOSEN_BY])],
        ranking=[_ranked(result, records[result.trial.name], groups, cases) for result in ranked],
        comparisons=comparisons,
    )


def _columns(ranked: Sequence[TrialRecord], records: Mapping[str, Numbers], metric: str) -> list[Numbers]:
    """One metric of every trial, [pairs] each."""
    column = EXAMPLE_METRICS.index(metric.removeprefix("eval_"))
    return [records[result.trial.name][:, column] for result in ranked]


def best_examples(run: Run, results: Sequence[TrialRecord]) -> dict[str, Examples]:
    """The per-example records of every finished trial's best epoch, from the run folder, by name."""
    return {
        result.name: Examples.read(run.paths.trial(result.name).examples(result.best.epoch))
        for result in results
        if result.status == "finished"
    }


def summarise_best(examples: Mapping[str, Examples]) -> dict[str, ExampleSummary]:
    """The statistics of these records beyond the means of their metrics."""
    return {name: summarise_examples(each) for name, each in examples.items()}


def against_base(records: Numbers, groups: Groups | None = None) -> AgainstBase:
    """Whether tuning improved the model over the base: the test of its mean reward margin against 0."""
    margins = records[:, [EXAMPLE_METRICS.index("rewards/margins")]]
    p_value = float(paired_p_values(margins, groups)[0])
    mean = float(margins.mean())
    return AgainstBase(margin=mean, p=p_value, better=p_value < ALPHA and mean > 0)


def install_best(run: Run, results: Sequence[TrialRecord], selection: Selection) -> None:
    """Copy the winner's weights to the run's `best/`, check that they are the evaluated ones, and record the choice.

    Raises:
        RunFailed: the weights on disk are not those that the winner's best epoch wrote.
    """
    winner = next(result for result in results if result.name == selection.winner)
    trial_best = run.paths.trial(winner.name).best

    def fill(target: Path) -> None:
        shutil.copytree(trial_best, target, dirs_exist_ok=True)

    fill_folder(run.paths.best, fill)
    if saved_fingerprint(run.paths.best) != winner.best_fingerprint:
        raise RunFailed(
            f"{run.paths.best}: the weights are not those of {winner.trial.name}, epoch {winner.best_epoch}, "
            "that were evaluated; another program has changed the run folder"
        )
    run.write(selection.model_copy(update={"best_fingerprint": winner.best_fingerprint}))


def rounding_warnings(sweep: SweepRecord, selection: Selection) -> list[str]:
    """A warning if rounding moves a pair's margin as much as tuning did."""
    rounding, winner = sweep.rounding, selection.ranking[0]
    beta = next(entry.beta for entry in sweep.trials if entry.name == winner.name)
    moved = abs(winner.metrics.margin) / beta
    nats = rounding.from_float32 if rounding else None
    if rounding is None or not nats or nats < moved:
        return []
    return [
        f"rounding in {rounding.dtype} moves a pair's margin by {nats:.2g} nats on this machine, and "
        f"tuning moved it by {moved:.2g} on average: evaluate in float32 (--eval-dtype float32), train in it (--dtype "
        "float32), or train longer on more pairs"
    ]


def _one_scale(results: Sequence[TrialRecord], rule: Select) -> bool:
    """Whether the rule's metric is comparable across trials: margins depend on beta, losses on further settings."""
    if rule in ("accuracy", "fewer_faults"):
        return True
    settings = {"beta"} if rule == "margin" else {"beta", "loss"}
    for result in results if rule == "eval_loss" else ():
        settings |= _IN_THE_LOSS.get(result.trial.loss, set()) | {"sft_weight"}
    return all(len({getattr(result.trial, name) for result in results}) == 1 for name in settings)


def _ranked(result: TrialRecord, records: Numbers, groups: Groups | None, cases: int | None) -> RankedTrial:
    return RankedTrial(
        name=result.name,
        best_epoch=result.best.epoch,
        metrics=result.best,
        intervals=metric_intervals(records, groups, cases),
        against_base=against_base(records, groups),
    )


def _comparisons(
    ranked: Sequence[TrialRecord],
    values: Numbers,
    corrected: Mapping[tuple[int, int], float],
    metric: str,
    groups: Groups | None,
) -> list[Comparison]:
    """The winner against each other trial, pair by pair, corrected for the number of comparisons between all trials."""
    entries = []
    for rank, result in enumerate(ranked[1:], 1):
        difference = values[:, 0] - values[:, rank]
        p_value = corrected[0, rank]
        ((low, high),) = bootstrap_intervals(difference[:, None], groups)
        entries.append(
            Comparison(
                name=result.name,
                metric=metric,
                difference=float(difference.mean()),
                interval=(float(low), float(high)),
                p_corrected=p_value,
                differs=p_value < ALPHA,
                pairs_needed=pairs_needed(difference, len(corrected), groups, settled=p_value < ALPHA),
            )
        )
    return entries


def _verdict(
    winner: TrialRecord, comparisons: Sequence[Comparison], metric: str, noun: str, count: int, *, no_two_differ: bool
) -> str:
    if not comparisons:
        return "there is no other trial to compare it with"
    alike = [entry for entry in comparisons if not entry.differs]
    data = f"{metric} on {plural(count, noun)}"
    if not alike:
        return f"{winner.trial.name} differs from every other trial in {data}"
    needed = alike[0].pairs_needed
    settle = (
        f"about {plural(needed, f'validation {noun}')} would settle it between the first two"
        if needed
        else f"no number of {noun}s would settle it, since their means are equal"
    )
    if no_two_differ:
        return f"no two trials can be told apart by {data}; {settle}"
    names = ", ".join(entry.name for entry in alike)
    return f"{winner.trial.name} cannot be told apart from {names} by {data}; {settle}"


def _warnings(results: Sequence[TrialRecord], rule: Select, validation_pairs: int, thing: str) -> list[str]:
    warnings = []
    if not _one_scale(results, rule):
        by_accuracy = sorted(results, key=lambda result: score(result.best, "accuracy"), reverse=True)
        order = ", ".join(f"{result.trial.name} {result.best.accuracy:.3f}" for result in by_accuracy)
        what = "losses" if rule == "eval_loss" else "margins"
        causes, them = ("beta", "it") if rule == "margin" else ("beta, the loss and its settings", "these")
        warnings.append(
            f"{what} depend on {causes}, so {what} of trials that differ in {them} are not on one scale; ranked by "
            f"accuracy: {order}"
        )
    if validation_pairs < _FEW_PAIRS:
        few = plural(validation_pairs, f"validation {thing}")
        warnings.append(f"only {few}: too few to tell trials apart; provide {_FEW_PAIRS} or more")
    return warnings
