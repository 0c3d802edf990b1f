"""The rule about where a trial started, and all that shows it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from pairtune.evaluation.audit.continuations import continued, first_rewards, same_base, start_room
from pairtune.evaluation.audit.evidence import ANSWERS, Evidence, Row, TrialLog
from pairtune.evaluation.audit.rule import Hit, Rule

# Where the first row averages several steps: its loss may be this fraction of the minimum that a start at the base
# allows (rounding); rewards beyond this multiple of the rounding tolerance are far from 0; and they may reach this
# fraction of the rewards in the rows after it. If rewards jump to their final value at once, nine of ten steps have it.
_LEAST_SHARE = 0.95
_LATE_ROOMS, _LATE_SHARE, _LATE_ROWS = 10.0, 0.95, 3
# A trial whose first epoch ends this many times further from the base than another's at the same learning rate started
# elsewhere; beta hardly changes how far AdamW goes.
_FURTHER, _FAR_NATS = 2.5, 5.0
# The same in an evaluation before the first step, which averages over more pairs.
_START_EVALUATION_NATS = 0.25
# A first row this many times further from the base than another trial's, and at least this share of the way that the
# other one had gone at its end, is no start at the base; the other one has to have grown by this factor.
_AT_ONCE, _AS_FAR, _GREW = 2.5, 0.4, 2.0
# A mean of both rewards that is this many nats from 0 at once, and this many times as far as it moves afterwards.
_COMMON_NATS, _STEADY = 2.0, 4.0
_WAY_NATS = 1.0  # less than this is no way


def _not_at_base(evidence: Evidence) -> Iterator[Hit]:
    went_on = {after.name: before.name for before, after in continued(evidence)}
    clean: list[TrialLog] = []
    for trial in evidence.trials:
        if trial.elsewhere:
            continue
        if found := _first_step(trial, evidence) or _step_zero(trial, evidence) or _no_room_for_the_base(trial):
            yield Hit("error", (trial.name,), found)
        elif found := _does_not_grow(trial, evidence):
            yield Hit("warning", (trial.name,), found)
        elif trial.name in went_on:
            yield Hit("error", (trial.name,), _elsewhere(trial, went_on[trial.name], evidence))
        elif found := _far_at_once(trial, evidence):
            # Other losses, or all weights against adapters, can move faster at the same learning rate.
            yield Hit("error" if went_on else "warning", (trial.name,), found)
        elif found := _too_far(trial, clean, evidence):
            # Only a suspicion, unless other trials here are known to continue one another.
            yield Hit("error" if went_on else "warning", (trial.name,), found)
        else:
            clean.append(trial)


def _first_step(trial: TrialLog, evidence: Evidence) -> str:
    room = start_room(trial, evidence)
    far = {answer: reward for answer, reward in first_rewards(trial).items() if abs(reward) > room}
    if not far:
        return ""
    shown = " and ".join(f"{answer} {reward:+.4f}" for answer, reward in far.items())
    return f"at its first step, before any update, its rewards are {shown} instead of 0"


def _step_zero(trial: TrialLog, evidence: Evidence) -> str:
    """An evaluation before the first step (`eval_on_start`): means over many pairs, so rounding hardly shows."""
    if trial.reference_free:
        return ""
    row = next((row for row in trial.evaluations if row.get("step") == 0), {})
    nats = _nats(row, trial, evidence)
    if nats is None or max(map(abs, nats)) <= _START_EVALUATION_NATS:
        return ""
    shown = " and ".join(f"{answer} {row[f'rewards/{answer}']:+.4f}" for answer in ANSWERS)
    return f"in the evaluation before its first step, its rewards are {shown} instead of 0"


def _nats(row: Row, trial: TrialLog, evidence: Evidence) -> tuple[float, float] | None:
    """How far a row's chosen and rejected log-probs are from the base, in nats; None if a reward or beta is unknown."""
    beta = evidence.betas.get(trial.name, math.nan)
    chosen, rejected = (row.get(f"rewards/{answer}", math.nan) / beta for answer in ANSWERS)
    return (chosen, rejected) if math.isfinite(chosen) and math.isfinite(rejected) else None


