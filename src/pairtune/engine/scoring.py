"""From the answers' log-probs to losses and per-example records, for pairs and for single answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pairtune.config import PairLoss, UnpairedLoss
from pairtune.data.table import PairTable
from pairtune.engine.divergence import BaseStates
from pairtune.engine.losses import (
    LabelledLogps,
    Objective,
    PairLogps,
    kl_estimate,
    pair_loss,
    unpaired_loss,
)
from pairtune.engine.packing import Pack
from pairtune.engine.policy import STATES, AnswerLogps, Policy
from pairtune.engine.processes import Processes
from pairtune.run.examples import ExampleRecord
from pairtune.run.metrics import EXAMPLE_METRICS, KL, KL_ESTIMATE

# Number of pairs read from their table at a time.
_TABLE_ROWS = 256


class Scored(Protocol):
    """The pairs, or single answers, of a row under one trial."""

    @property
    def losses(self) -> Tensor:
        """One loss for each, [pairs]."""

    def table(self) -> Tensor:
        """The numbers that its records are made of, [pairs, columns], float32, without gradients."""

    def records(self, rows: list[list[float]]) -> list[ExampleRecord]:
        """One record for each, with TRL's metric names, from the rows of its table."""


@torch.no_grad()
def records_of(parts: Sequence[Sequence[Scored]]) -> list[list[ExampleRecord]]:
    """The records of what was scored: of each trial, in order. They come from the device in one copy."""
    tables = [[part.table() for part in mine] for mine in parts]
    rows = iter(torch.cat([table for mine in tables for table in mine]).tolist() if any(tables) else [])
    return [
        [
            record
            for part, table in zip(mine, own, strict=True)
            for record in part.records(list(islice(rows, len(table))))
        ]
        for mine, own in zip(parts, tables, strict=True)
    ]


@dataclass(frozen=True)
class _ScoredPairs:
    """The pairs of a row under one trial: the values behind its loss and metrics, [pairs] each."""

    losses: Tensor
    pairs: PairLogps
    beta: Tensor | float
    chosen_logits: Tensor
    rejected_logits: Tensor
    kl: Tensor | None  # from the base model, nats per token; NaN where it was not measured

    def table(self) -> Tensor:
        chosen, rejected = self.beta * self.pairs.chosen_ratio, self.beta * self.pairs.rejected_ratio
        columns = {
            "loss": self.losses,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": chosen > rejected,
            "rewards/margins": chosen - rejected,
            "logps/chosen": self.pairs.chosen,
            "logps/rejected": self.pairs.rejected,
            "logits/chosen": self.chosen_logits,
            "logits/rejected": self.rejected_logits,
            "logps/margins_per_token": self.pairs.chosen_ratio / self.pairs.chosen_tokens
            - self.pairs.rejected_ratio / self.pairs.rejected_tokens,
        }
        return _table([*(columns[name] for name in EXAMPLE_METRICS), *([] if self.kl is None else [self.kl])])

    def records(self, rows: list[list[float]]) -> list[ExampleRecord]:
        names = EXAMPLE_METRICS if self.kl is None else (*EXAMPLE_METRICS, KL)
        return [_record(dict(zip(names, row, strict=True))) for row in rows]


@dataclass(frozen=True)
class _ScoredAnswers:
    """Single answers of a row under one trial, [answers] each."""

    answers: LabelledLogps
    objective: Objective
    logits: Tensor
    tokens: Tensor
    kl: Tensor | None = None  # as for pairs
    mismatched: Tensor | None = None  # log-ratios of the mismatched answers, if they were scored too

    @property
    def losses(self) -> Tensor:
        return unpaired_loss(cast(UnpairedLoss, self.objective.loss), self.answers, self.objective.settings)

    def with_kl(self, kl: Tensor | float) -> _ScoredAnswers:
        """The same with the estimate of the KL divergence that the loss of KTO needs."""
        return replace(self, answers=replace(self.answers, kl=kl))

    def table(self) -> Tensor:
        ratio, desirable = self.answers.ratio, self.answers.desirable
        reward = self.objective.settings.beta * ratio
        sign = torch.where(desirable, 1.0, -1.0)
        kl = torch.as_tensor(self.answers.kl, device=ratio.device).expand(len(ratio))
        columns = [self.losses, sign * reward, sign * ratio / self.tokens, kl, desirable]
        columns += [reward, self.answers.policy, self.logits]
        return _table([*columns, *([] if self.kl is None else [self.kl])])

    def records(self, rows: list[list[float]]) -> list[ExampleRecord]:
        """One record per answer.

        What is defined for the other kind of answers is None. The margin is the reward, negative for undesirable
        answers, so that it is above 0 where the model moved as the label says. The accuracy is defined only among many
        answers; see `summaries.examples_of`.
        """
        return [self._record(*row) for row in rows]

    def _record(
        self,
        loss: float,
        margin: float,
        per_token: float,
        estimate: float,
        desirable: float,
        reward: float,
        logp: float,
        logit: float,
        *kl: float,
    ) -> ExampleRecord:
        found: dict[str, Any] = dict.fromkeys(EXAMPLE_METRICS)
        found |= {"loss": loss, "rewards/margins": margin, "logps/margins_per_token": per_token}
        kind = "chosen" if desirable else "rejected"
        found |= {f"rewards/{kind}": reward, f"logps/{kind}": logp, f"logits/{kind}": logit}
        if self.objective.loss == "kto":
            found[KL_ESTIMATE] = estimate
        return _record(found | dict(zip((KL,), kl, strict=False)))


