"""Log-probs of answer tokens from hidden states, without ever holding a [tokens, vocabulary] matrix.

With Qwen2's vocabulary of 151,936 tokens, that matrix, in float32 and kept for the backward pass, fills a small GPU.
Here hidden states go through the head one chunk at a time. The gradient of a log-prob with respect to its hidden state,
W[y] - softmax(h W) W, needs the same softmax, so it is computed in the same pass and kept ([tokens, size], small) until
the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pairtune.engine.products import PLAIN, Products
from pairtune.engine.softcap import soft_cap_
from pairtune.footprint import ACCELERATOR_LOGITS, CHUNK_LOGITS


def token_logps(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    softcap: float | None = None,
    products: Products = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Log-probs of target tokens, and the mean logit over the vocabulary at each of their positions.

    Args:
        hidden: [N, size], hidden states at the positions that predict the targets.
        head: [vocabulary, size], the output embedding.
        bias: [vocabulary], or None.
        targets: [N].
        softcap: cap of the logits' soft-capping (Gemma 2); None: no capping.
        products: how products are computed.

    Returns:
        Two of [N], float32; log-probs in nats. The means carry no gradient.
    """
    logps, means = _TokenLogps.apply(hidden, head, bias, targets, softcap, products)
    return logps, means


class _TokenLogps(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        products: Products,
    ) -> tuple[Tensor, Tensor]:
        logps, means = torch.empty(2, len(targets), dtype=torch.float32, device=hidden.device)
        by_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        wide = None
        for part in _chunks(len(targets), head, products):
            logits = products.matmul(hidden[part], head.T, bias)
            if wide is None:  # one buffer for all chunks: reusing memory is faster than allocating it
                wide = torch.empty_like(logits, dtype=torch.float32)
            weights = wide[: len(logits)].copy_(logits)
            bend = soft_cap_(weights, softcap)
            means[part] = weights.mean(1)
            picked = weights.gather(1, targets[part, None])
            top = weights.amax(1, keepdim=True)
            total = weights.sub_(top).exp_().sum(1, keepdim=True)
            logps[part] = (picked - top - total.log())[:, 0]
            if by_hidden is not None:
                target = head[targets[part]]
                if bend is not None:
                    target = target * bend.gather(1, targets[part, None])
                    weights.mul_(bend)
                # Normalised after the product: the same result with fewer passes over the vocabulary.
                by_hidden[part] = target - products.matmul(logits.copy_(weights), head) / total
        ctx.softcap, ctx.products = softcap, products
        ctx.save_for_backward(by_hidden, hidden, head, bias, targets)
        ctx.mark_non_differentiable(means)
        return logps, means

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0][:, None]
        by_hidden, hidden, head, bias, targets = ctx.saved_tensors
        by_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        by_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        if by_head is not None or by_bias is not None:
            for part in _chunks(len(targets), head, ctx.products):
                logits = ctx.products.matmul(hidden[part], head.T, bias).float()
                bend = soft_cap_(logits, ctx.softcap)
                by_logits = logits.softmax(1).neg_()
                by_logits[torch.arange(len(by_logits), device=targets.device), targets[part]] += 1
                by_logits.mul_(grad[part] if bend is None else grad[part] * bend)
                if by_head is not None:
                    by_head += by_logits.to(head.dtype).T @ hidden[part]
                if by_bias is not None:
                    by_bias += by_logits.sum(0)
        return (
            None if by_hidden is None else (by_hidden * grad).to(hidden.dtype),
            None if by_head is None else by_head.to(head.dtype),
            None if by_bias is None else by_bias.to(head.dtype),
            None,
            None,
            None,
        )


Head = tuple[Tensor, Tensor, Tensor | None]


@torch.no_grad()
def token_kl(ours: Head, base: Head, *, softcap: float | None = None, products: Products = PLAIN) -> Tensor:
    """KL(ours || base) between two models' next-token distributions.

    Args:
        ours: hidden states [N, size], the output embedding [vocabulary, size] and its bias or None.
        base: the same for the model to compare with, at the same positions.
        softcap: see `token_logps`.
        products: see `token_logps`.

    Returns:
        [N], nats, float32.
    """
    kl = torch.empty(len(ours[0]), dtype=torch.float32, device=ours[0].device)
    for part in _chunks(len(kl), ours[1], products):
        logps, base_logps = (
            _log_softmax(products.matmul(hidden[part], head.T, bias), softcap) for hidden, head, bias in (ours, base)
        )
        kl[part] = (logps.exp() * (logps - base_logps)).sum(1)
    return kl


def _log_softmax(logits: Tensor, softcap: float | None) -> Tensor:
    logits = logits.float()
    soft_cap_(logits, softcap)
    return logits.log_softmax(1)


def _chunks(tokens: int, head: Tensor, products: Products) -> list[slice]:
    """Slices of whole tiles, so that only the last tile is padded."""
    least = products.tile or products.least
    logits = CHUNK_LOGITS if head.device.type == "cpu" else ACCELERATOR_LOGITS
    size = max(1, logits // len(head) // least) * least
    return [slice(start, start + size) for start in range(0, tokens, size)]
