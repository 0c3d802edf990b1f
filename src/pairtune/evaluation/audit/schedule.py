"""Rules about the learning rate: what was logged, against what schedules do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from pairtune.evaluation.audit.evidence import Evidence, TrialLog
from pairtune.evaluation.audit.rule import Hit, Rule

# Rows needed to judge a schedule; a share of zero rates that matters; how far a row may stand out from its neighbours;
# and by which share a rate has to rise, how often in a row, to rise again.
_ROWS, _ZERO_SHARE, _STANDS_OUT, _RISES, _IN_A_ROW = 4, 0.1, 3.0, 1.001, 2


def _rates(trial: TrialLog) -> list[tuple[float, float]]:
    """Steps and their learning rates."""
    rows = [(row.get("step", math.nan), row.get("learning_rate", math.nan)) for row in trial.steps]
    return [(step, rate) for step, rate in rows if math.isfinite(rate)]


def _zero_rates(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        rates = _rates(trial)
        if _no_rates(trial, evidence):
            continue
        inner = rates[1:-1]  # a warm-up may begin at 0, and a schedule may end there
        zero = [step for step, rate in inner if rate == 0]
        if len(rates) >= _ROWS and len(zero) >= max(2, _ZERO_SHARE * len(rates)):
            first = f", first at step {zero[0]:g}" if math.isfinite(zero[0]) else ""
            yield Hit(
                "error", (trial.name,), f"the learning rate is 0 in {len(zero)} of {len(rates)} logged rows{first}"
            )


def _no_schedule(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        rates = _rates(trial)
        if _no_rates(trial, evidence):
            continue
        # One row that stands out is wrong; where several do, it is a schedule that goes up and down.
        if len(outliers := _standing_out(rates)) == 1:
            (alone,) = outliers
            yield Hit("error", (trial.name,), alone)
        elif again := _rises_again(rates):
            # Restarts that are logged at long intervals can look like this.
            yield Hit("warning", (trial.name,), again)


def _standing_out(rates: Sequence[tuple[float, float]]) -> list[str]:
    """Rows whose rate is several times that of both neighbours, or a fraction of it."""
    found = []
    for (_, before), (step, rate), (_, after) in zip(rates, rates[1:], rates[2:], strict=False):
        if not before or not after or max(before, after) > _STANDS_OUT * min(before, after):
            continue  # a jump from one level to another, such as a restart
        factors = rate / before, rate / after
        if min(factors) > _STANDS_OUT or max(factors) < 1 / _STANDS_OUT:
            found.append(
                f"the learning rate is {rate:.3g} at step {step:g}, but {before:.3g} before and {after:.3g} after it"
            )
    return found


def _rises_again(rates: Sequence[tuple[float, float]]) -> str:
    """Rates that rise row after row once they have fallen; a restart rises once, from one row to the next."""
    fallen, risen, start = False, 0, 0.0
    for (_, before), (step, rate) in pairwise(rates):
        if rate > before * _RISES and before > 0:
            risen = risen + 1 if fallen else 0
            start = start or step
            if risen >= _IN_A_ROW:
                return (
                    f"the learning rate falls, and from step {start:g} on rises again, to {rate:.3g} at step {step:g}"
                )
        else:
            fallen, risen, start = fallen or rate < before / _RISES, 0, 0.0
    return ""


def _no_rates(trial: TrialLog, evidence: Evidence) -> str:
    if trial.off("learning_rate") and any(rate <= 2 * trial.off("learning_rate") for _, rate in _rates(trial)):
        return "learning rates with more decimals"
    return "" if len(_rates(trial)) >= _ROWS else f"learning rates of {_ROWS} rows"


RULES = (
    Rule(
        "learning-rate-zero",
        "The learning rate is 0 for part of the training",
        "At a learning rate of 0 nothing is learned: the run is shorter than it says.",
        "Set the scheduler's number of steps to that of the training.",
        _zero_rates,
        lacks=_no_rates,
    ),
    Rule(
        "learning-rate-schedule",
        "The learning rates follow no schedule",
        "A schedule warms up once, then holds or falls; restarts jump back at once and fall again.",
        "Check whether rows of different runs were joined, or the scheduler was stepped by something else.",
        _no_schedule,
        lacks=_no_rates,
    ),
)
