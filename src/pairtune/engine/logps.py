"""Log-probs of answer tokens from hidden states, without ever holding a [tokens, vocabulary] matrix.

With Qwen2's 151,936 words that matrix, in float32 and kept for the backward pass, is what fills a small card. Here
hidden states go through the head a chunk at a time. The gradient of a log-prob by its hidden state,
W[y] - softmax(h W) W, needs the same softmax, so it is computed in the same pass and kept ([tokens, size], small) until
the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import linear

# Numbers of logits at a time: a chunk in float32 is 32 MB, which stays near the processor.
_CHUNK_LOGITS = 8 << 20


def token_logps(
    hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, *, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs of target tokens, and the mean of the logits that they were picked from.

    Args:
        hidden: [N, size], of the places that predict the targets.
        head: [vocabulary, size], the output embedding.
        bias: [vocabulary], or None.
        targets: [N].
        softcap: logits are bent below this value (Gemma 2); None: not.

    Returns:
        Two of [N], float32; log-probs in nats. The means carry no gradient.
    """
    logps, means = _TokenLogps.apply(hidden, head, bias, targets, softcap)
    return logps, means


class _TokenLogps(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        logps, means = torch.empty(2, len(targets), dtype=torch.float32, device=hidden.device)
        by_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _chunks(len(targets), len(head)):
            logits, bend = _logits(hidden[part], head, bias, softcap)
            means[part] = logits.mean(1)
            picked = logits.gather(1, targets[part, None])
            top = logits.amax(1, keepdim=True)
            weights = logits.sub_(top).exp_()
            total = weights.sum(1, keepdim=True)
            logps[part] = (picked - top - total.log())[:, 0]
            if by_hidden is not None:
                by_hidden[part] = _by_logits(weights.div_(total), bend, targets[part]).to(head.dtype) @ head
        ctx.softcap = softcap
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
            for part in _chunks(len(targets), len(head)):
                logits, bend = _logits(hidden[part], head, bias, ctx.softcap)
                by_logits = _by_logits(logits.softmax(1), bend, targets[part]).mul_(grad[part])
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
        )


def _chunks(tokens: int, words: int) -> list[slice]:
    # At least 16 tokens: products of fewer rows take another kernel with other last bits.
    size = max(16, _CHUNK_LOGITS // words)
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits in float32, and the derivative of their bend."""
    logits = linear(hidden, head, bias).float()
    if softcap is None:
        return logits, None
    bent = torch.tanh(logits / softcap)
    return bent * softcap, 1 - bent**2


def _by_logits(probabilities: Tensor, bend: Tensor | None, targets: Tensor) -> Tensor:
    """The derivative of the targets' log-probs, one-hot minus probabilities, in the probabilities' place."""
    by_logits = probabilities.neg_()
    by_logits[torch.arange(len(targets), device=targets.device), targets] += 1
    return by_logits if bend is None else by_logits.mul_(bend)
