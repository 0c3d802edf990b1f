"""The choice: the best epoch of the best trial, by a rule that is on record, with its reasons."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pairtune.config import Select
from pairtune.engine.records import RULES, TrialResult, score
from pairtune.errors import RunFailed
from pairtune.models.save import saved_fingerprint
from pairtune.runs import RunFolder, fill_folder, write_json


def select_best(results: list[TrialResult], rule: Select, validation_pairs: int) -> dict[str, Any]:
    """Rank the trials by their best epochs.

    Trials that failed are not ranked. Where two trials are level the earlier one of the grid stays in front.

    Returns:
        The content of `selection.json`: `rule`, `metric`, `winner`, `best_epoch`, `value`, `why`, `warnings`, and
        `ranking`, one entry per ranked trial with its best epoch's metrics.
    """
    metric, more_is_better = RULES[rule]
    usable = [result for result in results if result.status == "finished"]
    ranked = sorted(usable, key=lambda result: score(result.best_metrics, rule), reverse=True)
    winner = ranked[0]
    value = winner.best_metrics[metric]
    why = (
        f"{winner.trial.name}, epoch {winner.best_epoch}: {'highest' if more_is_better else 'lowest'} {metric} "
        f"({value:.4f}) of {sum(len(result.epochs) for result in usable)} evaluations, trials: {len(usable)}, "
        f"validation pairs: {validation_pairs}"
    )
    if len(ranked) > 1:
        why += f"; next: {ranked[1].trial.name} ({ranked[1].best_metrics[metric]:.4f})"
    return {
        "rule": rule,
        "metric": metric,
        "winner": winner.trial.name,
        "best_epoch": winner.best_epoch,
        "value": value,
        "why": why,
        "warnings": _warnings(usable, rule, validation_pairs),
        "ranking": [
            {"name": result.trial.name, "best_epoch": result.best_epoch, "metrics": result.best_metrics}
            for result in ranked
        ],
    }


def install_best(run: RunFolder, results: list[TrialResult], selection: dict[str, Any]) -> None:
    """Copy the winner's weights to the run's `best/`, check that they are those that were evaluated, and record it.

    Raises:
        RunFailed: the weights on disk are not the ones that the winner's best epoch wrote.
    """
    winner = next(result for result in results if result.trial.name == selection["winner"])
    trial_best = run.trial(winner.trial.name).best

    def fill(target: Path) -> None:
        shutil.copytree(trial_best, target, dirs_exist_ok=True)

    fill_folder(run.best, fill)
    if saved_fingerprint(run.best) != winner.best_fingerprint:
        raise RunFailed(
            f"{run.best}: the weights are not those of {winner.trial.name}, epoch {winner.best_epoch}, "
            "that were evaluated; something else wrote into the run folder"
        )
    write_json(run.selection, selection | {"best_fingerprint": winner.best_fingerprint})


def _warnings(results: list[TrialResult], rule: Select, validation_pairs: int) -> list[str]:
    warnings = []
    if rule == "eval_loss" and len({result.trial.beta for result in results}) > 1:
        by_accuracy = sorted(results, key=lambda result: score(result.best_metrics, "accuracy"), reverse=True)
        order = ", ".join(
            f"{result.trial.name} {result.best_metrics['eval_rewards/accuracies']:.3f}" for result in by_accuracy
        )
        warnings.append(
            f"beta is part of the loss, so losses of different betas are not on one scale; ranked by accuracy: {order}"
        )
    if validation_pairs < 30:
        warnings.append(f"only {validation_pairs} validation pairs: too few to tell trials apart; give 30 or more")
    return warnings
