"""One trial's optimizer: AdamW, gradient clipping and a linear decay, as TRL has them by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pairtune.config import TrialConfig
from pairtune.engine.lora import LoraLinear


class TrialOptimizer:
    """Updates the weights of one trial.

    Args:
        trial: its learning rate and the norm to which gradients are clipped.
        weights: float32 tensors that are updated in place; each has its gradient by the time of `clip`.
        steps: after which the learning rate has come down to 0.
    """

    def __init__(self, trial: TrialConfig, weights: Sequence[Tensor], steps: int) -> None:
        self.weights = list(weights)
        self.trial, self.steps, self.step = trial, steps, 0
        self.adamw = torch.optim.AdamW(self.weights, lr=trial.learning_rate, weight_decay=0.0, fused=True)

    @property
    def learning_rate(self) -> float:
        """Of the coming step."""
        return self.trial.learning_rate * max(0.0, 1 - self.step / self.steps)

    def clip(self) -> float:
        """Clip the gradients.

        Returns:
            Their norm before.
        """
        return torch.nn.utils.clip_grad_norm_(self.weights, self.trial.max_grad_norm).item()

    def update(self) -> None:
        """Update the weights and drop the gradients."""
        self.adamw.param_groups[0]["lr"] = self.learning_rate
        self.adamw.step()
        self.adamw.zero_grad()
        self.step += 1

    def state(self) -> dict[str, Tensor]:
        """Weights and moments by name."""
        tensors = {}
        for number, weights in enumerate(self.weights):
            tensors[f"{number}.weights"] = weights
            tensors |= {f"{number}.{name}": self.adamw.state[weights][name] for name in _MOMENTS if self.step}
        return tensors

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Go on after a step from what `state` gave then."""
        self.step = step
        for number, weights in enumerate(self.weights):
            weights.copy_(state[f"{number}.weights"])
            if step:
                moments = {name: state[f"{number}.{name}"].to(weights.device) for name in _MOMENTS}
                self.adamw.state[weights] = {"step": torch.tensor(float(step), device=weights.device), **moments}


_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdapterWeights:
    """One trial's share of the stacked adapters, as tensors that an optimizer can own."""

    def __init__(self, adapted: Mapping[str, LoraLinear], trial: int) -> None:
        self.adapted = adapted
        self.tensors = [torch.empty(0, device=stack.device) for stack in self._stacks()]
        self.place(trial)

    def place(self, trial: int) -> None:
        """Take this place in the stacks; the tensors stay the same objects, as views of it."""
        self.trial = trial
        for tensor, stack in zip(self.tensors, self._stacks(), strict=True):
            tensor.data = stack.detach()[trial]

    def collect_gradients(self) -> None:
        """Nothing: the stacks add up in float32 what each row gives."""

    @property
    def summed(self) -> Sequence[Tensor]:
        """What has the gradients of a step: the stacks, which all trials share."""
        return self._stacks()

    def take_gradients(self) -> None:
        """Give the optimizer's tensors this trial's gradients."""
        for tensor, stack in zip(self.tensors, self._stacks(), strict=True):
            tensor.grad = None if stack.grad is None else stack.grad[self.trial]

    def updated(self) -> None:
        """Nothing: the layers' weights are the optimizer's tensors."""

    def _stacks(self) -> list[nn.Parameter]:
        return [stack for layer in self.adapted.values() for stack in (layer.lora_a, layer.lora_b)]


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

    def collect_gradients(self) -> None:
        """Add a row's gradients to the masters', in float32: in bfloat16 what small rows give would be rounded away."""
        for tensor, parameter in zip(self.tensors, self.parameters, strict=True):
            if parameter.grad is not None:
                tensor.grad = parameter.grad.float() if tensor.grad is None else tensor.grad.add_(parameter.grad)
                parameter.grad = None

    @property
    def summed(self) -> Sequence[Tensor]:
        """What has the gradients of a step: the masters."""
        return self.tensors

    def take_gradients(self) -> None:
        """Nothing: the masters have them."""

    def place(self, trial: int) -> None:
        """Nothing: a model that is trained whole has one trial."""

    def updated(self) -> None:
        """Round the masters into the model."""
        for tensor, parameter in zip(self.tensors, self.parameters, strict=True):
            parameter.data.copy_(tensor)
