"""What a trial logs: training steps and evaluations, under TRL's names.

TRL's names (https://huggingface.co/docs/trl/dpo_trainer#logged-metrics) stand in the files, so that tables and
dashboards carry over; in the code they are attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

# Of every evaluated pair: loss (nats), rewards = beta * (policy - reference) log-prob, log-probs summed over the
# answer's tokens (nats), logits averaged over the answer's tokens and the vocabulary. The last one is not TRL's: the
# change of the chosen answer's log-prob per token minus the rejected one's, which has no beta and no length in it.
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
# What some evaluations have besides: the divergence from the base (nats per token), of the first pairs alone.
KL = "kl"
_EVALUATION = "eval_"


class _Line(BaseModel):
    """Numbers under TRL's names; those without an attribute of their own are kept as well."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    @model_serializer(mode="wrap")
    def _logged(self, dump: SerializerFunctionWrapHandler) -> dict[str, float]:
        """Only what was logged is written."""
        return {name: value for name, value in dump(self).items() if value is not None}

    def metrics(self) -> dict[str, float]:
        """All numbers by the names that they have on disk."""
        return {name: value for name, value in self.model_dump(by_alias=True).items() if isinstance(value, int | float)}

    def metric(self, name: str) -> float | None:
        """One of them; None where it was not logged."""
        return self.metrics().get(name)


class TrainingStep(_Line):
    """One optimizer step: means over the pairs of its batch.

    Attributes:
        step: counted from 1.
        epoch: passes over the training pairs so far, with a fraction.
        loss: nats for the sigmoid losses.
        accuracy: share of pairs whose chosen answer has the higher reward.
        margin: reward of the chosen minus that of the rejected answer.
        grad_norm: before clipping.
    """

    step: int
    epoch: float
    loss: float
    accuracy: float | None = Field(None, alias="rewards/accuracies")
    margin: float | None = Field(None, alias="rewards/margins")
    grad_norm: float | None = None
    learning_rate: float | None = None


class EvaluationMetrics(_Line):
    """Means over held-out pairs, not over batches; see `EXAMPLE_METRICS` for what each number is."""

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
        step: optimizer steps made by then.
        loss: mean over the epoch's training pairs.
    """

    epoch: int
    step: int
    loss: float | None = None


def parse_line(line: Mapping[str, Any]) -> TrainingStep | Evaluation:
    """What one line of `metrics.jsonl` is: this is the one place that tells steps and evaluations apart.

    Raises:
        ValidationError: it is neither.
    """
    kind = Evaluation if "eval_loss" in line else TrainingStep
    return kind.model_validate(line)


def evaluation_name(metric: str) -> str:
    """How TRL names the mean of a pair's metric over an evaluation."""
    return _EVALUATION + metric
