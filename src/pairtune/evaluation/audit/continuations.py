"""Rules about trials that go on where others ended, about their references, and about the beta that they show."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pairtune.evaluation.audit.evidence import ANSWERS, BETA_SHARE, SAME_BASE_NATS, Evidence, TrialLog
from pairtune.evaluation.audit.rule import Hit, Rule

# Nats that a mean log-prob may be off at the first step: bfloat16 rounds a single answer's by a few tenths.
_START_NATS = 1.0
# A trial starts where another ended if it is closer to that end than this fraction of the distance from the base, which
# has to be this many nats.
_SAME_PLACE, _WAY_NATS = 0.01, 1.0
# Implied log-probs are exact to this, and a trial has to have moved by this to have another end than its base.
_SAME_NATS, _MOVED_NATS = 2e-3, 0.05


def at_base(trial: TrialLog, evidence: Evidence) -> bool:
    """Whether the very first step is recorded, with the rewards of a start at the base."""
    rewards = first_rewards(trial)
    return bool(rewards) and all(abs(reward) <= start_room(trial, evidence) for reward in rewards.values())


def first_rewards(trial: TrialLog) -> dict[str, float]:
    """The rewards of the first step, if recorded."""
    first = trial.steps[0] if trial.steps and not trial.reference_free else {}
    rewards = {answer: first.get(f"rewards/{answer}", math.nan) for answer in ANSWERS}
    return rewards if first.get("step") == 1 and all(map(math.isfinite, rewards.values())) else {}


def start_room(trial: TrialLog, evidence: Evidence) -> float:
    """How far from 0 rounding may put a reward at the first step."""
    return evidence.betas.get(trial.name, 0.1) * _START_NATS


def same_base(one: TrialLog, other: TrialLog, evidence: Evidence) -> bool:
    """Whether two trials imply the same base on the same pairs."""
    bases = [trial.base_logps(evidence.betas.get(trial.name)) for trial in (one, other)]
    return all(
        abs(bases[0].get(answer, math.nan) - bases[1].get(answer, math.nan)) <= SAME_BASE_NATS for answer in ANSWERS
    )


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


def continued(evidence: Evidence) -> Iterator[tuple[TrialLog, TrialLog]]:
    """Pairs of trials of which the second starts where the first, an earlier one, ended."""
    for place, after in enumerate(evidence.trials):
        for before in reversed(evidence.trials[:place]):
            if _begins_at_end(before, after, evidence):
                yield before, after
                break


def _begins_at_end(before: TrialLog, after: TrialLog, evidence: Evidence) -> bool:
    if not before.evaluations or not after.evaluations or at_base(after, evidence) or _as_far_on(before, after):
        return False
    if not same_base(before, after, evidence):
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
    for before, after in continued(evidence):
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


def _beta_unseen(trial: TrialLog, evidence: Evidence) -> str:
    if not trial.beta:
        return "a labelled beta"
    return "" if trial.name in evidence.behaviour else "log-probs that change enough"


def _no_two(evidence: Evidence) -> str:
    known = [trial for trial in evidence.trials if trial.base_logps(evidence.betas.get(trial.name))]
    return "" if len(known) > 1 else "two trials with log-probs, rewards and beta"


RULES = (
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
