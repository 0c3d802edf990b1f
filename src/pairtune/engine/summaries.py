"""From per-example records to the statistics that trials are judged by: means, intervals, scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pairtune.config import Select
from pairtune.data.table import PairTable
from pairtune.run.examples import ExampleRecord, Examples
from pairtune.run.metrics import EXAMPLE_METRICS, KL, EvaluationMetrics, evaluation_name
from pairtune.run.records import ExampleSummary, Share
from pairtune.statistics import (
    Groups,
    Numbers,
    bootstrap_intervals,
    longer_wins,
    share_of,
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


def mean_metrics(records: Sequence[ExampleRecord]) -> dict[str, float]:
    """Means over examples, with TRL's names of evaluation metrics: `eval_loss`, `eval_rewards/chosen`, …"""
    means = {evaluation_name(name): math.fsum(row[name] for row in records) / len(records) for name in EXAMPLE_METRICS}
    if known := [row[KL] for row in records if row.get(KL) is not None]:
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
    """An evaluation's per-example records, in the order of the pairs, with the pairs' origins, groups and lengths."""
    return Examples.of(pairs.columns("origin")["origin"], pairs.groups, pairs.lengths(), records)


def summarise_examples(examples: Examples) -> ExampleSummary:
    """An evaluation's statistics beyond the means of its metrics, with 95 % intervals."""
    groups = examples.groups
    chosen, rejected = examples.tokens("chosen"), examples.tokens("rejected")
    right = examples.metric("rewards/accuracies")
    return ExampleSummary(
        longer_wins=longer_wins(chosen, rejected, groups),
        accuracy_longer_chosen=_share_where(chosen > rejected, right, groups),
        accuracy_shorter_chosen=_share_where(chosen < rejected, right, groups),
        kl=_divergence(examples.metric(KL), groups) if examples.has_kl else None,
    )


def _divergence(kl: Numbers, groups: Groups | None) -> Share:
    known = ~np.isnan(kl)
    ((low, high),) = bootstrap_intervals(kl[known][:, None], None if groups is None else groups[known])
    return Share(value=float(kl[known].mean()), interval=(float(low), float(high)), pairs=int(known.sum()))


def _share_where(where: NDArray[np.bool_], right: Numbers, groups: Groups | None) -> Share:
    return share_of(right[where], None if groups is None else groups[where])
