"""One trial's optimizer: AdamW, gradient clipping and linear learning-rate decay, with TRL's defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pairtune.config import TrialConfig
from pairtune.engine.lora import FlatAdapters, LoraLinear


class LinearDecay:
    """A learning rate that decays linearly to 0, as TRL's default does.

    Args:
        trial: sets the first step's rate.
        steps: number of steps.
    """

    def __init__(self, trial: TrialConfig, steps: int) -> None:
        self.trial, self.steps, self.step = trial, steps, 0

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.trial.learning_rate * max(0.0, 1 - self.step / self.steps)


class TrialOptimizer(LinearDecay):
    """Updates the weights of one trial.

    Args:
        trial: sets the learning rate and the norm to which gradients are clipped.
        weights: float32 tensors that are updated in place; their gradients must be set before `clip`.
        steps: number of steps over which the learning rate decays to 0.
        shapes: if the weights are a single flat tensor, the shapes of the tensors that lie in it one after another.
    """

    def __init__(
        self, trial: TrialConfig, weights: Sequence[Tensor], steps: int, shapes: Sequence[torch.Size] | None = None
    ) -> None:
        super().__init__(trial, steps)
        self.weights = list(weights)
        self._shapes = shapes
        self.adamw = torch.optim.AdamW(self.weights, lr=trial.learning_rate, weight_decay=0.0, fused=True)

    def clip(self) -> float:
        """Clip the gradients.

        Returns:
            Their norm before clipping.
        """
        return torch.nn.utils.clip_grad_norm_(self.weights, self.trial.max_grad_norm).item()

    def update(self) -> None:
        """Update the weights and clear the gradients."""
        self.adamw.param_groups[0]["lr"] = self.learning_rate
        self.adamw.step()
        self.adamw.zero_grad()
        self.step += 1

    def state(self) -> dict[str, Tensor]:
        """Weights and AdamW moments by name."""
        named = {"weights": self.weights}
        if self.step:
            named |= {name: [self.adamw.state[weights][name] for weights in self.weights] for name in _MOMENTS}
        parts = ((name, enumerate(self._parts(each))) for name, each in named.items())
        return {f"{number}.{name}": tensor for name, tensors in parts for number, tensor in tensors}

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors that `state` returned after a step."""
        self.step = step
        for number, part in enumerate(self._parts(self.weights)):
            part.copy_(state[f"{number}.weights"])
        if not step:
            return
        moments = {name: [torch.empty_like(weights) for weights in self.weights] for name in _MOMENTS}
        for name, tensors in moments.items():
            for number, part in enumerate(self._parts(tensors)):
                part.copy_(state[f"{number}.{name}"])
        for number, weights in enumerate(self.weights):
            own = {name: tensors[number] for name, tensors in moments.items()}
            self.adamw.state[weights] = {"step": torch.tensor(float(step), device=weights.device), **own}

    def _parts(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors that a flat one consists of, as views, so that checkpoints are the same on all devices."""
        if self._shapes is None:
            return tensors
        parts = tensors[0].split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdapterWeights:
    """One trial's share of the stacked adapters, as tensors that an optimizer can own."""

    shapes: Sequence[torch.Size] | None = None

    def __init__(self, adapted: Mapping[str, LoraLinear], trial: int) -> None:
        self.adapted = adapted
        self.tensors = [torch.empty(0, device=stack.device) for stack in self._stacks()]
        self.assign(trial)

    def assign(self, trial: int) -> None:
        """Move to this index of the stacks; the tensors stay the same objects, as views of it."""
        self.trial = trial
        for tensor, stack in zip(self.tensors, self._stacks(), strict=True):
            tensor.data = stack.detach()[trial]

    def collect_gradients(self) -> None:
        """Do nothing: the float32 stacks accumulate the gradients of all rows."""

    @property
    def summed(self) -> Sequence[Tensor]:
        """The tensors that hold a step's gradients: the stacks, which all trials share."""
        return self._stacks()

    def forget_gradients(self) -> None:
        """Drop the gradients of all trials."""
        for stack in self._stacks():
            stack.grad = None

    def take_gradients(self) -> None:
        """Assign this trial's gradients to the optimizer's tensors."""
        for tensor, stack in zip(self.tensors, self._stacks(), strict=True):
            tensor.grad = None if stack.grad is None else stack.grad[self.trial]

    def updated(self) -> None:
        """Do nothing: the optimizer's tensors are views of the layers' weights."""

    def _stacks(self) -> list[nn.Parameter]:
        return [stack for layer in self.adapted.values() for stack in layer.factors]


class FlatAdapterWeights:
    """One trial's row of `lora.FlatAdapters`, as a tensor that an optimizer can own."""

    def __init__(self, flat: FlatAdapters, trial: int) -> None:
        self.flat, self.shapes = flat, flat.shapes
        self.tensors = [torch.empty(0, device=flat.values.device)]
        self.assign(trial)

    def assign(self, trial: int) -> None:
        """Move to this row; the tensor stays the same object."""
        self.trial = trial
        self.tensors[0].data = self.flat.values.detach()[trial]

    def collect_gradients(self) -> None:
        """Do nothing: the gradients of all rows of tokens are added in place."""

    @property
    def summed(self) -> Sequence[Tensor]:
        """The tensor that holds a step's gradients of all trials."""
        return [self.flat.values]

    def forget_gradients(self) -> None:
        """Set the gradients of all trials to 0, in place: CUDA graphs add to them where they are."""
        self.flat.values.grad = self.flat.grads.zero_()

    def take_gradients(self) -> None:
        """Assign this trial's gradients to the optimizer's tensor."""
        total = self.flat.values.grad
        self.tensors[0].grad = None if total is None else total[self.trial]

    def updated(self) -> None:
        """Do nothing: the optimizer's tensor is a view of the layers' weights."""


class FullWeights:
    """All weights of a model, with float32 masters if its dtype is narrower and would round small updates away.

    Args:
        model: the model, still with float32 weights.
        dtype: the dtype that it will compute in.
    """

    shapes: Sequence[torch.Size] | None = None

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.parameters = list(model.parameters())
        masters = (parameter.detach() for parameter in self.parameters)
        self.tensors = [master if dtype == torch.float32 else master.clone() for master in masters]

    def collect_gradients(self) -> None:
        """Accumulate a row's gradients in float32 masters: in bfloat16 small contributions would be rounded away."""
        for tensor, parameter in zip(self.tensors, self.parameters, strict=True):
            if parameter.grad is not None:
                tensor.grad = parameter.grad.float() if tensor.grad is None else tensor.grad.add_(parameter.grad)
                parameter.grad = None

    @property
    def summed(self) -> Sequence[Tensor]:
        """The tensors that hold a step's gradients: the masters."""
        return self.tensors

    def forget_gradients(self) -> None:
        """Drop all gradients, those of a row that was cut off included."""
        for tensor, parameter in zip(self.tensors, self.parameters, strict=True):
            tensor.grad = parameter.grad = None

    def take_gradients(self) -> None:
        """Do nothing: the masters hold them."""

    def assign(self, trial: int) -> None:
        """Do nothing: full training has a single trial."""

    def updated(self) -> None:
        """Copy the masters to the model, rounded to its dtype."""
        for tensor, parameter in zip(self.tensors, self.parameters, strict=True):
            parameter.data.copy_(tensor)
