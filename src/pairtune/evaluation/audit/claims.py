"""Rules about conclusions that the numbers do not support."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

from pairtune.config import source_name
from pairtune.errors import plural
from pairtune.evaluation.audit.evidence import ANSWERS, Evidence, TrialLog
from pairtune.evaluation.audit.rule import Hit, Rule
from pairtune.statistics import ALPHA, share_interval

_FEW_ROWS = 100
# Two sets of pairs whose mean log-probs under one base agree to this many nats, chosen and rejected, are the same.
_SAME_NATS = 0.01
_CUT_SHARE, _CUT_MUCH = 0.05, 0.2
_NAMED = 3


def _few_rows(evidence: Evidence) -> Iterator[Hit]:
    for rows, trials in _by_rows(evidence).items():
        judged = [trial for trial in trials if math.isfinite(_accuracy(trial))]
        if not judged or rows >= _FEW_ROWS:
            continue
        best = max(judged, key=_accuracy)
        accuracy = _accuracy(best)
        low, high = share_interval(accuracy * rows, rows)
        chance = ", which includes chance level (0.5)" if low <= 0.5 <= high else ""
        yield Hit(
            "warning",
            tuple(trial.name for trial in trials),
            f"{plural(rows, 'validation row')}: the 95% confidence interval of an "
            f"accuracy of {accuracy:.4f} is {low:.2f} to {high:.2f}{chance}",
        )


def _by_rows(evidence: Evidence) -> dict[int, list[TrialLog]]:
    """Trials by number of validation rows, where it is known."""
    by_rows: dict[int, list[TrialLog]] = {}
    for trial in evidence.trials:
        if trial.eval_rows:
            by_rows.setdefault(trial.eval_rows, []).append(trial)
    return by_rows


def _accuracy(trial: TrialLog) -> float:
    """The accuracy that counts; NaN if there is none, or none that a share of pairs can be."""
    accuracy = (trial.best or {}).get("rewards/accuracies", math.nan)
    return accuracy if 0 <= accuracy <= 1 else math.nan


def _ranked_across_betas(evidence: Evidence) -> Iterator[Hit]:
    if evidence.selection and evidence.selection.rule == "accuracy":
        return
    judged = _ranked(evidence)
    betas = {round(evidence.betas[trial.name], 3) for trial in judged}
    scales = {(trial.loss, *sorted(trial.loss_settings.items())) for trial in judged}
    if len(betas) < 2 and len(scales) < 2:
        return
    others = "" if len(scales) < 2 else f"; {len(scales)} different losses or loss settings"
    by_loss = sorted(judged, key=lambda trial: trial.best["loss"] if trial.best else math.inf)
    by_accuracy = sorted(judged, key=_accuracy, reverse=True)
    yield Hit(
        "note" if evidence.selection else "warning",
        tuple(trial.name for trial in judged),
        f"betas {', '.join(f'{beta:g}' for beta in sorted(betas))}{others}; ranked by loss: {_order(by_loss)}; ranked "
        f"by accuracy: {_order(by_accuracy)}",
    )


def _order(trials: list[TrialLog]) -> str:
    return ", ".join(trial.name for trial in trials)


def _unsettled(evidence: Evidence) -> Iterator[Hit]:
    if evidence.selection:
        if not evidence.selection.settled and evidence.selection.comparisons:
            alike = [entry.name for entry in evidence.selection.comparisons if not entry.differs]
            yield Hit("note", (evidence.selection.winner, *alike), evidence.selection.verdict)
        return
    for rows, trials in _by_rows(evidence).items():
        judged = [trial for trial in trials if math.isfinite(_accuracy(trial))]
        apart = max((abs(_accuracy(one) - _accuracy(other)) for one, other in combinations(judged, 2)), default=None)
        if apart is None:
            continue
        ahead = round(apart * rows)
        # The best case for a difference: all rows on which two trials differ favour the same one.
        chance = min(1.0, 2 * 0.5**ahead)
        if chance >= ALPHA:
            yield Hit(
                "warning",
                tuple(trial.name for trial in judged),
                f"the accuracies of any two trials differ by at most {ahead} of {rows} rows; even if every differing "
                f"row favoured the same trial, chance alone would do that with p = {chance:.2f}, so the winner cannot "
                "be distinguished from the others",
            )


def _other_weights(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        if trial.saved:
            yield Hit("error", (trial.name,), trial.saved)
        if trial.left:
            yield Hit("note", (trial.name,), trial.left)


def _splits_overlap(evidence: Evidence) -> Iterator[Hit]:
    for (one, ours), (other, theirs) in combinations(evidence.prompts.items(), 2):
        shared = len(set(ours) & set(theirs))
        if shared:
            yield Hit(
                "error",
                (),
                f"{one} ({len(ours)} pairs) and {other} ({len(theirs)} pairs) share {shared} "
                f"prompt{'' if shared == 1 else 's'}",
            )


def _evaluates_training_pairs(evidence: Evidence) -> Iterator[Hit]:
    """Validation pairs that are the training pairs: their mean log-probs under the base are equal."""
    for trial in evidence.trials:
        base, trained = trial.base_logps(evidence.betas.get(trial.name)), _trained_base(trial, evidence)
        if len(base) == len(trained) == len(ANSWERS) and all(
            abs(base[each] - trained[each]) < _SAME_NATS for each in base
        ):
            shown = ", ".join(f"{each} {trained[each]:.4f} and {base[each]:.4f}" for each in base)
            yield Hit(
                "error",
                (trial.name,),
                f"the base's mean log-probs, as training and evaluation rows imply them, are equal: {shown}",
            )


def _trained_base(trial: TrialLog, evidence: Evidence) -> dict[str, float]:
    """The base's mean log-probs of the training pairs as implied by the rows of the first epoch, if these cover it."""
    beta = evidence.betas.get(trial.name)
    rows = [row for row in trial.steps if row.get("epoch", math.nan) <= 1 and "step" in row]
    if not beta or trial.reference_free or not rows or rows[-1]["epoch"] != 1:
        return {}
    # A row is the mean over the steps since the row before.
    steps = [row["step"] - before for row, before in zip(rows, [0.0, *(row["step"] for row in rows)], strict=False)]
    found = {}
    for answer in ANSWERS:
        values = [row.get(f"logps/{answer}", math.nan) - row.get(f"rewards/{answer}", math.nan) / beta for row in rows]
        mean = sum(value * count for value, count in zip(values, steps, strict=True)) / rows[-1]["step"]
        if math.isfinite(mean):
            found[answer] = mean
    return found


