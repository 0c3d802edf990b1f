"""What models do to their scores and logits: soft-capping (Gemma 2, Gemma Team 2024, section 2), by which values stay
below a cap, `cap * tanh(x / cap)`; and scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig


def final_softcap(config: PretrainedConfig) -> float | None:
    """The cap of a model's logits; None if they are not capped."""
    cap: float | None = getattr(config, "final_logit_softcapping", None)
    return cap


def logit_scale(config: PretrainedConfig) -> float:
    """What logits are multiplied by: `logit_scale` (Cohere), 1 / `logits_scaling` (Granite), or 1."""
    divided: float = getattr(config, "logits_scaling", None) or 1.0
    scale: float = getattr(config, "logit_scale", None) or 1.0
    return scale / divided


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """The capped values; `x` itself if there is no cap."""
    return x if cap is None else torch.tanh(x / cap) * cap


def soft_cap_(x: Tensor, cap: float | None) -> Tensor | None:
    """Cap in place and return the derivative; None if there is no cap."""
    if cap is None:
        return None
    capped = torch.tanh_(x.div_(cap))
    derivative = 1 - capped**2
    capped.mul_(cap)
    return derivative
