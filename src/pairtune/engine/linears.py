"""Linear layers with their adapters, and what stands before and after them, as single steps of autograd.

Many operations of a decoder layer only pass over its activations: norms, activation functions, residual sums. Here
they are parts of the linear layers next to them, with backward passes written by hand. These make fewer passes, and
keep less for the backward pass, since a norm or an activation function costs little to repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers.pytorch_utils import Conv1D

from pairtune.engine.activations import silu, silu_gradient
from pairtune.engine.norms import inverse_rms, norm_gradients
from pairtune.engine.products import Products, linear_layers, matrix_of
from pairtune.models.nf4 import Nf4Linear, unpack


class Weights(NamedTuple):
    """The tensors of a linear layer and of its K adapters, if it has any.

    Attributes:
        stored: the matrix, [in, out], a view of the layer's weight; or the weight in 4 bits, see `nf4.pack`.
        bias: [out], or None.
        a: [K, rank, in], or None.
        b: [K, out, rank], or None.
        mask: dropout mask of the adapters' input, [tokens, in], or None; see `lora.LoraLinear`.
        scales: of a weight in 4 bits, or None.
    """

    stored: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    mask: Tensor | None = None
    scales: Tensor | None = None

    def matrix(self, inputs: int) -> Tensor:
        """The matrix, [in, out], of a layer with this many inputs; of 4 bits unpacked anew, and not kept."""
        return self.stored if self.scales is None else unpack(self.stored, self.scales).view(-1, inputs).T


@dataclass(frozen=True)
class Linear:
    """A linear layer, y = x M + b + scale (x A') B'.

    Attributes:
        weights: its tensors.
        scale: of the adapters' update.
    """

    weights: Weights
    scale: float = 1.0


def project(
    x: Tensor,
    layers: Sequence[Linear],
    products: Products,
    norm: nn.Module | None = None,
    needed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Several linear layers of the same input, which may be normed first.

    Args:
        x: [..., in]; with K adapters [K, tokens, in].
        layers: the linear layers.
        products: how products are computed.
        norm: an RMSNorm of `norms.KNOWN`, applied to x first, or None.
        needed: with a norm, the tokens that the first layer, with its mask, and the residual are limited to, [M], or
            None for all.

    Returns:
        Each layer's output, [..., out]. With a norm, x itself comes before them: what a residual connection then adds
        to, with its gradient summed in the same step.
    """
    if norm is None:
        plain: tuple[Tensor, ...] = _Projections.apply(x, products, _scales(layers), *_tensors(layers))
        return plain
    results: tuple[Tensor, ...] = _NormedProjections.apply(
        x, norm.weight, norm.variance_epsilon, needed, products, _scales(layers), *_tensors(layers)
    )
    return results


def project_onto(residual: Tensor, x: Tensor, layer: Linear, products: Products, gated: Tensor | None = None) -> Tensor:
    """A linear layer's output added to a residual.

    Args:
        residual: [..., out].
        x: [..., in]; with K adapters [K, tokens, in].
        layer: the linear layer.
        products: how products are computed.
        gated: if given, of the same shape as x, the layer's input is silu(x) * gated (SwiGLU, Shazeer 2020).

    Returns:
        [..., out].
    """
    result: Tensor = _ProjectionOnto.apply(residual, x, gated, products, _scales([layer]), *_tensors([layer]))
    return result


class _Projections(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, products: Products, scales: Sequence[float], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        layers = _layers(scales, tensors, x.dtype)
        outputs, inners = _products(x, layers, products)
        ctx.products, ctx.scales = products, scales
        ctx.save_for_backward(x, *inners, *_tensors(layers))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        inners, layers = _restored(kept, ctx.scales, x.dtype)
        by_x, _, _, *needed = ctx.needs_input_grad
        grad_x, by_layers = _gradients(x, layers, inners, grads, ctx.products, needed, by_x)
        return grad_x, None, None, *by_layers


class _NormedProjections(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        epsilon: float,
        needed: Tensor | None,
        products: Products,
        scales: Sequence[float],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        layers = _layers(scales, tensors, x.dtype)
        inverse = inverse_rms(x, epsilon)
        seen = (x * inverse).to(x.dtype).mul_(norm)
        ctx.products, ctx.scales = products, scales
        if needed is None:
            outputs, inners = _products(seen, layers, products)
        else:
            first, inner = _products(seen[:, needed], layers[:1], products)
            outputs, inners = _products(seen, layers[1:], products)
            outputs, inners = first + outputs, inner + inners
        ctx.save_for_backward(x, norm, inverse, needed, *inners, *_tensors(layers))
        return (x if needed is None else x[:, needed], *outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, inverse, needed, *kept = ctx.saved_tensors
        by_residual, *grads_of = grads
        inners, layers = _restored(kept, ctx.scales, x.dtype)
        by_x, by_norm, _, _, _, _, *wanted = ctx.needs_input_grad
        normed = x * inverse  # float32, as inverse is
        seen = normed.to(x.dtype) * norm
        rest = partial(_gradients, products=ctx.products, by_x=by_x or by_norm)
        if needed is None:
            grad, by_layers = rest(seen, layers, inners, grads_of, needed=wanted)
        else:
            of_first, by_first = rest(seen[:, needed], layers[:1], inners[:1], grads_of[:1], needed=wanted[:_EACH])
            grad, by_layers = rest(seen, layers[1:], inners[1:], grads_of[1:], needed=wanted[_EACH:])
            by_layers = by_first + by_layers
            if grad is not None and of_first is not None:
                grad.index_add_(1, needed, of_first)
        grad_x, grad_norm = None, None
        if grad is not None:
            grad_x, grad_norm = norm_gradients(grad, normed, inverse, norm, by_norm)
            grad_x = grad_x.add_(by_residual) if needed is None else grad_x.index_add_(1, needed, by_residual)
        return grad_x, grad_norm, None, None, None, None, *by_layers


class _ProjectionOnto(Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        x: Tensor,
        gated: Tensor | None,
        products: Products,
        scales: Sequence[float],
        *tensors: Tensor | None,
    ) -> Tensor:
        layers = _layers(scales, tensors, x.dtype)
        seen = x if gated is None else silu(x).mul_(gated)
        (output,), inners = _products(seen, layers, products)
        ctx.products, ctx.scales = products, scales
        ctx.save_for_backward(x, gated, *inners, *_tensors(layers))
        return output.add_(residual)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gated, *kept = ctx.saved_tensors
        inners, layers = _restored(kept, ctx.scales, x.dtype)
        by_x, needed = any(ctx.needs_input_grad[1:3]), ctx.needs_input_grad[5:]
        if gated is None:
            grad_x, by_layers = _gradients(x, layers, inners, grads, ctx.products, needed, by_x)
            return grads[0], grad_x, None, None, None, *by_layers
        activated = silu(x)
        grad, by_layers = _gradients(activated * gated, layers, inners, grads, ctx.products, needed, by_x)
        if grad is None:
            return grads[0], None, None, None, None, *by_layers
        by_gated = activated * grad
        return grads[0], silu_gradient(grad.mul_(gated), x, activated), by_gated, None, None, *by_layers


def _products(x: Tensor, layers: Sequence[Linear], products: Products) -> tuple[list[Tensor], list[Tensor | None]]:
    """Each layer's output, and its adapters' inner activations, [K, tokens, rank]."""
    outputs: list[Tensor] = []
    inners: list[Tensor | None] = []
    inputs = x.shape[-1]
    for weights, scale in ((each.weights, each.scale) for each in layers):
        _, bias, a, b, mask, _ = weights
        output, inner = products.matmul(x.reshape(-1, inputs), weights.matrix(inputs), bias), None
        if a is not None and b is not None:
            inner = products.batched(_dropped(_by_trial(x, a), mask), a.mT)
            output = products.add_batched(_by_trial(output, a), inner, b.mT, scale)
        # No view in autograd's sense: Falcon's layers add to such a result in place.
        outputs.append(torch.ops.aten._unsafe_view(output, [*x.shape[:-1], output.shape[-1]]))
        inners.append(inner)
    return outputs, inners


def _by_trial(x: Tensor, a: Tensor) -> Tensor:
    """[..., size] to [K, tokens, size]; with one adapter the first dimension may have had any size."""
    return x.reshape(len(a), -1, x.shape[-1])


def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _gradients(
    x: Tensor,
    layers: Sequence[Linear],
    inners: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    products: Products,
    needed: Sequence[bool],
    by_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of `_products`.

    Args:
        x: the layers' input.
        layers: the layers.
        inners: their adapters' inner activations.
        grads: the gradients of their outputs.
        products: how products are computed.
        needed: of which of their tensors gradients are needed, in the order of `_tensors`.
        by_x: whether that of x is.

    Returns:
        The gradient of x, a tensor of its own, and those of the layers' tensors.
    """
    total: Tensor | None = None
    found: list[Tensor | None] = []
    for number, (layer, inner, grad) in enumerate(zip(layers, inners, grads, strict=True)):
        stored, _, a, b, mask, _ = layer.weights
        by_matrix, by_bias, *_ = needed[number * _EACH :]
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.shape[-1]
        if by_x:
            part = products.matmul(rows, layer.weights.matrix(inputs).T).view_as(x)
            total = part if total is None else total.add_(part)
        of_matrix = _weight_gradient(x.reshape(-1, inputs), rows, stored) if by_matrix else None
        of_bias = rows.sum(0) if by_bias else None
        of_a = of_b = None
        if a is not None and b is not None and inner is not None:
            grads_of_trials = _by_trial(rows, a)
            grad_inner = products.bmm(grads_of_trials, b, len(a)).mul_(layer.scale)
            of_a = products.bmm(grad_inner.mT, _dropped(_by_trial(x, a), mask), len(a))
            # Twice as fast in this order as the other way round.
            of_b = products.bmm(inner.mT, grads_of_trials, len(a)).float().mul_(layer.scale).mT
            if total is not None:
                _add_of_adapters(_by_trial(total, a), grad_inner, a, mask, products)
        found += [of_matrix, of_bias, of_a, of_b, None, None]
    return total, found


def _add_of_adapters(total: Tensor, grad: Tensor, a: Tensor, mask: Tensor | None, products: Products) -> None:
    """Add the gradient of an input that came through adapters to a total, [K, tokens, in]."""
    if mask is None:
        products.add_batched(total, grad, a, 1.0)
    else:
        total.add_(products.batched(grad, a) * mask)


def _weight_gradient(x: Tensor, grad: Tensor, matrix: Tensor) -> Tensor:
    """X' grad, in the memory layout of the matrix, as which it is accumulated."""
    return x.T @ grad if matrix.is_contiguous() else (grad.T @ x).T


_EACH = len(Weights._fields)


def _scales(layers: Iterable[Linear]) -> tuple[float, ...]:
    return tuple(layer.scale for layer in layers)


def _tensors(layers: Iterable[Linear]) -> Iterator[Tensor | None]:
    """All tensors of the layers: autograd sees only those that are arguments themselves."""
    for layer in layers:
        yield from layer.weights


def _layers(scales: Sequence[float], tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Linear]:
    """The layers of these tensors, with adapters in the dtype that they are computed in."""
    layers = []
    for number, scale in enumerate(scales):
        stored, bias, a, b, mask, of_blocks = tensors[number * _EACH : (number + 1) * _EACH]
        a, b = (None if factor is None else factor.to(dtype) for factor in (a, b))
        layers.append(Linear(Weights(cast(Tensor, stored), bias, a, b, mask, of_blocks), scale))
    return layers


def _restored(
    kept: Sequence[Tensor | None], scales: Sequence[float], dtype: torch.dtype
) -> tuple[list[Tensor | None], list[Linear]]:
    """The inner activations and the layers that were saved for the backward pass."""
    return list(kept[: len(scales)]), _layers(scales, kept[len(scales) :], dtype)


def plain_linear(layer: nn.Linear | Conv1D) -> Linear:
    """A linear layer without adapters."""
    bias = cast(Tensor | None, layer.bias)
    if isinstance(layer, Nf4Linear):
        return Linear(Weights(layer.packed, bias, scales=layer.scales))
    return Linear(Weights(matrix_of(layer), bias))


def replace_linears(model: nn.Module, products: Products) -> None:
    """Make a model's linear layers compute their products this way.

    Plain products leave them unchanged, but for those in 4 bits, whose unpacked weights autograd would keep.
    """
    for _, layer in linear_layers(model):
        layer.__dict__.pop("forward", None)
        if not products.plain or isinstance(layer, Nf4Linear):
            layer.forward = MethodType(partial(_forward, products), layer)  # type: ignore[method-assign]


def _forward(products: Products, layer: nn.Linear | Conv1D, x: Tensor) -> Tensor:
    return project(x, [plain_linear(layer)], products)[0]