def _no_epoch(trial: TrialLog, evidence: Evidence) -> str:
    known = trial.base_logps(evidence.betas.get(trial.name)) and _trained_base(trial, evidence)
    return "" if known else "log-probs and rewards of all steps of an epoch"


def _much_is_cut(evidence: Evidence) -> Iterator[Hit]:
    if evidence.data is None:
        return
    limit = evidence.data.max_length
    for source in evidence.data.sources:
        too_long = sum(rows for reason, rows in source.dropped.items() if reason.startswith("longer than"))
        cut, rows = source.shortened + too_long, source.rows_in
        if rows and cut > _CUT_SHARE * rows:
            yield Hit(
                "warning" if cut > _CUT_MUCH * rows else "note",
                (),
                f"{source_name(source.source)} ({source.split}): at {limit} tokens, of {rows} rows {source.shortened} "
                f"lost the oldest turns of the prompt and {too_long} were dropped",
            )


def _no_accuracy(trial: TrialLog, evidence: Evidence) -> str:
    if not math.isfinite(_accuracy(trial)):
        return "accuracies"
    known = any(trial in trials for trials in _by_rows(evidence).values())
    return "" if known else "the number of validation rows"


def _no_betas(evidence: Evidence) -> str:
    return "" if len(_ranked(evidence)) > 1 else "two trials with a beta and a loss"


def _ranked(evidence: Evidence) -> list[TrialLog]:
    """Trials with a known loss and beta."""
    known = (trial for trial in evidence.trials if trial.name in evidence.betas and trial.best)
    return [trial for trial in known if math.isfinite((trial.best or {}).get("loss", math.nan))]


def _no_comparison(evidence: Evidence) -> str:
    if evidence.selection:
        return "" if evidence.selection.comparisons else "two trials"
    by_rows = _by_rows(evidence).values()
    known = any(sum(math.isfinite(_accuracy(trial)) for trial in trials) > 1 for trials in by_rows)
    return "" if known else "two trials with accuracies, and the number of validation rows"


def _no_weights(trial: TrialLog, evidence: Evidence) -> str:
    known = trial.best_epoch is not None or trial.saved or trial.left
    return "" if known else "a record of the reported and the saved epoch"


def _no_prompts(evidence: Evidence) -> str:
    return "" if len(evidence.prompts) > 1 else "the prompts of each split"


def _no_data(evidence: Evidence) -> str:
    sources = evidence.data.sources if evidence.data else []
    return "" if any(source.rows_in for source in sources) else "the row counts of the data"


RULES = (
    Rule(
        "few-rows",
        "Too few validation rows for the claim",
        "An accuracy over a few rows is largely luck; the interval shows how much.",
        f"Evaluate on {_FEW_ROWS} rows or more; to separate similar trials, on thousands.",
        _few_rows,
        lacks=_no_accuracy,
    ),
    Rule(
        "beta-ranking",
        "Trials are ranked by losses on different scales",
        "The loss depends on beta, the loss type and its settings, so the same model has a different loss under each.",
        "Rank by accuracy (--select accuracy) or by the answers' faults (--select fewer_faults).",
        _ranked_across_betas,
        _no_betas,
    ),
    Rule(
        "winner-unsettled",
        "The winner cannot be distinguished from other trials",
        "Some trial always comes first. A significance test asks whether it would again on other pairs.",
        "Say so when you report the result; more validation rows may settle it.",
        _unsettled,
        _no_comparison,
    ),
    Rule(
        "weights-not-reported",
        "The saved weights are not the reported ones",
        "The table names one epoch, but the file holds another.",
        "Save the weights when they are evaluated, and check their hash.",
        _other_weights,
        lacks=_no_weights,
    ),
    Rule(
        "split-overlap",
        "Two splits share prompts",
        "Prompts seen in training say nothing about unseen ones.",
        "Split by prompt, and drop the duplicates from the held-out side.",
        _splits_overlap,
        _no_prompts,
    ),
    Rule(
        "evaluates-training-pairs",
        "The validation pairs are the training pairs",
        "What a model was trained on says nothing about other pairs.",
        "Hold validation pairs out before training.",
        _evaluates_training_pairs,
        lacks=_no_epoch,
    ),
    Rule(
        "truncation",
        "Many conversations are truncated or dropped",
        "A conversation without its beginning may not make sense, and long conversations differ from short ones.",
        "Raise --max-length if memory allows.",
        _much_is_cut,
        _no_data,
    ),
)
