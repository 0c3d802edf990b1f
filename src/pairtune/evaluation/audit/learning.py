"""Rules about what a model has learned instead of the preferences."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pairtune.evaluation.audit.evidence import Evidence, TrialLog
from pairtune.evaluation.audit.rule import Hit, Rule
from pairtune.run.records import AnswerSummary, Level
from pairtune.statistics import Numbers, share_interval

# Likelihood displacement: chosen answers lose at least this share of their log-prob and this many nats.
_COLLAPSE_SHARE, _COLLAPSE_NATS = 0.15, 10.0
_FELL_NATS = 1.0
_OVERFIT_SHARE, _OVERFIT = 0.02, 0.01
# Fewer pairs than this on either side are too few to judge length bias.
_LENGTH_PAIRS = 10
_LONGER, _SHORTER = 1.5, 0.5
_EMPTY_SHARE, _FEWER_ENDED, _MORE_REPEATED = 0.1, 0.25, 0.15


def _chosen_collapses(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        nats = _moved(trial, evidence, "chosen")
        base = trial.base_logps(evidence.betas.get(trial.name)).get("chosen", math.nan)
        if nats is not None and base < 0 and nats < -_COLLAPSE_NATS and nats < _COLLAPSE_SHARE * base:
            yield Hit(
                "warning",
                (trial.name,),
                f"chosen log-probs fell by {-nats:.1f} nats from the base's {base:.1f}: the answers became "
                f"{math.exp(min(-nats, 50)):.1g} times less likely",
            )


def _only_rejected_falls(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        chosen, rejected = _moved(trial, evidence, "chosen"), _moved(trial, evidence, "rejected")
        if chosen is not None and rejected is not None and rejected < chosen < -_FELL_NATS:
            yield Hit(
                "note",
                (trial.name,),
                f"chosen log-probs changed by {chosen:+.1f} nats, rejected log-probs by {rejected:+.1f}",
            )


def _moved(trial: TrialLog, evidence: Evidence, answer: str) -> float | None:
    """Nats by which an answer's mean log-prob has moved from the base, at the evaluation that counts."""
    beta, row = evidence.betas.get(trial.name), trial.best
    if row is None or not beta or trial.reference_free or not math.isfinite(row.get(f"rewards/{answer}", math.nan)):
        return None
    return row[f"rewards/{answer}"] / beta


