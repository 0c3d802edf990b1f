"""One trial's optimizer: AdamW, gradient clipping and a linear decay, as TRL has them by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from pairtune.config import TrialConfig
from pairtune.engine.lora import LoraLinear


class TrialOptimizer:
    """Updates the weights of one trial.

    Args:
        trial: its learning rate and the norm to which gradients are clipped.
        weights: float32 tensors that are updated in place; each has its gradient by the time of `step`.
        steps: after which the learning rate has come down to 0.
    """

    def __init__(self, trial: TrialConfig, weights: Sequence[Tensor], steps: int) -> None:
        self.weights = list(weights)
        self.max_grad_norm = trial.max_grad_norm
        self.adamw = torch.optim.AdamW(self.weights, lr=trial.learning_rate, weight_decay=0.0, fused=True)
        self.schedule = LambdaLR(self.adamw, lambda step: max(0.0, 1 - step / steps))

    @property
    def learning_rate(self) -> float:
        """Of the coming step."""
        return float(self.schedule.get_last_lr()[0])

    def clip(self) -> float:
        """Clip the gradients.

        Returns:
            Their norm before.
        """
        return torch.nn.utils.clip_grad_norm_(self.weights, self.max_grad_norm).item()

    def update(self) -> None:
        """Update the weights and drop the gradients."""
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad()


class AdapterWeights:
    """One trial's share of the stacked adapters, as tensors that an optimizer can own."""

    def __init__(self, adapted: Mapping[str, LoraLinear], trial: int) -> None:
        self.trial = trial
        self.stacked = [stack for layer in adapted.values() for stack in (layer.lora_a, layer.lora_b)]
        self.tensors = [stack.detach()[trial] for stack in self.stacked]  # views: an update changes the layers

    def take_gradients(self) -> None:
        """Give the optimizer's tensors this trial's gradients."""
        for tensor, stack in zip(self.tensors, self.stacked, strict=True):
            tensor.grad = None if stack.grad is None else stack.grad[self.trial]

    def updated(self) -> None:
        """Drop the layers' gradients; their weights are the optimizer's tensors."""
        for stack in self.stacked:
            stack.grad = None


class FullWeights:
    """All weights of a model, in float32 where it will hold them in less: small updates would be rounded away.

    Args:
        model: with float32 weights.
        dtype: that it is going to compute in.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.parameters = list(model.parameters())
        masters = (parameter.detach() for parameter in self.parameters)
        self.tensors = [master if dtype == torch.float32 else master.clone() for master in masters]

    def take_gradients(self) -> None:
        """Move the parameters' gradients to the masters."""
        for tensor, parameter in zip(self.tensors, self.parameters, strict=True):
            tensor.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    def updated(self) -> None:
        """Round the masters into the model."""
        for tensor, parameter in zip(self.tensors, self.parameters, strict=True):
            parameter.data.copy_(tensor)
