"""Full fine-tuning in several processes, which divide weights, gradients and optimizer among them.

PyTorch's FSDP2 (`fully_shard`, after Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data
Parallel") keeps a share of every float32 weight in each process. A layer's weights are gathered, rounded to the dtype
of the products, when a pass reaches the layer, and freed behind it; gradients are added up in float32, each process
receiving those of its share. To gather, all processes must make the same passes at the same time: see `in_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from pairtune.config import TrialConfig
from pairtune.engine.optimize import TrialOptimizer
from pairtune.engine.processes import Processes
from pairtune.models.load import give_large_pieces_back, load_model
from pairtune.models.resolve import ModelSource

T = TypeVar("T")


class ShardedWeights:
    """All weights of a model, of which each process holds a share, in float32.

    Args:
        model: the model, with float32 weights, on any device; they are moved and divided in place.
        dtype: the dtype that it will compute in.
        device: the device that it will compute on.
        processes: the processes, of which there are several.

    Attributes:
        dtype: the dtype that it computes in.
        tensors: the weights, each of which is divided along its first dimension.
    """

    shapes: Sequence[torch.Size] | None = None

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device, processes: Processes) -> None:
        if device.type == "cpu":
            give_large_pieces_back()
        self.dtype = dtype
        self._model: Any = model
        self._processes = processes
        self._names = [name for name, _ in model.named_parameters()]
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (processes.count,)),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=dtype if dtype != torch.float32 else None,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,  # positions' angles and the like stay as they are
            ),
        }
        blocks = set(model._no_split_modules or ())
        for module in reversed(list(model.modules())):  # some blocks are within others, and go first
            if type(module).__name__ in blocks:
                fully_shard(module, **settings)
        # What is outside of the layers is needed from the first product to the last: embeddings, which may be the head.
        fully_shard(model, reshard_after_forward=False, **settings)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # losses are divided by the batch of all processes already
                module.set_force_sum_reduction_for_comms(True)  # Gloo has no other way to divide by 1
                module.set_reduce_scatter_unused_params(True)  # which weights a row uses may differ between processes
        self.tensors = [cast(DTensor, each) for each in model.parameters()]
        self._model.gathered = MethodType(lambda _, work: work(), model)
        register_fsdp_forward_method(model, "gathered")

    def gathered(self, work: Callable[[], T]) -> T:
        """Do work that computes with the model; all processes must do so at the same time.

        Args:
            work: returns tensors, in a tuple or alone, from which a backward pass may start.
        """
        result: T = self._model.gathered(work)
        return result

    def in_step(self, items: Iterable[T], idle: Callable[[], Tensor]) -> Iterator[T]:
        """Go through this process's items, and make idle passes while other processes still have some.

        Args:
            items: whoever takes one makes a pass through the model with it, forward, and backward where gradients are
                enabled, before taking the next.
            idle: makes a forward pass of any size, and returns its result.
        """
        own = iter(items)
        while True:
            item = next(own, None)
            if not self._processes.any(item is not None):
                return
            if item is not None:
                yield item
                continue
            result = idle()
            if result.requires_grad:
                result.backward(torch.zeros_like(result))

    def whole(self, base: ModelSource) -> PreTrainedModel | None:
        """The whole model, in the dtype that it computes in and on the CPU; None in every process but the first.

        Args:
            base: the model whose weights these were.
        """
        model = load_model(base, self.dtype, torch.device("cpu")) if self._processes.first else None
        targets = dict(model.named_parameters()) if model else {}
        for name, tensor in zip(self._names, self.tensors, strict=True):
            full = _full(tensor)
            if model:
                targets[name].data.copy_(full)
        return model

    def collect_gradients(self) -> None:
        """Do nothing: gradients are added up in float32 after each backward pass."""

    @property
    def summed(self) -> Sequence[Tensor]:
        """Nothing that would have to be added up over the processes: it has been."""
        return ()

    def forget_gradients(self) -> None:
        """Drop all gradients."""
        for tensor in self.tensors:
            tensor.grad = None

    def take_gradients(self) -> None:
        """Do nothing: the weights hold them."""

    def assign(self, trial: int) -> None:
        """Do nothing: full training has a single trial."""

    def updated(self) -> None:
        """Make the next pass gather what was updated: without a backward pass, embeddings and head are still whole."""
        self._model.reshard()


class ShardedOptimizer(TrialOptimizer):
    """Updates a process's share of the weights; its state is that of `TrialOptimizer`, for any number of processes.

    Args:
        trial: see `TrialOptimizer`.
        weights: the model's weights.
        steps: see `TrialOptimizer`.
        processes: the processes.
    """

    def __init__(self, trial: TrialConfig, weights: ShardedWeights, steps: int, processes: Processes) -> None:
        super().__init__(trial, weights.tensors, steps)
        self._whole, self._processes = weights, processes

    def clip(self) -> float:
        """Clip the gradients by the norm of all processes' shares.

        Returns:
            Their norm before clipping.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.trial.max_grad_norm)
        return cast(DTensor, norm).full_tensor().item()

    def state(self) -> dict[str, Tensor]:
        """Weights and AdamW moments by name, whole; empty in every process but the first."""
        self._whole.updated()  # what the evaluation before left gathered makes room
        found = {}
        for name, tensor in super().state().items():
            full = _full(tensor)
            if self._processes.first:
                found[name] = full.cpu()
        return found

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Restore this process's share of the tensors that `state` returned in the first one after a step."""
        like = cast(DTensor, self.weights[0])
        with torch.no_grad():
            super().restore(step, _Shares(state, like))


class _Shares(Mapping[str, Tensor]):
    """Tensors of which each is divided when it is asked for: all of them at once would take memory beside the copies.

    Args:
        whole: the whole tensors by name, on any device.
        like: a tensor that is divided as they are to be.
    """

    def __init__(self, whole: Mapping[str, Tensor], like: DTensor) -> None:
        self._of, self._like = whole, like

    def __getitem__(self, name: str) -> Tensor:
        return distribute_tensor(self._of[name], self._like.device_mesh, self._like.placements, src_data_rank=None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


def _full(tensor: Tensor) -> Tensor:
    """The whole of a divided tensor, on every process."""
    return cast(DTensor, tensor.detach()).full_tensor()
