"""Rules about arithmetic: what the columns of one row have to do with each other, whatever was trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from pairtune.evaluation.audit.evidence import ANSWERS, KTO, LOSS_ROUNDING, Evidence, Row, TrialLog, sigmoid_excess
from pairtune.evaluation.audit.rule import Hit, Rule
from pairtune.run.records import Level

_ACCURACY, _MARGIN, _CHOSEN, _REJECTED = (f"rewards/{name}" for name in ("accuracies", "margins", "chosen", "rejected"))
# A margin may differ from the difference of the rewards by this much, and by this share of them: means in float32, and
# tables with a few decimals.
_MARGIN_ROUNDING, _MARGIN_SHARE = 2e-4, 1e-3
_LOGP_ROUNDING = 1e-4
# A mean margin counts as positive or negative from here on.
_CLEARLY = 1e-3
# Rewards that move against log-probs by at least this much per nat, over log-probs that spread by this many nats.
_AGAINST, _SPREAD_NATS = 1e-3, 0.2
_NAMED = 3
# Evaluations needed to tell which one is off, and by how many nats it has to be.
_BASES, _BASE_NATS = 3, 0.05
# How far an evaluation's loss may be below, if its margins are means over batches that were taken to be equal.
_BATCHES_ROOM = 0.03
# The same for a row that averages several steps, of which some may have fewer batches to accumulate.
_STEPS_ROOM = 0.01

Fault = Callable[[Row, TrialLog], str]


def rows_of(trial: TrialLog) -> list[tuple[str, Row]]:
    """Every row with its place in words, steps before evaluations."""
    return [*_placed("step", trial.steps), *_placed("evaluation", trial.evaluations)]


def _placed(kind: str, rows: Sequence[Row]) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(rows, 1):
        if "step" in row:
            yield (f"step {row['step']:g}" if kind == "step" else f"the evaluation at step {row['step']:g}"), row
        else:
            yield (f"epoch {row['epoch']:g}" if "epoch" in row else f"{kind} {number}"), row


def _by_row(fault: Fault) -> Callable[[Evidence], Iterator[Hit]]:
    """A check that looks at each row by itself; `fault` says what is wrong, or nothing."""

    def check(evidence: Evidence) -> Iterator[Hit]:
        for trial in evidence.trials:
            rows = rows_of(trial)
            found = [(place, said) for place, row in rows if (said := fault(row, trial))]
            if found:
                shown = "; ".join(f"{place}: {said}" for place, said in found[:_NAMED])
                more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
                yield Hit("error", (trial.name,), f"in {len(found)} of {len(rows)} rows: {shown}{more}")

    return check


def _margin_fault(row: Row, trial: TrialLog) -> str:
    margin, chosen, rejected = (row.get(name, math.nan) for name in (_MARGIN, _CHOSEN, _REJECTED))
    room = _MARGIN_ROUNDING + _MARGIN_SHARE * (abs(chosen) + abs(rejected)) + trial.off(_MARGIN, _CHOSEN, _REJECTED)
    if trial.loss == KTO or not abs(margin - (chosen - rejected)) > room:  # also where one of them is missing
        return ""
    return f"margin {margin:.4f}, but chosen minus rejected reward is {chosen - rejected:.4f}"


def _out_of_range(row: Row, trial: TrialLog) -> str:
    found = []
    accuracy = row.get(_ACCURACY, 0.0)
    if accuracy < 0 or accuracy > 1:
        found.append(f"accuracy {accuracy:g}")
    found += [f"{name} {row[name]:g}" for name in ("grad_norm", "learning_rate") if row.get(name, 0.0) < 0]
    return " and ".join(found)


def _contradiction(row: Row, trial: TrialLog) -> str:
    accuracy, margin = row.get(_ACCURACY, math.nan), row.get(_MARGIN, math.nan)
    clearly = _CLEARLY + trial.off(_MARGIN)
    if (accuracy == 0 and margin > clearly) or (accuracy == 1 and margin < -clearly):
        return f"accuracy {accuracy:g}, but the mean margin is {margin:+.4f}"
    return ""


def _logp_fault(row: Row, trial: TrialLog) -> str:
    values = {answer: row.get(f"logps/{answer}", math.nan) for answer in ANSWERS}
    return " and ".join(f"{answer} log-prob {value:+.4f}" for answer, value in values.items() if value > _LOGP_ROUNDING)


def _loss_below(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        if not trial.is_dpo:
            continue
        evaluations = [] if trial.uneven else trial.evaluations
        room = _BATCHES_ROOM if trial.batch_means and trial.eval_batches != 1 else LOSS_ROUNDING
        of_one = {id(row) for before, row in pairwise([{"step": 0.0}, *trial.steps]) if _one_step(before, row)}
        alone = [row for row in trial.steps if id(row) in of_one]
        several = [row for row in trial.steps if id(row) not in of_one]
        kinds = (
            (_placed("step", alone), LOSS_ROUNDING),
            (_placed("step", several), _STEPS_ROOM),
            (_placed("evaluation", evaluations), room),
        )
        found = [
            f"{place}: loss {row['loss']:.4f}, margin {margin:.4f}"
            for rows, room in kinds
            for place, row in rows
            for excess, margin in sigmoid_excess([row])
            if excess < -room * (1 + abs(margin)) - trial.off("loss", _MARGIN)
        ]
        found += [
            f"{place}: loss {row['loss']:.4f}"
            for place, row in _placed("evaluation", trial.evaluations if trial.uneven else [])
            if row.get("loss", 0.0) < 0
        ]
        if found:
            more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            yield Hit(
                "error",
                (trial.name,),
                f"{'; '.join(found[:_NAMED])}{more}; the mean of -log sigmoid(margin) is at least -log sigmoid of the "
                "mean margin",
            )


def _one_step(before: Row, row: Row) -> bool:
    """Whether a row is that of a single step; without step numbers it may be a mean of several."""
    return row.get("step", math.nan) - before.get("step", math.nan) == 1


def _wrong_sign(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        if trial.reference_free:
            continue
        slopes = {answer: slope for answer in ANSWERS if (slope := _slope(trial, answer)) is not None}
        wrong = [f"{answer} {slope:+.3g} per nat" for answer, slope in slopes.items() if slope < -_AGAINST]
        if wrong:
            yield Hit(
                "error",
                (trial.name,),
                f"over the evaluations, rewards fall while log-probs rise, or the reverse: {', '.join(wrong)}",
            )


def _base_changes(evidence: Evidence) -> Iterator[Hit]:
    """Evaluations whose log-probs and rewards imply another base than those before and after them."""
    for trial in evidence.trials:
        beta = _robust_slope(trial) or trial.beta
        if _no_bases(trial, evidence) or not beta:
            continue
        for answer in ANSWERS:
            bases = trial.series(f"logps/{answer}") - trial.series(f"rewards/{answer}") / beta
            middle = float(np.median(bases))
            room = _BASE_NATS + trial.off(f"logps/{answer}") + trial.off(f"rewards/{answer}") / beta
            off = [number for number, base in enumerate(bases) if abs(base - middle) > room]
            # A reference that is updated (sync_ref_model) changes for good; a wrong row is followed by right ones.
            if not off or len(off) > len(bases) // 3 or (off[-1] == len(bases) - 1 and len(off) > 1):
                continue
            places = [place for place, _ in _placed("evaluation", trial.evaluations)]
            shown = ", ".join(f"{places[number]}: {bases[number]:.3f}" for number in off)
            level: Level = "error" if off[-1] < len(bases) - 1 else "warning"
            yield Hit(
                level,
                (trial.name,),
                f"{answer} log-prob minus reward over beta, which is the base's, is {middle:.3f}, but {shown}",
            )


def _robust_slope(trial: TrialLog) -> float | None:
    """Beta as the median slope of rewards on log-probs over all pairs of evaluations, which single rows do not move."""
    slopes = []
    for answer in ANSWERS:
        logps, rewards = trial.series(f"logps/{answer}"), trial.series(f"rewards/{answer}")
        moved = np.subtract.outer(logps, logps), np.subtract.outer(rewards, rewards)
        far = np.abs(moved[0]) > _SPREAD_NATS
        slopes += (moved[1][far] / moved[0][far]).tolist()
    middle = float(np.median(slopes)) if len(slopes) > _BASES else 0.0
    return middle if middle > 0 else None


def _slope(trial: TrialLog, answer: str) -> float | None:
    """The slope of an answer's rewards on its log-probs over the evaluations, where they lie on a line."""
    logps, rewards = trial.series(f"logps/{answer}"), trial.series(f"rewards/{answer}")
    known = np.isfinite(logps) & np.isfinite(rewards)
    x, y = logps[known], rewards[known]
    if len(x) < 2 or np.ptp(x) < _SPREAD_NATS:
        return None
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y / (x @ x))
    off_the_line = float(np.abs(y - slope * x).max())
    return slope if off_the_line <= 0.1 * float(np.abs(slope * x).max()) else None


