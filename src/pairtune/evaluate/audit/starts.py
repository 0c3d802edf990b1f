"""Rules about where a trial started, and with which beta."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from pairtune.evaluate.audit.evidence import ANSWERS, BETA_SHARE, SAME_BASE_NATS, Evidence, Row, TrialLog
from pairtune.evaluate.audit.rule import Hit, Rule

# Nats that a mean log-prob may be off at the first step: bfloat16 rounds a single answer's by a few tenths.
_START_NATS = 1.0
# Where the first row averages several steps: its loss may be this fraction of the minimum that a start at the base
# allows (rounding); rewards beyond this multiple of the rounding tolerance are far from 0; and they may reach this
# fraction of the rewards in the rows after it. If rewards jump to their final value at once, nine of ten steps have it.
_LEAST_SHARE = 0.95
_LATE_ROOMS, _LATE_SHARE, _LATE_ROWS = 10.0, 0.95, 3
# A trial whose first epoch ends this many times further from the base than another's at the same learning rate started
# elsewhere; beta hardly changes how far AdamW goes.
_FURTHER, _FAR_NATS = 2.5, 5.0
# The same in an evaluation before the first step, which averages over more pairs.
_START_EVALUATION_NATS, _USUAL_BETA = 0.25, 0.1
# A first row this many times further from the base than another trial's, and at least this share of the way that the
# other one had gone at its end, is no start at the base; the other one has to have grown by this factor.
_AT_ONCE, _AS_FAR, _GREW = 2.5, 0.4, 2.0
# A mean of both rewards that is this many nats from 0 at once, and this many times as far as it moves afterwards.
_COMMON_NATS, _STEADY = 2.0, 4.0
# A trial starts where another ended if it is closer to that end than this fraction of the distance from the base.
_SAME_PLACE, _WAY_NATS = 0.01, 1.0
# Implied log-probs are exact to this, and a trial has to have moved by this to have another end than its base.
_SAME_NATS, _MOVED_NATS = 2e-3, 0.05


def _not_at_base(evidence: Evidence) -> Iterator[Hit]:
    continued = {after.name: before.name for before, after in _continued(evidence)}
    clean: list[TrialLog] = []
    for trial in evidence.trials:
        if found := _first_step(trial, evidence) or _step_zero(trial, evidence) or _no_room_for_the_base(trial):
            yield Hit("error", (trial.name,), found)
        elif found := _does_not_grow(trial, evidence):
            yield Hit("warning", (trial.name,), found)
        elif trial.name in continued:
            yield Hit("error", (trial.name,), _elsewhere(trial, continued[trial.name], evidence))
        elif found := _far_at_once(trial, evidence):
            # Other losses, or all weights against adapters, can move faster at the same learning rate.
            yield Hit("error" if continued else "warning", (trial.name,), found)
        elif found := _too_far(trial, clean, evidence):
            # Only a suspicion, unless other trials here are known to continue one another.
            yield Hit("error" if continued else "warning", (trial.name,), found)
        else:
            clean.append(trial)


def _at_base(trial: TrialLog, evidence: Evidence) -> bool:
    """Whether the very first step is recorded, with the rewards of a start at the base."""
    rewards = _first_rewards(trial)
    return bool(rewards) and all(abs(reward) <= _room(trial, evidence) for reward in rewards.values())


def _first_rewards(trial: TrialLog) -> dict[str, float]:
    """The rewards of the first step, if recorded."""
    first = trial.steps[0] if trial.steps and not trial.reference_free else {}
    rewards = {answer: first.get(f"rewards/{answer}", math.nan) for answer in ANSWERS}
    return rewards if first.get("step") == 1 and all(map(math.isfinite, rewards.values())) else {}


def _room(trial: TrialLog, evidence: Evidence) -> float:
    return evidence.betas.get(trial.name, 0.1) * _START_NATS


def _first_step(trial: TrialLog, evidence: Evidence) -> str:
    room = _room(trial, evidence)
    far = {answer: reward for answer, reward in _first_rewards(trial).items() if abs(reward) > room}
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
    """How far a row's chosen and rejected log-probs are from the base, in nats; a beta of 0.1 where it is unknown."""
    beta = evidence.betas.get(trial.name, _USUAL_BETA)
    chosen, rejected = (row.get(f"rewards/{answer}", math.nan) / beta for answer in ANSWERS)
    return (chosen, rejected) if math.isfinite(chosen) and math.isfinite(rejected) else None


