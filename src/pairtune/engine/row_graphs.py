"""A model's passes over rows of tokens as CUDA graphs.

A small batch keeps a GPU busy for a few milliseconds, but its thousands of kernels take a Python program ten times as
long to start. A CUDA graph starts them all at once: for each number of tokens that rows are padded to, the forward and
the backward pass are recorded once, and replayed for every such row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pairtune.engine.out_of_memory import is_out_of_memory
from pairtune.engine.packing import Pack
from pairtune.engine.row_layout import RowLayout

# Longer rows of all trials together keep a GPU busy for longer than it takes to start their kernels.
_MOST_TOKENS = 32_768
# Each takes some megabytes.
_MOST_GRAPHS = 48
# Passes before the first recording, in which libraries choose kernels and allocate what they need.
_WARM_UP = 2

Compute = Callable[[Tensor, Tensor, RowLayout], Tensor]


class RowGraphs:
    """The graphs of one model, by the shape of rows.

    They hold the addresses of its weights and of their gradients, and are of no use once either was replaced.

    Args:
        compute: from token ids, positions and layout of a row of T tokens to the last hidden states, [trials, T, size].
            What it needs gradients of must have some already, to which a graph adds.
        trials: number of trials.
    """

    def __init__(self, compute: Compute, trials: int) -> None:
        self._compute, self._trials = compute, trials
        self._graphs: dict[tuple[int, int, int], _RowGraph] = {}
        # One of each for all graphs, so that they share memory: no two of them are ever under way.
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._usable = True
        self._anchor = torch.zeros((), requires_grad=True)  # makes autograd call the backward pass

    def states(self, pack: Pack) -> Tensor | None:
        """The last hidden states of a row, [trials, T, size], until the next call.

        Returns:
            None if the row must be computed without a graph: a very long one, or any if this model cannot be recorded.
        """
        layout = pack.layout
        tokens = pack.input_ids.shape[1]
        if layout is None or not self._usable or tokens * self._trials > _MOST_TOKENS:
            return None
        shape = layout.shape
        if shape not in self._graphs:
            if len(self._graphs) == _MOST_GRAPHS:
                return None
            try:
                self._graphs[shape] = self._record(pack)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                logging.getLogger(__name__).warning("training without CUDA graphs: %s", error)
                self._usable = False
                return None
        states: Tensor = _Replay.apply(self._anchor, self._graphs[shape], pack)
        return states

    def _record(self, pack: Pack) -> _RowGraph:
        self._stream.wait_stream(torch.cuda.current_stream())
        graph = _RowGraph(self._compute, pack)
        if not self._graphs:
            with torch.cuda.stream(self._stream):
                graph.warm_up()
        graph.record(self._pool, self._stream)
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph


class _RowGraph:
    """Both passes over rows of one shape."""

    def __init__(self, compute: Compute, pack: Pack) -> None:
        self._compute = compute
        self._inputs = [each.clone() for each in _inputs(pack)]
        self._layout = _layout(pack)

    def warm_up(self) -> None:
        """Compute both passes a few times; zeros are added to the gradients."""
        for _ in range(_WARM_UP):
            states = self._states()
            states.backward(torch.zeros_like(states))

    def record(self, pool: Any, stream: torch.cuda.Stream) -> None:
        """Record both passes; nothing is computed."""
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, pool=pool, stream=stream):
            states = self._states()
            self._grad = torch.zeros_like(states)
        with torch.cuda.graph(self._backward, pool=pool, stream=stream):
            states.backward(self._grad)
        self._result = states.detach()

    def _states(self) -> Tensor:
        ids, positions, *places = self._inputs
        return self._compute(
            ids, positions, self._layout.with_tensors(places)
        )  # what a layout remembers belongs to one recording

    def forward(self, pack: Pack) -> Tensor:
        """The last hidden states of a row."""
        torch._foreach_copy_(self._inputs, _inputs(pack))
        self._forward.replay()
        return self._result

    def backward(self, grad: Tensor) -> None:
        """Add the gradients of that row to those of the weights."""
        self._grad.copy_(grad)
        self._backward.replay()


def _inputs(pack: Pack) -> list[Tensor]:
    return [pack.input_ids, pack.positions, *_layout(pack).tensors()]


def _layout(pack: Pack) -> RowLayout:
    assert pack.layout is not None  # noqa: S101 - only such rows are recorded
    return pack.layout


class _Replay(Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graph: _RowGraph, pack: Pack) -> Tensor:
        ctx.graph = graph
        return graph.forward(pack).view_as(graph._result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.graph.backward(grads[0])
        return None, None, None