def _far_at_once(trial: TrialLog, evidence: Evidence) -> str:
    """Whether the first row, a mean over several steps, is as far from the base as another trial got only at its end.

    Both trials log at the same steps and have the same base; how far AdamW goes in a few steps depends on the learning
    rate, and hardly on beta.
    """
    first = _late(trial)
    ours = _way(first, trial, evidence)
    if first is None or ours is None:
        return ""
    for other in evidence.trials:
        theirs = _late(other)
        start, end = _way(theirs, other, evidence), _way(other.steps[-1] if other.steps else None, other, evidence)
        if other is trial or theirs is None or not start or not end or theirs["step"] != first["step"]:
            continue
        faster = max(1.0, _early_rate(trial) / _early_rate(other)) if _early_rate(other) else 1.0
        grew = end >= _GREW * start  # so the other one started near the base
        same = same_base(other, trial, evidence)
        if grew and same and ours > _AT_ONCE * faster * start and ours >= _AS_FAR * end and ours > _WAY_NATS:
            return (
                f"in its first row, the mean of steps 1 to {first['step']:g}, its log-probs are {ours:.1f} nats from "
                f"the base; those of {other.name} were {start:.1f} nats away then, and {end:.1f} at its end"
            )
    return ""


def _early_rate(trial: TrialLog) -> float:
    """About the mean learning rate of the steps up to the first row; 0 if unknown.

    The first row has the rate of its last step, from which a falling schedule is followed back to the first step.
    """
    rates = [(row.get("step", 0.0), row.get("learning_rate", 0.0)) for row in trial.steps[:2]]
    if len(rates) < 2:
        return trial.learning_rate or 0.0
    (at, first), (later, second) = rates
    fall = max(0.0, first - second) / (later - at) if later > at else 0.0
    return first + fall * at / 2


def _way(row: Row | None, trial: TrialLog, evidence: Evidence) -> float | None:
    """How far a row's mean log-probs are from the base: the length of both answers' distances, in nats."""
    nats = _nats(row, trial, evidence) if row and not trial.reference_free else None
    return math.hypot(*nats) if nats else None


def _late(trial: TrialLog) -> Row | None:
    """The first row of a log, where it comes after the first step and averages all steps up to then."""
    first = trial.steps[0] if trial.steps and not trial.reference_free else {}
    return first if first.get("step", 0) > 1 else None


def _no_room_for_the_base(trial: TrialLog) -> str:
    """A start at the base contributes ln 2 to the first mean, and losses are never negative."""
    row = _late(trial)
    if row is None or not trial.is_dpo or not math.isfinite(row.get("loss", math.nan)):
        return ""
    least = math.log(2) / row["step"]
    if row["loss"] >= _LEAST_SHARE * least:
        return ""
    return (
        f"its first row averages steps 1 to {row['step']:g}; with a first loss of ln 2 the mean is at least "
        f"{least:.4f}, but it is {row['loss']:.4f}"
    )


def _does_not_grow(trial: TrialLog, evidence: Evidence) -> str:
    """Rewards far from 0 in the first mean, and no further from 0 in the later ones, did not grow from 0."""
    row = _late(trial)
    if row is None:
        return ""
    room, after = start_room(trial, evidence) * _LATE_ROOMS, trial.steps[1 : 1 + _LATE_ROWS]
    # At the fastest, rewards jump to their final value at once: then all steps of the mean but the first have it.
    share = max(_LATE_SHARE, 1 - 1 / row["step"])
    first, later = _rewards(row), [_rewards(step) for step in after]
    shown = " and ".join(f"{answer} {value:+.4f}" for answer, value in zip(ANSWERS, first, strict=True))
    if all(
        abs(each) > max(room, share * max((abs(step[at]) for step in later), default=0.0))
        for at, each in enumerate(first)
    ):
        return (
            f"the rewards in its first row, the mean of steps 1 to {row['step']:g}, are {shown}, and those in the next "
            "rows are no further from 0: they did not grow from 0"
        )
    # What both answers have in common moves little in training, unless policy and reference differ from the start.
    middle, middles = sum(first) / 2, [sum(step) / 2 for step in later]
    if len(middles) < _LATE_ROWS or not all(map(math.isfinite, (middle, *middles))):
        return ""
    if abs(middle) <= max(_COMMON_NATS * room / _LATE_ROOMS, share * max(map(abs, middles))):
        return ""
    steady = abs(middle) > _STEADY * (max(middles) - min(middles))
    falls = all(0 < after / before <= 1 for before, after in pairwise([middle, *middles]) if before)
    if steady or falls:
        return (
            f"the rewards in its first row, the mean of steps 1 to {row['step']:g}, are {shown}: their mean is "
            f"{middle:+.4f} at once, then {', '.join(f'{each:+.4f}' for each in middles)}, so it did not grow from 0"
        )
    return ""


