"""Rules about numbers that are impossible, or that do not mean what they seem to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

import numpy as np

from pairtune.evaluation.audit.evidence import ANSWERS, RUN_FOLDER, Evidence, Row, TrialLog
from pairtune.evaluation.audit.rule import Hit, Rule
from pairtune.statistics import Numbers

LN_2 = math.log(2)
# Losses that are above 0 for every finite margin.
_POSITIVE = ("sigmoid", "sigmoid_norm", "bco_pair", "nca_pair", "aot", "aot_unpaired")
_ACCURACY = "rewards/accuracies"
# Decimals of an accuracy that are compared; tables print at most six.
_DECIMALS = 6
# Above this margin, logs with four decimals show the loss as 0.
_VANISHING_MARGIN = 9.0
_COMMON_BATCHES = (2, 4, 8)
# Among the batch means of more rows than this, nearly every value is one.
_MOST_AVERAGED = 200
_NO_EFFECT_NATS, _MOVES_NATS, _COARSE = 0.02, 0.2, 1e-5
_CLIPPED_SHARE, _CLIPPED_STEPS = 0.95, 20


def _impossible_accuracy(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        if not trial.eval_rows:
            continue
        values = _accuracies(trial)
        room = _rounding(values)
        wrong = sorted({value for value in values if not _possible(value, trial.eval_rows, room)})
        if not wrong:
            continue
        shown = f"{', '.join(f'{value:.6g}' for value in wrong)} cannot come from {_rows(trial.eval_rows)}"
        if size := _logged_batches(trial, wrong):
            yield Hit(
                "note", (trial.name,), f"{shown}; TRL averages over batches, here of {size} with a smaller last one"
            )
        else:
            yield Hit("error", (trial.name,), f"{shown}{_by_batches(wrong, trial)}")


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def _accuracies(trial: TrialLog) -> list[float]:
    values = (row.get(_ACCURACY, math.nan) for row in trial.evaluations)
    return [value for value in values if math.isfinite(value)]


def _rounding(values: Iterable[float]) -> float:
    """How far printed accuracies may be off: half a unit of the last decimal that any of them has, with slack."""
    decimals = max((len(repr(value).partition(".")[2]) for value in values), default=_DECIMALS)
    return 0.6 * 10.0 ** -min(decimals, _DECIMALS)


def _possible(accuracy: float, rows: int, room: float) -> bool:
    return abs(accuracy * rows - round(accuracy * rows)) <= rows * room + 1e-9


def _averaged(accuracies: Sequence[float] | set[float], rows: int, size: int) -> bool:
    """Whether all of these can be means of batch means with a smaller last batch."""
    full, last = divmod(rows, size)
    if not last or not full or rows > _MOST_AVERAGED:
        return False
    means = {
        (of_full / size + of_last / last) / (full + 1)
        for of_full, of_last in product(range(full * size + 1), range(last + 1))
    }
    room = _rounding(accuracies)
    return all(any(abs(value - mean) <= room for mean in means) for value in accuracies)


def _logged_batches(trial: TrialLog, wrong: Sequence[float]) -> int | None:
    """The size of the batches that the log itself shows, if it explains these accuracies."""
    rows, batches = trial.eval_rows or 0, trial.eval_batches or 0
    sizes = [size for size in range(2, rows) if math.ceil(rows / size) == batches] if trial.batch_means else []
    return next((size for size in sizes if _averaged(wrong, rows, size)), None)


def _by_batches(wrong: Sequence[float], trial: TrialLog) -> str:
    sizes = [trial.batch_size] if trial.batch_size else _COMMON_BATCHES
    for size in sizes:
        if _averaged(wrong, trial.eval_rows or 0, size):
            return f"; averaging over batches of {size} with a smaller last batch gives such values"
    return ""


def _zero_loss(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        if _may_be_zero(trial):
            continue
        steps = [row for row in trial.steps if row.get("loss") == 0]
        epochs = [row for row in trial.evaluations if row.get("train_loss") == 0]
        what = [f"{len(steps)} of {len(trial.steps)} steps"] if steps else []
        what += [f"{len(epochs)} of {len(trial.evaluations)} epochs"] if epochs else []
        # Where margins are recorded and large, the loss was rounded to 0: the pairs were memorised.
        rounded = bool(steps) and all(row.get("rewards/margins", 0) >= _VANISHING_MARGIN for row in steps)
        if what:
            known = trial.loss in _POSITIVE or trial.is_dpo
            yield Hit(
                "error" if known and not rounded else "warning",
                (trial.name,),
                f"training loss of 0.000000 in {' and '.join(what)}; DPO's is 0.693 at the base, and no finite margin "
                f"makes it 0{'' if known else ' (the loss type is not recorded; --loss states it)'}",
            )


def _may_be_zero(trial: TrialLog) -> bool:
    """Whether the loss is known to be one that is 0 for pairs that are told apart well enough."""
    return trial.loss not in _POSITIVE if trial.loss else trial.is_dpo is False or trial.reference_free


def _not_a_number(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        rows = [*trial.steps, *trial.evaluations]
        broken = [sorted(name for name, value in row.items() if not math.isfinite(value)) for row in rows]
        names = sorted({name for each in broken for name in each if name not in _MAY_OVERFLOW})
        if names:
            count = sum(any(name in names for name in each) for each in broken)
            yield Hit("error", (trial.name,), f"NaN or infinity in {count} of {_rows(len(rows))}: {', '.join(names)}")
        hidden = [row for row in rows if _hides_nan(row, trial)]
        if hidden:
            place = f"step {hidden[0]['step']:g}" if "step" in hidden[0] else f"epoch {hidden[0].get('epoch', 0):g}"
            yield Hit(
                "error",
                (trial.name,),
                f"a loss of 0 in {len(hidden)} of {_rows(len(rows))}, first at {place}, that the margin or gradient "
                "norm contradicts: NaN was logged as 0",
            )
        overflowing = sum(any(name in _MAY_OVERFLOW for name in each) for each in broken)
        if overflowing and not names and not hidden:
            yield Hit(
                "note",
                (trial.name,),
                f"the gradient norm is not finite in {overflowing} of {len(trial.steps)} steps; a loss scaler skips "
                "such steps, but without one they ruin the weights",
            )


# float16's loss scaler finds its scale by overflowing, and skips these steps.
_MAY_OVERFLOW = ("grad_norm",)


def _hides_nan(row: Row, trial: TrialLog) -> bool:
    if row.get("loss") != 0:
        return False
    if not math.isfinite(row.get("grad_norm", 0.0)):
        return True
    # The loss is convex, so the mean loss is at least the loss of the mean margin.
    return bool(trial.is_dpo) and row.get("rewards/margins", math.inf) < _VANISHING_MARGIN


def _no_effect(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        if trial.reference_free:
            continue
        row, beta = trial.evaluations[-1] if trial.evaluations else {}, evidence.betas.get(trial.name)
        moved = [abs(row.get(f"rewards/{answer}", math.nan)) for answer in ("chosen", "rejected")]
        moves = [np.ptp(known) for side in ANSWERS if len(known := _known(trial.series(f"logps/{side}")))]
        if (beta is None and any(moved)) or max(moves, default=0.0) > _MOVES_NATS:
            continue  # where log-probs change, rewards near 0 are those of a reference that follows
        moved = [abs(row.get(f"rewards/{answer}", math.nan)) / (beta or 1.0) for answer in ("chosen", "rejected")]
        if all(distance < _NO_EFFECT_NATS for distance in moved):
            exactly = all(distance == 0 for distance in moved) and trial.off("rewards/chosen") < _COARSE
            loss = f"; the loss is {row['loss']:.6f} (ln 2 is {LN_2:.6f})" if "loss" in row and trial.is_dpo else ""
            yield Hit(
                "error" if exactly else "warning",
                (trial.name,),
                f"at the end, mean log-probs are {max(moved):.4f} nats or less from the base{loss}",
            )
        without = sum(step.get("grad_norm") == 0 for step in trial.steps)
        if without and trial.is_dpo is not False:  # satisfied pairs have no gradient in a hinge loss
            yield Hit(
                "warning", (trial.name,), f"the gradient norm is exactly 0 in {without} of {len(trial.steps)} steps"
            )


def _known(values: Numbers) -> Numbers:
    return values[np.isfinite(values)]


def _always_clipped(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        norms = [step["grad_norm"] for step in trial.steps if math.isfinite(step.get("grad_norm", math.nan))]
        if trial.max_grad_norm is None:
            continue
        clipped = sum(norm > trial.max_grad_norm for norm in norms)
        if len(norms) >= _CLIPPED_STEPS and clipped >= _CLIPPED_SHARE * len(norms):
            middle = sorted(norms)[len(norms) // 2]
            yield Hit(
                "note",
                (trial.name,),
                f"gradients were clipped to {trial.max_grad_norm:g} in {clipped} of {len(norms)} steps; the median "
                f"gradient norm is {middle:.1f}",
            )


def _ended_badly(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        if trial.status == "failed":
            yield Hit("warning", (trial.name,), trial.reason or "it failed")


def _no_accuracies(trial: TrialLog, evidence: Evidence) -> str:
    if not _accuracies(trial):
        return "accuracies"
    return "" if trial.eval_rows else "the number of validation rows"


def _no_losses(trial: TrialLog, evidence: Evidence) -> str:
    if _may_be_zero(trial):
        return "a loss that is above 0 for every finite margin, but this one may be 0"
    losses = [row.get("loss", math.nan) for row in trial.steps]
    losses += [row.get("train_loss", math.nan) for row in trial.evaluations]
    return "" if any(map(math.isfinite, losses)) else "training losses"


def _no_rows(trial: TrialLog, evidence: Evidence) -> str:
    return "" if trial.steps or trial.evaluations else "logged rows"


def _no_rewards(trial: TrialLog, evidence: Evidence) -> str:
    if trial.reference_free:
        return "rewards against a reference, but this loss has none"
    last = trial.evaluations[-1] if trial.evaluations else {}
    values = [last.get(f"rewards/{answer}", math.nan) for answer in ("chosen", "rejected")]
    if not all(map(math.isfinite, values)):
        return "evaluation rewards"
    return "" if evidence.betas.get(trial.name) or not any(values) else "a beta"


def _no_norms(trial: TrialLog, evidence: Evidence) -> str:
    if trial.max_grad_norm is None:
        return "the norm that gradients were clipped to"
    known = sum(math.isfinite(step.get("grad_norm", math.nan)) for step in trial.steps)
    return "" if known >= _CLIPPED_STEPS else f"gradient norms of {_CLIPPED_STEPS} steps"


def _no_ends(evidence: Evidence) -> str:
    return "" if evidence.kind == RUN_FOLDER else "the trials' final status"


RULES = (
    Rule(
        "accuracy-impossible",
        "An accuracy that is impossible with this number of rows",
        "Over N rows an accuracy is a multiple of 1/N. Any other value is a mean of batch means, in which the rows of "
        "a smaller last batch count more than the others.",
        "Average over examples, not over batches, and report the number of rows.",
        _impossible_accuracy,
        lacks=_no_accuracies,
    ),
    Rule(
        "train-loss-zero",
        "The training loss is exactly 0",
        "-log sigmoid(margin) is above 0 for every finite margin. 0.000000 means a few rows memorised up to margins of "
        "15 and more, or a NaN that the logger wrote as 0.",
        "Check the gradient norms and margins of these steps; train on more rows, with a lower learning rate.",
        _zero_loss,
        lacks=_no_losses,
        live=True,
    ),
    Rule(
        "nan-as-zero",
        "Some numbers are NaN or infinite",
        "A NaN corrupts all weights at the next update. transformers logs a NaN loss as 0 unless told otherwise "
        "(logging_nan_inf_filter), which looks like success.",
        "Discard everything after the first NaN; lower the learning rate, or use float32 or bfloat16, not float16.",
        _not_a_number,
        lacks=_no_rows,
        live=True,
    ),
    Rule(
        "no-effect",
        "Training had no effect",
        "Rewards near 0 and a loss of ln 2 are those of the base model: nothing was learned, or nothing was trained.",
        "Check that parameters require gradients and are given to the optimizer; otherwise raise the learning rate.",
        _no_effect,
        lacks=_no_rewards,
    ),
    Rule(
        "always-clipped",
        "The gradient was clipped at nearly every step",
        "With every gradient scaled to the same norm, AdamW's own scaling makes up for most of it; what is lost is "
        "that large gradients count more than small ones.",
        "No action is needed; larger batches or a lower beta make gradients smaller.",
        _always_clipped,
        lacks=_no_norms,
    ),
    Rule(
        "trial-failed",
        "A trial did not finish",
        "It is left out of the ranking.",
        "Read the reason; a lower learning rate is the usual remedy.",
        _ended_badly,
        needs=_no_ends,
    ),
)