def _lacks(*names: str) -> Callable[[TrialLog, Evidence], str]:
    """What a trial lacks whose rows never have all of these columns."""

    def lacking(trial: TrialLog, evidence: Evidence) -> str:
        known = any(all(math.isfinite(row.get(name, math.nan)) for name in names) for _, row in rows_of(trial))
        return "" if known else " and ".join(names)

    return lacking


def _no_bound(trial: TrialLog, evidence: Evidence) -> str:
    if trial.is_dpo is False:
        return "DPO's loss, but this is another one"
    if trial.is_dpo is None:
        return "the loss type (--loss), which the numbers do not show"
    if trial.uneven and not any(len(sigmoid_excess([row])) for row in trial.steps):
        return "the number of batches of an evaluation, which TRL's margins depend on"
    return _lacks("loss", _MARGIN)(trial, evidence)


def _no_margin(trial: TrialLog, evidence: Evidence) -> str:
    if trial.loss == KTO:
        return "pairs, but KTO averages chosen and rejected answers over different rows"
    return _lacks(_MARGIN, _CHOSEN, _REJECTED)(trial, evidence)


def _no_bases(trial: TrialLog, evidence: Evidence) -> str:
    if trial.reference_free:
        return "rewards against a reference, but this loss has none"
    known = [row for row in trial.evaluations if {"logps/chosen", "rewards/chosen"} <= row.keys()]
    if len(known) < _BASES:
        return f"log-probs and rewards of {_BASES} evaluations"
    beta = _robust_slope(trial) or trial.beta
    if not beta:
        return "a beta"
    coarse = trial.off("logps/chosen") + trial.off("rewards/chosen") / beta > _BASE_NATS / 2
    return "log-probs and rewards with more decimals" if coarse else ""