def _far_at_once(trial: TrialLog, evidence: Evidence) -> str:
    """Whether the first row, a mean over several steps, is as far from the base as another trial got only at its end.

    Both trials log at the same steps and have the same base; how far AdamW goes in a few steps depends on the learning
    rate, and hardly on beta or the loss.
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
        same = _same_base(other, trial, evidence)
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
    room, after = _room(trial, evidence) * _LATE_ROOMS, trial.steps[1 : 1 + _LATE_ROWS]
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
        alike = faster and not other.steps and _when(other) == _when(trial) and _same_base(other, trial, evidence)
        if alike and theirs and distance > _FURTHER * theirs:
            return (
                f"at its first evaluation its chosen log-probs are {distance:.1f} nats from the base; {other.name}, "
                f"whose learning rate is no lower, was {theirs:.1f} nats away"
            )
    return ""


def _when(trial: TrialLog) -> tuple[float | None, float | None]:
    first = trial.evaluations[0]
    return first.get("epoch"), first.get("step")


def _same_base(one: TrialLog, other: TrialLog, evidence: Evidence) -> bool:
    """Whether two trials imply the same base on the same pairs."""
    bases = [trial.base_logps(evidence.betas.get(trial.name)) for trial in (one, other)]
    return all(
        abs(bases[0].get(answer, math.nan) - bases[1].get(answer, math.nan)) <= SAME_BASE_NATS for answer in ANSWERS
    )


def _distance(trial: TrialLog, evidence: Evidence) -> float | None:
    """Nats between base and first evaluation, in the mean chosen log-prob."""
    beta, first = evidence.betas.get(trial.name), trial.evaluations[0] if trial.evaluations else {}
    reward = first.get("rewards/chosen", math.nan)
    return abs(reward) / beta if beta and math.isfinite(reward) else None


def _other_reference(evidence: Evidence) -> Iterator[Hit]:
    """Trials whose implied base is not the others' but the policy that another trial ended with."""
    for trial in evidence.trials:
        base = trial.base_logps(evidence.betas.get(trial.name))
        for other in evidence.trials:
            if other is trial or len(base) < len(ANSWERS) or _same_place(base, other, evidence, first=True):
                continue
            if _same_place(base, other, evidence):
                ends = ", ".join(
                    f"{answer} {base[answer]:.4f} and {other.evaluations[-1][f'logps/{answer}']:.4f}"
                    for answer in ANSWERS
                )
                yield Hit(
                    "warning",
                    (other.name, trial.name),
                    f"log-probs of {trial.name}'s reference, and of {other.name} at its last evaluation: {ends}",
                )
                break


def _same_place(base: dict[str, float], other: TrialLog, evidence: Evidence, *, first: bool = False) -> bool:
    """Whether implied log-probs are those of another trial's last evaluation, or (`first`) of its own base."""
    theirs = other.base_logps(evidence.betas.get(other.name))
    end = other.evaluations[-1] if other.evaluations else {}
    moved: list[float] = []
    for answer in ANSWERS:
        last, start = end.get(f"logps/{answer}", math.nan), theirs.get(answer, math.nan)
        gap = abs(base[answer] - (start if first else last))
        moved.append(abs(last - start))
        if not gap <= _SAME_PLACE * moved[-1] + _SAME_NATS:
            return False
    return first or max(moved) > _MOVED_NATS


def _continued(evidence: Evidence) -> Iterator[tuple[TrialLog, TrialLog]]:
    """Pairs of trials of which the second starts where the first, an earlier one, ended."""
    for place, after in enumerate(evidence.trials):
        for before in reversed(evidence.trials[:place]):
            if _begins_at_end(before, after, evidence):
                yield before, after
                break


