"""The decoder layers of the common model families, in fewer and larger steps than transformers computes them in."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pairtune.engine.linears import Linear, plain_linear, project, project_onto
from pairtune.engine.lora import LoraLinear
from pairtune.engine.packed_attention import packed_attention
from pairtune.engine.packing import Segment
from pairtune.engine.products import Products
from pairtune.engine.row_layout import RowLayout

# Classes of transformers with RMSNorms before attention and SwiGLU, rotary embeddings of whole heads, and nothing else
# but, in some, norms of query and key heads, layers without rotary embeddings, and sliding windows.
_KNOWN = frozenset(f"{family}DecoderLayer" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"))


def replace_layers(model: nn.Module, products: Products) -> bool:
    """Switch a model's decoder layers to the faster implementation.

    Their results are transformers' own but for rounding. They take rows of packed pairs only.

    Args:
        model: a model of any family; layers of others than the common families keep their own implementation.
        products: how products are computed.

    Returns:
        Whether they were switched. If so, the last layer's results are limited to the tokens `needed`.
    """
    layers = known_layers(model)
    for layer in layers:
        layer.forward = MethodType(partial(_forward, products, layer is layers[-1]), layer)
    return bool(layers)


def known_layers(model: nn.Module) -> list[nn.Module]:
    """A model's decoder layers, if this module can compute them."""
    if getattr(model.config, "hidden_act", None) != "silu":
        return []
    # FSDP2 puts its name before that of a layer's class.
    return [module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in _KNOWN]


def _forward(products: Products, last: bool, layer: Any, hidden_states: Tensor, **arguments: Any) -> Tensor:
    """One layer, with its activations checkpointed if the model is set to: its own `forward`, replaced, would do so."""

    def compute(states: Tensor) -> Tensor:
        return _compute(products, last, layer, states, **arguments)

    if layer.gradient_checkpointing and layer.training:
        result: Tensor = layer._gradient_checkpointing_func(compute, hidden_states)
        return result
    return compute(hidden_states)


def _compute(
    products: Products,
    last: bool,
    layer: Any,
    hidden_states: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    segments: tuple[Segment, ...] | RowLayout,
    needed: Tensor | None = None,
    by_trial: bool = False,
    **_: Any,
) -> Tensor:
    """One layer, [trials, T, size] to the same shape, or in the last layer to [trials, M, size].

    Args:
        products: how products are computed.
        last: whether it is the model's last layer.
        layer: the decoder layer.
        hidden_states: its input.
        position_embeddings: cosines and sines of the positions' angles, [trials, T, head size] each.
        segments: see `packed_attention`.
        needed: see `Pack.needed`, [M]; None for all.
        by_trial: see `packed_attention`.
    """
    attention, mlp = layer.self_attn, layer.mlp
    only = needed if last else None
    inputs = [_linear(attention.q_proj, only), _linear(attention.k_proj), _linear(attention.v_proj)]
    residual, *projected = project(hidden_states, inputs, products, layer.input_layernorm, only)
    query, key, value = (each.view(*each.shape[:-1], -1, attention.head_dim) for each in projected)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    mixed = _attend(attention, query, key, value, position_embeddings, segments, only, by_trial)
    hidden_states = project_onto(residual, mixed.flatten(2), _linear(attention.o_proj, only), products)
    residual, gate, up = project(
        hidden_states,
        [_linear(mlp.gate_proj, only), _linear(mlp.up_proj, only)],
        products,
        layer.post_attention_layernorm,
    )
    return project_onto(residual, gate, _linear(mlp.down_proj, only), products, up)


def _attend(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    segments: tuple[Segment, ...] | RowLayout,
    only: Tensor | None,
    by_trial: bool,
) -> Tensor:
    """Rotary embeddings and attention: [trials, T or M, heads, size] each to the same shape as the queries."""
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    rotated = getattr(attention, "use_rope", True)
    if isinstance(segments, RowLayout):
        if rotated:
            angles = [each[:, :, None] for each in position_embeddings]
            query, key = (_Rotary.apply(each, *angles, False) for each in (query, key))
        return segments.attend(query, key, value, attention.scaling, window, None)
    if rotated:
        angles = [each[:, None] for each in position_embeddings]
        query = _Rotary.apply(query, *(angles if only is None else [each[:, :, only] for each in angles]), True)
        key = _Rotary.apply(key, *angles, True)
    else:
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    mixed, _weights = packed_attention(
        attention,
        query,
        key,
        value.transpose(1, 2),
        None,
        segments=segments,
        needed_only=only is not None,
        by_trial=by_trial,
        scaling=attention.scaling,
        sliding_window=window,
    )
    return mixed


def _linear(layer: nn.Linear | LoraLinear, only: Tensor | None = None) -> Linear:
    """A linear layer for all tokens of a row, or only for some."""
    return layer.linear(only) if isinstance(layer, LoraLinear) else plain_linear(layer)


class _Rotary(Function):
    """Rotary position embeddings (Su et al. 2021, eq. 34) of [trials, T, heads, size].

    The result has the same shape, or with `heads_first` [trials, heads, T, size]; the angles are broadcast to it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, heads_first: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads_first = heads_first
        x = x.transpose(1, 2) if heads_first else x
        return _rotate(x, cos, sin, x.new_empty(x.shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        cos, sin = ctx.saved_tensors
        grad = grad.transpose(1, 2) if ctx.heads_first else grad
        result = grad.new_empty(grad.shape)
        seen = (grad.transpose(1, 2), result.transpose(1, 2)) if ctx.heads_first else (grad, result)
        _rotate(seen[0], cos, -sin, seen[1])  # the transpose of a rotation is the one back
        return result, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Rotate pairs of a head's elements, the first half with the second, by the angles of their positions."""
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
