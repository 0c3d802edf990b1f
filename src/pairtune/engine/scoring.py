"""From the answers' log-probs to losses and per-example records."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from pairtune.data.table import PairTable
from pairtune.engine.divergence import BaseStates
from pairtune.engine.losses import Objective, PairLogps, pair_loss
from pairtune.engine.packing import Pack
from pairtune.engine.policy import AnswerLogps, Policy
from pairtune.run.examples import ExampleRecord
from pairtune.run.metrics import KL

# Number of pairs read from their table at a time.
_TABLE_ROWS = 256


@dataclass(frozen=True)
class Scored:
    """The pairs of a row under one trial: the values behind its loss and metrics, [pairs] each."""

    losses: Tensor
    pairs: PairLogps
    beta: Tensor | float
    chosen_logits: Tensor
    rejected_logits: Tensor
    kl: Tensor | None  # from the base model, nats per token; NaN where it was not measured

    def records(self) -> list[ExampleRecord]:
        """One record per pair, with TRL's metric names."""
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
            "logps/margins_per_token": self.pairs.chosen_ratio / self.pairs.chosen_tokens
            - self.pairs.rejected_ratio / self.pairs.rejected_tokens,
        }
        values = {name: column.detach().tolist() for name, column in columns.items()}
        if self.kl is not None:
            values[KL] = [None if math.isnan(value) else value for value in self.kl.tolist()]
        return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def score_pairs(
    policy: Policy,
    objectives: Sequence[Objective],
    pairs: PairTable,
    rows: Sequence[int],
    reference: Tensor,
    max_tokens: int,
    draw: tuple[int, ...] = (),
    base: BaseStates | None = None,
) -> Iterator[list[Scored]]:
    """Score pairs under every trial, one row of pairs at a time.

    Args:
        policy: the policy with the trials' adapters, in order.
        objectives: the trials' objectives, in the same order.
        pairs: the table of pairs.
        rows: row numbers of the pairs to score.
        reference: [all pairs, 2], the base model's log-probs of chosen and rejected.
        max_tokens: the most tokens in a row.
        draw: further numbers that seed the adapters' dropout, besides the pairs.
        base: if given, the records get the KL divergence from the base model, `kl`.
    """
    for start in range(0, len(rows), _TABLE_ROWS):
        some, done = rows[start : start + _TABLE_ROWS], 0
        for pack in policy.rows(pairs.tokens(some), max_tokens):
            numbers = list(some[done : done + pack.pairs])
            policy.draw_dropout(pack, numbers, *draw)
            answers = policy.answer_logps(pack, keep_states=base is not None)
            kls = [base.kl(policy, states, numbers) if base else None for states in answers.states]
            yield [
                _score(objective, pack, answers, trial, reference[numbers], kls[trial])
                for trial, objective in enumerate(objectives)
            ]
            done += pack.pairs


def _score(
    objective: Objective, pack: Pack, answers: AnswerLogps, trial: int, reference: Tensor, kl: Tensor | None
) -> Scored:
    logps, logits, tokens = answers.logps[trial], answers.logits[trial], pack.answer_tokens
    pairs = PairLogps(logps[0::2], logps[1::2], reference[:, 0], reference[:, 1], tokens[0::2], tokens[1::2])
    losses, beta = pair_loss(objective.loss, pairs, objective.settings), objective.settings.beta
    return Scored(losses, pairs, beta, logits[0::2], logits[1::2], kl)