def _rewards(row: Row) -> list[float]:
    return [row.get(f"rewards/{answer}", math.nan) for answer in ANSWERS]


def _elsewhere(trial: TrialLog, before: str, evidence: Evidence) -> str:
    distance = _distance(trial, evidence)
    if distance is None:
        return f"it starts where {before} ended"
    return f"it starts where {before} ended, with chosen log-probs {distance:.1f} nats from the base"


def _too_far(trial: TrialLog, clean: list[TrialLog], evidence: Evidence) -> str:
    """Without recorded steps: whether the first evaluation is too far from the base, compared with `clean` trials."""
    distance = _distance(trial, evidence)
    if distance is None or distance < _FAR_NATS or trial.steps or not trial.learning_rate:
        return ""
    for other in clean:
        theirs = _distance(other, evidence)
        faster = other.learning_rate and other.learning_rate >= trial.learning_rate
        alike = faster and not other.steps and _when(other) == _when(trial) and same_base(other, trial, evidence)
        if alike and theirs and distance > _FURTHER * theirs:
            return (
                f"at its first evaluation its chosen log-probs are {distance:.1f} nats from the base; {other.name}, "
                f"whose learning rate is no lower, was {theirs:.1f} nats away"
            )
    return ""


def _when(trial: TrialLog) -> tuple[float | None, float | None]:
    first = trial.evaluations[0]
    return first.get("epoch"), first.get("step")


def _distance(trial: TrialLog, evidence: Evidence) -> float | None:
    """Nats between base and first evaluation, in the mean chosen log-prob."""
    beta, first = evidence.betas.get(trial.name), trial.evaluations[0] if trial.evaluations else {}
    reward = first.get("rewards/chosen", math.nan)
    return abs(reward) / beta if beta and math.isfinite(reward) else None


def _start_unseen(trial: TrialLog, evidence: Evidence) -> str:
    """What is missing to tell where a trial started."""
    if trial.reference_free:
        return "rewards against a reference, but this loss has none"
    if trial.elsewhere:
        return f"rewards against the model that it started from, but {trial.elsewhere}"
    before = any(row.get("step") == 0 and _nats(row, trial, evidence) for row in trial.evaluations)
    if before or first_rewards(trial):
        return ""
    if trial.steps:
        first = trial.steps[0].get("step")
        if first is not None and first > 1:
            return f"the first step, but the first row is the mean of steps 1 to {first:g}"
        return "the rewards of the first step"
    others = (other for other in evidence.trials if other is not trial and not other.steps)
    known = _distance(trial, evidence) is not None and any(same_base(other, trial, evidence) for other in others)
    return "" if known else "the first step, or another trial on the same base and pairs to compare with"


RULES = (
    Rule(
        "start-not-base",
        "The trial did not start at the base model",
        "Before the first update, policy and reference are the same model, so every reward is 0. A trial that starts "
        "elsewhere continues what another one has learned: its numbers say nothing about its own settings.",
        "Reload the base weights for every trial, and create the adapter after that.",
        _not_at_base,
        lacks=_start_unseen,
        live=True,
    ),
)
