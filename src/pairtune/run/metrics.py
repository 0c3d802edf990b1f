"""What a trial logs: training steps and evaluations, under TRL's names.

Files use TRL's names (https://huggingface.co/docs/trl/dpo_trainer#logged-metrics), so that tables and dashboards carry
over; in the code, metrics are attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

# For every evaluated pair: loss (nats), rewards = beta * (policy - reference) log-prob, log-probs summed over the
# answer's tokens (nats), logits averaged over the answer's tokens and the vocabulary. The last one is not from TRL: the
# change of the log-prob per token, chosen minus rejected, which depends on neither beta nor the answers' lengths.
EXAMPLE_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "logps/margins_per_token",
)
# Only in some evaluations: KL divergence from the base model (nats per token), measured on the first pairs only.
KL = "kl"
# Only for KTO: its estimate of the KL divergence from the reference model, nats per answer (TRL's `kl`); one for each
# training batch, and one for an evaluation.
KL_ESTIMATE = "kl_estimate"
_EVALUATION = "eval_"


class _Line(BaseModel):
    """Metrics under TRL's names; those without an attribute here are kept as well."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    @model_serializer(mode="wrap")
    def _logged(self, dump: SerializerFunctionWrapHandler) -> dict[str, float]:
        """Write only what was logged."""
        return {name: value for name, value in dump(self).items() if value is not None}

    def metrics(self) -> dict[str, float]:
        """All metrics by their names on disk."""
        return {name: value for name, value in self.model_dump(by_alias=True).items() if isinstance(value, int | float)}

    def metric(self, name: str) -> float | None:
        """One metric by its name on disk; None if it was not logged."""
        return self.metrics().get(name)


class TrainingStep(_Line):
    """One optimizer step: means over the pairs of its batch.

    Attributes:
        step: counted from 1.
        epoch: passes over the training pairs so far, as a fraction.
        loss: in nats for the sigmoid losses.
        accuracy: share of pairs whose chosen answer has the higher reward.
        margin: reward of the chosen answer minus that of the rejected one.
        grad_norm: gradient norm before clipping.
    """

    step: int
    epoch: float
    loss: float
    accuracy: float | None = Field(None, alias="rewards/accuracies")
    margin: float | None = Field(None, alias="rewards/margins")
    grad_norm: float | None = None
    learning_rate: float | None = None


class EvaluationMetrics(_Line):
    """Means over held-out pairs, not over batches; see `EXAMPLE_METRICS` for their definitions."""

    eval_loss: float
    chosen_reward: float = Field(alias="eval_rewards/chosen")
    rejected_reward: float = Field(alias="eval_rewards/rejected")
    accuracy: float = Field(alias="eval_rewards/accuracies")
    margin: float = Field(alias="eval_rewards/margins")
    chosen_logps: float = Field(alias="eval_logps/chosen")
    rejected_logps: float = Field(alias="eval_logps/rejected")
    chosen_logits: float = Field(alias="eval_logits/chosen")
    rejected_logits: float = Field(alias="eval_logits/rejected")
    margin_per_token: float | None = Field(None, alias="eval_logps/margins_per_token")
    kl: float | None = Field(None, alias="eval_kl")


class Evaluation(EvaluationMetrics):
    """The evaluation of one trial at the end of an epoch.

    Attributes:
        epoch: counted from 1.
        step: optimizer steps taken by then.
        loss: mean over the epoch's training pairs.
    """

    epoch: int
    step: int
    loss: float | None = None


@dataclass
class MetricsLog:
    """What a trial has logged so far.

    Attributes:
        steps: the training steps, in order.
        evaluations: the evaluations, in order.
        unreadable: number of complete lines that are neither.
    """

    steps: list[TrainingStep] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    unreadable: int = 0

    def add(self, line: TrainingStep | Evaluation) -> None:
        """Add a parsed line to the steps or the evaluations."""
        if isinstance(line, Evaluation):
            self.evaluations.append(line)
        else:
            self.steps.append(line)


def parse_line(line: Mapping[str, Any]) -> TrainingStep | Evaluation:
    """Parse one line of `metrics.jsonl`; only this function tells steps and evaluations apart.

    Raises:
        ValidationError: the line is neither.
    """
    kind = Evaluation if "eval_loss" in line else TrainingStep
    return kind.model_validate(line)


def evaluation_name(metric: str) -> str:
    """TRL's name for the mean of a per-pair metric over an evaluation."""
    return _EVALUATION + metric