def _no_line(trial: TrialLog, evidence: Evidence) -> str:
    if trial.reference_free:
        return "rewards against a reference, but this loss has none"
    known = any(_slope(trial, answer) is not None for answer in ANSWERS)
    return "" if known else "log-probs that change enough"


RULES = (
    Rule(
        "margin-arithmetic",
        "A margin is not the difference of the rewards",
        "The margin is the chosen reward minus the rejected one, in every row and in every mean.",
        "Find out which of the three columns was changed or computed otherwise; do not use any of them until then.",
        _by_row(_margin_fault),
        lacks=_no_margin,
    ),
    Rule(
        "value-range",
        "A value is outside its range",
        "An accuracy is the share of pairs whose chosen answer has the higher reward, between 0 and 1; a norm and a "
        "learning rate are never negative.",
        "Divide percentages by 100; correct the code that sums instead of averaging.",
        _by_row(_out_of_range),
        lacks=lambda trial, evidence: (
            ""
            if any(name in row for _, row in rows_of(trial) for name in (_ACCURACY, "grad_norm", "learning_rate"))
            else "accuracies, gradient norms or learning rates"
        ),
    ),
    Rule(
        "accuracy-contradiction",
        "An accuracy contradicts the margin",
        "If no pair has a positive margin, their mean cannot be positive; if all have, it cannot be negative.",
        "Find out which of the two columns is wrong; they may come from different data or different steps.",
        _by_row(_contradiction),
        lacks=_lacks(_ACCURACY, _MARGIN),
    ),
    Rule(
        "log-prob-positive",
        "A log-prob is above 0",
        "A probability is at most 1, so its logarithm is at most 0.",
        "Check the sign, and whether these are losses or logits instead.",
        _by_row(_logp_fault),
        lacks=_lacks("logps/chosen"),
    ),
    Rule(
        "loss-below-bound",
        "A loss is lower than its margin allows",
        "DPO's loss is -log sigmoid of the margin, which is convex: its mean is at least its value at the mean margin.",
        "Find out whether losses and margins come from the same pairs; divide by the same count.",
        _loss_below,
        lacks=_no_bound,
    ),
    Rule(
        "reward-sign",
        "Rewards move against the log-probs",
        "A reward is beta times policy minus reference log-prob (Rafailov et al. 2023, eq. 5), so it rises with the "
        "policy's log-prob.",
        "Check whether policy and reference, or chosen and rejected, are swapped where rewards are computed.",
        _wrong_sign,
        lacks=_no_line,
    ),
    Rule(
        "base-inconsistent",
        "An evaluation implies another base",
        "The reference does not change and neither do the pairs, so log-prob minus reward over beta is the same in "
        "every evaluation.",
        "Find out whether these rewards or log-probs belong to other pairs, another model, or another row.",
        _base_changes,
        lacks=_no_bases,
    ),
)
