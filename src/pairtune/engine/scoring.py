"""From answers' log-probs to losses and per-example records."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pairtune.config import TrialConfig
from pairtune.engine.losses import LossSettings, PairLogps, pair_loss
from pairtune.engine.packing import Pack
from pairtune.engine.policy import AnswerLogps
from pairtune.engine.records import ExampleRecord


@dataclass(frozen=True)
class Scored:
    """The pairs of a row under one trial: what its loss and its metrics are made of, [pairs] each."""

    losses: Tensor
    pairs: PairLogps
    beta: float
    chosen_logits: Tensor
    rejected_logits: Tensor

    def records(self) -> list[ExampleRecord]:
        """One record a pair, under TRL's names."""
        chosen, rejected = self.beta * self.pairs.chosen_ratio, self.beta * self.pairs.rejected_ratio
        columns = {
            "loss": self.losses,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": self.pairs.chosen,
            "logps/rejected": self.pairs.rejected,
            "logits/chosen": self.chosen_logits,
            "logits/rejected": self.rejected_logits,
        }
        values = {name: column.detach().tolist() for name, column in columns.items()}
        return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def score_row(trial: TrialConfig, pack: Pack, answers: AnswerLogps, place: int, reference: Tensor) -> Scored:
    """Losses of a row's pairs.

    Args:
        trial: its loss and that loss's settings.
        pack: the row.
        answers: of the row, under all trials.
        place: of this trial among them.
        reference: [pairs, 2], the base's log-probs of chosen and rejected.
    """
    logps, logits, tokens = answers.logps[place], answers.logits[place], pack.answer_tokens
    pairs = PairLogps(logps[0::2], logps[1::2], reference[:, 0], reference[:, 1], tokens[0::2], tokens[1::2])
    settings = LossSettings(trial.beta, trial.label_smoothing, trial.simpo_gamma, trial.discopop_tau, trial.sft_weight)
    return Scored(pair_loss(trial.loss, pairs, settings), pairs, trial.beta, logits[0::2], logits[1::2])
