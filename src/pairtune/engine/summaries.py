"""From per-example records to the statistics that trials are judged by: means, intervals, scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pairtune.config import Select
from pairtune.data.table import PairTable
from pairtune.run.examples import ExampleRecord, Examples
from pairtune.run.metrics import EXAMPLE_METRICS, KL, KL_ESTIMATE, EvaluationMetrics, evaluation_name
from pairtune.run.records import AccuracyOf, ExampleSummary, Share
from pairtune.statistics import (
    Groups,
    Numbers,
    bootstrap_intervals,
    longer_wins,
    share_of,
    within_groups,
)

# The metric of each selection rule, and whether higher is better.
RULES: dict[Select, tuple[str, bool]] = {
    "eval_loss": ("eval_loss", False),
    "accuracy": ("eval_rewards/accuracies", True),
    "margin": ("eval_rewards/margins", True),
    "fewer_faults": ("eval_loss", False),  # ranks a trial's epochs; the trials themselves are ranked by their answers
}


class TrialFailed(Exception):
    """A trial cannot continue, for example because its loss is NaN; the others can. The message is the diagnosis."""


def batch_means(records: Sequence[ExampleRecord], *, unpaired: bool) -> dict[str, float]:
    """The metrics of a training batch: means over its pairs.

    For single answers, as in TRL: means over the answers that a metric is defined for, their difference where there are
    both kinds, and no accuracy.
    """
    if not unpaired:
        return {name: math.fsum(record[name] for record in records) / len(records) for name in records[0]}
    means = {}
    for name in EXAMPLE_METRICS:
        known = [record[name] for record in records if record[name] is not None]
        if known and "margins" not in name:
            means[name] = math.fsum(known) / len(known)
    means |= estimate_in(records)
    if {"rewards/chosen", "rewards/rejected"} <= means.keys():
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


def estimate_in(records: Sequence[ExampleRecord]) -> dict[str, float]:
    """KTO's KL estimate that single answers were scored with, if they were."""
    return {KL_ESTIMATE: records[0][KL_ESTIMATE]} if KL_ESTIMATE in records[0] else {}


def mean_metrics(examples: Examples) -> dict[str, float]:
    """Means over examples, with TRL's names of evaluation metrics: `eval_loss`, `eval_rewards/chosen`, …"""
    columns = zip(EXAMPLE_METRICS, examples.metrics.T, strict=True)
    means = {evaluation_name(name): math.fsum(values) / len(values) for name, values in columns}
    if examples.has_kl:
        kl = examples.metric(KL)
        known = kl[~np.isnan(kl)]
        means[evaluation_name(KL)] = math.fsum(known) / len(known)
    return means


def score(metrics: EvaluationMetrics, rule: Select) -> float:
    """The score of an evaluation under a selection rule; higher is better."""
    value = {
        "eval_loss": -metrics.eval_loss,
        "accuracy": metrics.accuracy,
        "margin": metrics.margin,
        "fewer_faults": -metrics.eval_loss,
    }
    return value[rule]


def examples_of(pairs: PairTable, records: Sequence[ExampleRecord]) -> Examples:
    """An evaluation's per-example records, in the order of the pairs, with the pairs' origins, groups and lengths.

    Single answers get their accuracies: the share of the answers of the other kind that the model puts on the right
    side of them, among the answers to the same prompt if at least half of the answers have such company, else among all
    (the area under the ROC curve).
    """
    accuracy: AccuracyOf = "pairs"
    if pairs.unpaired:
        rewards = np.array([_reward(record) for record in records])
        accuracies = within_groups(rewards, pairs.desirable, pairs.same_prompt)
        accuracy = "prompts" if np.isfinite(accuracies).mean() >= 0.5 else "auc"
        if accuracy == "auc":
            accuracies = within_groups(rewards, pairs.desirable, np.zeros(len(pairs), np.int64))
        known = [None if math.isnan(value) else value for value in accuracies.tolist()]
        records = [
            {**record, "rewards/accuracies": value}  # type: ignore[dict-item]
            for record, value in zip(records, known, strict=True)
        ]
    return Examples.of(pairs.columns("origin")["origin"], pairs.groups, pairs.lengths(), records, accuracy)


def _reward(record: Mapping[str, float | None]) -> float:
    found = record["rewards/chosen"] if record["rewards/rejected"] is None else record["rewards/rejected"]
    return math.nan if found is None else found


def summarise_examples(examples: Examples) -> ExampleSummary:
    """An evaluation's statistics beyond the means of its metrics, with 95 % intervals."""
    groups = examples.groups
    chosen, rejected = examples.tokens("chosen"), examples.tokens("rejected")
    kl = _divergence(examples.metric(KL), groups) if examples.has_kl else None
    if examples.unpaired:
        nothing = share_of(np.zeros(0))
        return ExampleSummary(
            longer_wins=longer_wins(chosen, rejected, groups),
            accuracy_longer_chosen=nothing,
            accuracy_shorter_chosen=nothing,
            accuracy_of=examples.accuracy_of,
            kl=kl,
        )
    right = examples.metric("rewards/accuracies")
    return ExampleSummary(
        longer_wins=longer_wins(chosen, rejected, groups),
        accuracy_longer_chosen=_share_where(chosen > rejected, right, groups),
        accuracy_shorter_chosen=_share_where(chosen < rejected, right, groups),
        kl=kl,
    )


def _divergence(kl: Numbers, groups: Groups | None) -> Share:
    known = ~np.isnan(kl)
    ((low, high),) = bootstrap_intervals(kl[known][:, None], None if groups is None else groups[known])
    return Share(value=float(kl[known].mean()), interval=(float(low), float(high)), pairs=int(known.sum()))


def _share_where(where: NDArray[np.bool_], right: Numbers, groups: Groups | None) -> Share:
    return share_of(right[where], None if groups is None else groups[where])