def _overfits(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        losses = trial.series("loss")
        if len(losses) < 2 or not all(map(math.isfinite, losses)):
            continue
        best = int(losses.argmin())
        rise = float(losses[-1] - losses[best])
        if best == len(losses) - 1 or rise < max(_OVERFIT, _OVERFIT_SHARE * losses[best]):
            continue
        epochs = [f"{row.get('epoch', number):g}" for number, row in enumerate(trial.evaluations, 1)]
        kept = trial.best_epoch is not None and trial.best_epoch == trial.evaluations[best].get("epoch")
        yield Hit(
            "note" if kept else "warning",
            (trial.name,),
            f"evaluation loss {losses[best]:.4f} at epoch {epochs[best]}, {losses[-1]:.4f} at epoch {epochs[-1]}"
            + ("; the better epoch was kept" if kept else ""),
        )


def _prefers_by_length(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        lengths = {answer: trial.examples.get(f"tokens/{answer}") for answer in ("chosen", "rejected")}
        right = trial.examples.get("rewards/accuracies")
        if right is None or lengths["chosen"] is None or lengths["rejected"] is None:
            continue
        if not ((lengths["chosen"] > 0) & (lengths["rejected"] > 0)).all():
            continue
        longer = right[lengths["chosen"] > lengths["rejected"]]
        shorter = right[lengths["chosen"] < lengths["rejected"]]
        if min(len(longer), len(shorter)) < _LENGTH_PAIRS:
            continue
        (low_of_longer, high_of_longer), (low_of_shorter, high_of_shorter) = map(_interval, (longer, shorter))
        if low_of_longer > high_of_shorter or low_of_shorter > high_of_longer:
            yield Hit(
                "warning",
                (trial.name,),
                f"accuracy {longer.mean():.2f} [{low_of_longer:.2f}, {high_of_longer:.2f}] on {len(longer)} pairs "
                f"whose chosen answer is longer, {shorter.mean():.2f} [{low_of_shorter:.2f}, "
                f"{high_of_shorter:.2f}] on {len(shorter)} whose chosen answer is shorter",
            )


def _interval(right: Numbers) -> tuple[float, float]:
    return share_interval(float(right.sum()), len(right))


def _answers_change_length(evidence: Evidence) -> Iterator[Hit]:
    for name, base, tuned in _tuned_answers(evidence):
        before, after = base.median_tokens, tuned.median_tokens
        if before and (after > _LONGER * before or after < _SHORTER * before):
            yield Hit("note", (name,), f"median answer length {after:.0f} tokens, base {before:.0f}")


def _answers_break(evidence: Evidence) -> Iterator[Hit]:
    for name, base, tuned in _tuned_answers(evidence):
        worse = [
            ("empty answers", tuned.empty_share, base.empty_share, _EMPTY_SHARE),
            ("answers ending with EOS", tuned.ended_share, base.ended_share, -_FEWER_ENDED),
            ("repeated phrases", tuned.repeated_share, base.repeated_share, _MORE_REPEATED),
            (
                "answers in a different language from the prompt",
                tuned.other_language_share,
                base.other_language_share,
                _EMPTY_SHARE,
            ),
        ]
        said = [
            f"{words} {after:.0%} (base {before:.0%})"
            for words, after, before, room in worse
            if (after - before > room if room > 0 else after - before < room)
        ]
        if said:
            count = evidence_size(evidence)
            level: Level = "error" if tuned.empty_share > 0.5 else "warning"
            yield Hit(level, (name,), f"on {count} held-out prompt{'' if count == 1 else 's'}: {', '.join(said)}")


def evidence_size(evidence: Evidence) -> int:
    """The number of prompts answered."""
    return len(evidence.generations.prompts) if evidence.generations else 0


def _tuned_answers(evidence: Evidence) -> Iterator[tuple[str, AnswerSummary, AnswerSummary]]:
    models = evidence.generations.models if evidence.generations else {}
    for name, model in models.items():
        if name != "base":
            yield name, models["base"].summary, model.summary


def _below_chance(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        row = trial.best or {}
        accuracy = row.get("rewards/accuracies", math.nan)
        if not trial.eval_rows or not 0 <= accuracy <= 1:
            continue
        low, high = share_interval(accuracy * trial.eval_rows, trial.eval_rows)
        if high < 0.5 and row.get("rewards/margins", 0) < 0:
            yield Hit(
                "warning",
                (trial.name,),
                f"accuracy {accuracy:.3f} [{low:.3f}, {high:.3f}] on {trial.eval_rows} rows, margin "
                f"{row['rewards/margins']:.4f}",
            )


def _no_moves(trial: TrialLog, evidence: Evidence) -> str:
    if trial.reference_free:
        return "rewards against a reference, but this loss has none"
    known = all(_moved(trial, evidence, answer) is not None for answer in ("chosen", "rejected"))
    return "" if known else "rewards and a beta"


def _no_base(trial: TrialLog, evidence: Evidence) -> str:
    known = "chosen" in trial.base_logps(evidence.betas.get(trial.name))
    return _no_moves(trial, evidence) or ("" if known else "log-probs")


def _no_evaluations(trial: TrialLog, evidence: Evidence) -> str:
    losses = trial.series("loss")
    return "" if len(losses) > 1 and all(map(math.isfinite, losses)) else "losses of two evaluations"


def _no_lengths(trial: TrialLog, evidence: Evidence) -> str:
    if not {"tokens/chosen", "tokens/rejected", "rewards/accuracies"} <= trial.examples.keys():
        return "per-pair metrics"
    chosen, rejected = (trial.examples[f"tokens/{answer}"] for answer in ("chosen", "rejected"))
    if not ((chosen > 0) & (rejected > 0)).all():
        return "pairs, but it has single answers"
    fewest = min(int((chosen > rejected).sum()), int((chosen < rejected).sum()))
    if fewest >= _LENGTH_PAIRS:
        return ""
    return f"{_LENGTH_PAIRS} pairs with a longer and as many with a shorter chosen answer, but it has {fewest}"


def _no_answers(evidence: Evidence) -> str:
    return "" if evidence.generations else "answers to held-out prompts"


def _no_answers_of(trial: TrialLog, evidence: Evidence) -> str:
    answered = evidence.generations.models if evidence.generations else {}
    return "" if trial.name in answered else "its answers to held-out prompts"


def _no_chance(trial: TrialLog, evidence: Evidence) -> str:
    row = trial.best or {}
    if not all(math.isfinite(row.get(f"rewards/{what}", math.nan)) for what in ("accuracies", "margins")):
        return "accuracies and margins"
    return "" if trial.eval_rows else "the number of validation rows"


RULES = (
    Rule(
        "chosen-collapse",
        "The chosen answers became much less likely",
        "DPO sees only differences, so both log-probs may fall as long as the rejected one falls faster (likelihood "
        "displacement, Razin et al. 2024). The lost probability goes to answers that are not in the data.",
        "Add an SFT term (sft_weight 1), raise beta, lower the learning rate, or stop earlier.",
        _chosen_collapses,
        lacks=_no_base,
        live=True,
    ),
    Rule(
        "only-rejected-falls",
        "The margin grew only because rejected answers fell",
        "Chosen answers became less likely too. DPO often works this way, unlike how it is usually pictured.",
        "Read the answers. If they got worse, add an SFT term or raise beta.",
        _only_rejected_falls,
        lacks=_no_moves,
    ),
    Rule(
        "overfit",
        "The trial got worse before its end",
        "From some epoch on, the model memorises the training pairs.",
        "Keep the better epoch; use fewer epochs, a lower learning rate, or more pairs.",
        _overfits,
        lacks=_no_evaluations,
        live=True,
    ),
    Rule(
        "length-bias",
        "The model's preferences depend on length",
        "It agrees with the labels much more often where the chosen answer is also the longer (or the shorter) one, so "
        "it may have learned length alone.",
        'Compare with the baseline "the longer answer wins"; balance the pairs, or use sigmoid_norm or simpo.',
        _prefers_by_length,
        lacks=_no_lengths,
    ),
    Rule(
        "length-drift",
        "Answer length differs from the base model's",
        "Preference data often favours a length, so this may be intended.",
        "Read a few answers side by side.",
        _answers_change_length,
        needs=_no_answers,
        lacks=_no_answers_of,
    ),
    Rule(
        "answers-break",
        "Answers got worse in a way that losses do not show",
        "A model can rank given pairs well and still produce empty, repetitive or endless answers.",
        "Do not use this model; lower the learning rate, raise beta, or add an SFT term.",
        _answers_break,
        needs=_no_answers,
        lacks=_no_answers_of,
    ),
    Rule(
        "below-chance",
        "The model prefers the rejected answers",
        "An accuracy significantly below 0.5 means that the model learned the opposite.",
        "Check whether chosen and rejected are swapped, in training or in validation.",
        _below_chance,
        lacks=_no_chance,
    ),
)