def _begins_at_end(before: TrialLog, after: TrialLog, evidence: Evidence) -> bool:
    if not before.evaluations or not after.evaluations or _at_base(after, evidence) or _as_far_on(before, after):
        return False
    if not _same_base(before, after, evidence):
        return False  # different base models or pairs
    end, start = before.evaluations[-1], after.evaluations[0]
    base = before.base_logps(evidence.betas.get(before.name))
    for answer in ANSWERS:
        name = f"logps/{answer}"
        way = abs(end.get(name, math.nan) - base[answer])
        gap = abs(start.get(name, math.nan) - end.get(name, math.nan))
        if not (way > _WAY_NATS and gap <= _SAME_PLACE * way):
            return False
    return True


def _as_far_on(before: TrialLog, after: TrialLog) -> bool:
    """Whether the second's first evaluation comes as late as the first's last: similar trials then agree anyway."""
    end, start = before.evaluations[-1], after.evaluations[0]
    known = [name for name in ("epoch", "step") if name in start and name in end]
    return any(start[name] == end[name] for name in known) if known else len(before.evaluations) == 1


def _continue_one_another(evidence: Evidence) -> Iterator[Hit]:
    for before, after in _continued(evidence):
        ends = [
            f"{answer} {before.evaluations[-1][name]:.6f} and {after.evaluations[0][name]:.6f}"
            for answer, name in ((answer, f"logps/{answer}") for answer in ANSWERS)
        ]
        yield Hit(
            "error",
            (before.name, after.name),
            f"log-probs at the last evaluation of {before.name} and at the first of {after.name}: {', '.join(ends)}",
        )


def _other_beta(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        found = evidence.behaviour.get(trial.name)
        if not found or not trial.beta or not _differs(found, trial.beta):
            continue
        shown = f"labelled beta {trial.beta:g}, but its rewards over its log-prob changes give beta {found[0]:.3g}"
        others = [
            other.name
            for other in evidence.trials
            if other.beta and other.name != trial.name and not _differs(found, other.beta)
        ]
        if others:
            shown += f", which is the label of {', '.join(others)}"
        yield Hit("error", (trial.name,), shown)


def _differs(found: tuple[float, float], label: float) -> bool:
    value, error = found
    return abs(value - label) > max(BETA_SHARE * label, error)


def _start_unseen(trial: TrialLog, evidence: Evidence) -> str:
    """What is missing to tell where a trial started."""
    if trial.reference_free:
        return "rewards against a reference, but this loss has none"
    if _first_rewards(trial):
        return ""
    if trial.steps:
        first = trial.steps[0].get("step")
        if first is not None and first > 1:
            return f"the first step, but the first row is the mean of steps 1 to {first:g}"
        return "the rewards of the first step"
    others = (other for other in evidence.trials if other is not trial and not other.steps)
    known = _distance(trial, evidence) is not None and any(_same_base(other, trial, evidence) for other in others)
    return "" if known else "the first step, or another trial on the same base and pairs to compare with"


def _beta_unseen(trial: TrialLog, evidence: Evidence) -> str:
    if not trial.beta:
        return "a labelled beta"
    return "" if trial.name in evidence.behaviour else "log-probs that change enough"


def _no_two(evidence: Evidence) -> str:
    known = [trial for trial in evidence.trials if trial.base_logps(evidence.betas.get(trial.name))]
    return "" if len(known) > 1 else "two trials with log-probs, rewards and beta"


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
    Rule(
        "trials-continue",
        "One trial continues where another ended",
        "The same validation pairs have the same log-probs at the end of one trial and at the start of the next, which "
        "happens when the same model object is trained again. The grid was one long training run.",
        "Reload the base weights for every trial and run them again; the recorded trials cannot be compared.",
        _continue_one_another,
        _no_two,
    ),
    Rule(
        "reference-moved",
        "A trial's reference is where another trial ended",
        "The first trial's tuned model became the second one's reference. As a second round this is right, and its "
        "rewards are measured from there; in a grid it means that model and reference were both used again.",
        "If these are trials of one grid, reload the base weights for every trial and run them again.",
        _other_reference,
        _no_two,
    ),
    Rule(
        "beta-mislabelled",
        "The trial was trained with a different beta than its label says",
        "A reward is beta times the change of an answer's log-prob from the base (Rafailov et al. 2023, eq. 5), so "
        "the two columns reveal beta.",
        "Check whether labels are written in a different order than the loop runs in; then relabel, or run again.",
        _other_beta,
        lacks=_beta_unseen,
    ),
)
