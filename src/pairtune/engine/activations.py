"""SiLU whose bits at one element do not depend on how many others there are.

PyTorch computes element-wise functions in vectors, and the last elements of each thread's share one by one. For SiLU in
float32 both ways differ in the last bit for some elements, so where a share ends, and with it the number of tokens in
the row, would decide about bits. Where shares cannot end within a vector, PyTorch's own function is used; elsewhere
tanh, which is always computed in vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Elements that PyTorch's loops take at a time with the longest vectors, two of 16.
_VECTOR = 32


def silu(x: Tensor) -> Tensor:
    """X / (1 + exp(-x)), [..., size]."""
    if _even(x):
        return functional.silu(x)
    half = x * 0.5
    return torch.addcmul(half, half, half.tanh())


def silu_gradient(grad: Tensor, x: Tensor, activated: Tensor) -> Tensor:
    """The gradient of x.

    Args:
        grad: the gradient of `silu(x)`; it may be overwritten.
        x: [..., size].
        activated: silu(x); it may be overwritten.
    """
    if _even(x):
        result: Tensor = torch.ops.aten.silu_backward(grad, x)
        return result
    sigmoid = (x * 0.5).tanh_().add_(1).mul_(0.5)
    return activated.neg_().add_(x).add_(1).mul_(sigmoid).mul_(grad)


def _even(x: Tensor) -> bool:
    """Whether, for any number of rows, every thread's share ends where a vector does."""
    most = torch.get_num_threads()
    return (
        x.dtype != torch.float32
        or x.device.type != "cpu"
        or all(x.shape[-1] % (shares * _VECTOR) == 0 for shares in range(1, most + 1))
    )