def _table(columns: Sequence[Tensor]) -> Tensor:
    return torch.stack([column.detach().float() for column in columns], 1)


def _record(found: dict[str, Any]) -> ExampleRecord:
    """A record; the KL divergence from the base model is None where it was not measured."""
    if KL in found and math.isnan(found[KL]):
        found[KL] = None
    return found


@dataclass(frozen=True)
class Scorer:
    """Scores the rows of a table under every trial.

    Attributes:
        policy: the policy with the trials' adapters, in order.
        objectives: the trials' objectives, in the same order.
        pairs: the table of pairs or single answers.
        reference: [rows of the table, 2], the reference model's log-probs: of chosen and rejected answers; for single
            answers, of these and of the mismatched ones.
        processes: the processes that share the work.
        draw: further numbers that seed the adapters' dropout, besides the rows.
        base: if given, the records get the KL divergence from the base model, `kl`.
    """

    policy: Policy
    objectives: Sequence[Objective]
    pairs: PairTable
    reference: Tensor
    processes: Processes
    draw: tuple[int, ...] = ()
    base: BaseStates | None = None

    def batch(self, rows: Sequence[int], max_tokens: int) -> Iterator[list[Scored]]:
        """Score a batch of the training rows, which all processes share; one row of tokens at a time.

        For KTO, the batch's mismatched answers are scored first, without gradients, since every loss needs the batch's
        KL estimate.

        Args:
            rows: the rows of the whole batch.
            max_tokens: the most tokens in a row.

        Yields:
            For every trial, some of this process's share.
        """
        own = self.processes.shard(rows)
        if not self.pairs.unpaired:
            yield from self._pairs(own, max_tokens)
            return
        kls = self._batch_kl(own, max_tokens)
        for numbers, pack, answers in self._forward(own, max_tokens, "answer"):
            yield [self._answers(numbers, pack, answers, trial).with_kl(kl) for trial, kl in enumerate(kls)]

    def all_records(
        self, max_tokens: int, on_progress: Callable[[int], None] = lambda done: None
    ) -> list[list[ExampleRecord]]:
        """Score all rows without gradients.

        The KL estimate of KTO is one for the whole table.

        Args:
            max_tokens: the most tokens in a row.
            on_progress: called with the number of rows done in all processes.

        Returns:
            The records of every trial, in the order of the rows, in every process.
        """
        rows = self.processes.shard(range(len(self.pairs)))
        done, parts = 0, [list[Scored]() for _ in self.objectives]
        with torch.no_grad():
            scored = self._single_answers(rows, max_tokens) if self.pairs.unpaired else self._pairs(rows, max_tokens)
            for each in scored:
                for mine, part in zip(parts, each, strict=True):
                    mine.append(part)
                done += len(each[0].losses)
                on_progress(done * self.processes.count)
            if self.pairs.unpaired:
                parts = [self._with_common_kl(cast(list[_ScoredAnswers], mine)) for mine in parts]
            return [self.processes.gather(mine) for mine in records_of(parts)]

    def _pairs(self, rows: Sequence[int], max_tokens: int) -> Iterator[list[Scored]]:
        for numbers, pack, answers in self._forward(rows, max_tokens, "both"):
            logps, logits, tokens = answers.logps, answers.logits, pack.answer_tokens
            reference = self.reference[numbers]
            found: list[Scored] = []
            for trial, objective in enumerate(self.objectives):
                pairs = PairLogps(
                    logps[trial, 0::2],
                    logps[trial, 1::2],
                    reference[:, 0],
                    reference[:, 1],
                    tokens[0::2],
                    tokens[1::2],
                )
                losses = pair_loss(cast(PairLoss, objective.loss), pairs, objective.settings)
                kl = self._divergence(answers, trial, numbers)
                found.append(
                    _ScoredPairs(losses, pairs, objective.settings.beta, logits[trial, 0::2], logits[trial, 1::2], kl)
                )
            yield found

    def _single_answers(self, rows: Sequence[int], max_tokens: int) -> Iterator[list[Scored]]:
        """Single answers together with their mismatched ones, which share the prompt's row."""
        for numbers, pack, answers in self._forward(rows, max_tokens, "both"):
            yield [self._answers(numbers, pack, answers, trial) for trial in range(len(self.objectives))]

    def _answers(self, numbers: list[int], pack: Pack, answers: AnswerLogps, trial: int) -> _ScoredAnswers:
        step = pack.answers_each
        logps, logits, reference = answers.logps[trial], answers.logits[trial], self.reference[numbers]
        desirable = torch.as_tensor(self.pairs.desirable[numbers], device=logps.device)
        return _ScoredAnswers(
            LabelledLogps(logps[0::step], reference[:, 0], desirable),
            self.objectives[trial],
            logits[0::step],
            pack.answer_tokens[0::step],
            self._divergence(answers, trial, numbers),
            logps[1::2] - reference[:, 1] if step == 2 else None,
        )

    def _divergence(self, answers: AnswerLogps, trial: int, numbers: list[int]) -> Tensor | None:
        if self.base is None:
            return None
        measured = (
            STATES if self.pairs.unpaired else 2 * STATES
        )  # mismatched answers are nothing that a model would say
        return self.base.kl(self.policy, answers.states[trial][:, :measured], numbers)

    @torch.no_grad()
    def _batch_kl(self, rows: Sequence[int], max_tokens: int) -> list[Tensor | float]:
        """The KL estimate of every trial for a batch, of which these rows are this process's share."""
        if not any(objective.loss == "kto" for objective in self.objectives):
            return [0.0] * len(self.objectives)
        found: list[list[float]] = [[] for _ in self.objectives]
        for numbers, _, answers in self._forward(rows, max_tokens, "mismatched"):
            for mine, logps in zip(found, answers.logps, strict=True):
                mine.extend((logps - self.reference[numbers, 1]).tolist())
        return [self._kl_of(mine) for mine in found]

    def _with_common_kl(self, parts: list[_ScoredAnswers]) -> list[Scored]:
        kl = self._kl_of([ratio for part in parts for ratio in _floats(part.mismatched)])
        return [part.with_kl(kl) for part in parts]

    def _kl_of(self, ratios: list[float]) -> Tensor:
        gathered = torch.tensor(self.processes.gather(ratios), dtype=torch.float32, device=self.policy.model.device)
        return kl_estimate(gathered)

    def _forward(
        self, rows: Sequence[int], max_tokens: int, which: str
    ) -> Iterator[tuple[list[int], Pack, AnswerLogps]]:
        """The log-probs of rows, one row of tokens at a time: of both answers, or of one of them.

        Args:
            rows: the rows.
            max_tokens: the most tokens in a row.
            which: both; or for single answers, answer or mismatched.
        """
        for numbers, pack in self.policy.in_step(self._packs(rows, max_tokens, which)):
            self.policy.draw_dropout(pack, numbers, *self.draw)
            yield numbers, pack, self.policy.answer_logps(pack, keep_states=self.base is not None)

    def _packs(self, rows: Sequence[int], max_tokens: int, which: str) -> Iterator[tuple[list[int], Pack]]:
        """Rows of tokens, and the rows of the table in each of them; see `_forward`."""
        for start in range(0, len(rows), _TABLE_ROWS):
            some, done = rows[start : start + _TABLE_ROWS], 0
            tokens = self.pairs.tokens(some)
            if which == "answer":
                tokens = [each._replace(rejected=[]) for each in tokens]
            elif which == "mismatched":
                tokens = [each._replace(chosen=each.rejected, rejected=[]) for each in tokens]
            for pack in self.policy.rows(tokens, max_tokens):
                yield list(some[done : done + pack.pairs]), pack
                done += pack.pairs


def _floats(values: Tensor | None) -> list[float]:
    return [] if values is None else values.tolist()
