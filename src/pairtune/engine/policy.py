"""A model with its adapters, as the engine sees it: packed pairs in, log-probs of their answers out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pairtune.data.table import TokenIds
from pairtune.engine.kernels import Kernels
from pairtune.engine.logps import token_logps
from pairtune.engine.lora import LoraLinear
from pairtune.engine.norms import replace_norms
from pairtune.engine.packed_attention import ATTENTION
from pairtune.engine.packing import Pack, pack_batches, pad_pairs
from pairtune.engine.products import PLAIN, replace_linears
from pairtune.engine.softcap import final_softcap, soft_cap
from pairtune.errors import BadInput
from pairtune.files import fingerprint

# Families whose attention goes through transformers' AttentionInterface and hands keywords on; each has a test.
PACKED_FAMILIES = frozenset(
    {"llama", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "mistral", "phi", "phi3"}
)

# Tokens of a row in training, of each trial: the same however many trials there are, so that gradients add up in the
# same order. Larger rows keep more activations until the backward pass, and beyond this multiply no faster.
TRAIN_TOKENS = 512
# Of all trials together, where nothing is kept.
EVALUATION_TOKENS = 4096

# Places of an answer, evenly spaced, whose last hidden states are kept where they are asked for.
STATES = 8


@dataclass(frozen=True)
class AnswerLogps:
    """Of the answers of a row: 2i is the chosen, 2i + 1 the rejected answer of pair i.

    Attributes:
        logps: summed over the answer's tokens, [trials, 2 * pairs], nats, float32.
        logits: mean over the answer's tokens and the vocabulary, [trials, 2 * pairs].
        states: last hidden states at some places of the answers, where they were asked for, else empty:
            [trials, pairs, 2 * STATES, size].
    """

    logps: Tensor
    logits: Tensor
    states: Tensor


class Policy:
    """A causal language model, K adapters on it, and the way pairs go through them.

    Args:
        model: of transformers; switched to packed attention where its family is known to work with it.
        adapted: its layers with adapters; empty when the whole model is trained or only read.
        trials: K; 1 without adapters.
        kernels: how products are computed on this machine; the library's own way where none are given.
        share_prompts: False lays each answer out with a prompt of its own.

    Raises:
        BadInput: the model's logits are not its last hidden states times its output embedding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapted: dict[str, LoraLinear] | None = None,
        trials: int = 1,
        kernels: Kernels | None = None,
        *,
        share_prompts: bool = True,
    ) -> None:
        self.model, self.adapted, self.trials = model, adapted or {}, trials
        self.kernels, self.share_prompts = kernels, share_prompts
        self.head = model.get_output_embeddings()
        if not self.adapted and model.config._attn_implementation != ATTENTION:  # else it was checked before
            check_head(model)
        replace_norms(model)
        self.packed = model.config.model_type in PACKED_FAMILIES
        if self.packed:
            model.set_attn_implementation(ATTENTION)
        self._use_products()

    def _use_products(self) -> None:
        """Let everything that multiplies do so as the model's type needs it on this machine."""
        self.products = self.kernels.products(self.model.dtype) if self.kernels else PLAIN
        replace_linears(self.model, self.products)
        for layer in self.adapted.values():
            layer.products = self.products

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Let the base compute in a wider type for a while; its weights come back bit for bit."""
        own = self.model.dtype
        widened = [each for each in self.model.parameters() if each.dtype == own] if dtype != own else []
        for parameter in widened:
            parameter.data = parameter.data.to(dtype)
        self._use_products()
        try:
            yield
        finally:
            for parameter in widened:
                parameter.data = parameter.data.to(own)
            self._use_products()

    def checkpoint_activations(self) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again: less memory, more work."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # this layer's own flag alone: dropout inside it stays off

    @property
    def softcap(self) -> float | None:
        """The value below which the model bends its logits, or None."""
        return final_softcap(self.model.config)

    def rows(self, pairs: Sequence[TokenIds], max_tokens: int) -> Iterator[Pack]:
        """Pairs in rows for `answer_logps`."""
        if self.packed:
            return pack_batches(pairs, max_tokens, self.model.device, share_prompts=self.share_prompts)
        return pad_pairs(pairs, max_tokens, self.model.device)

    def train(self, training: bool) -> None:
        """Switch the adapters' dropout on or off; the model's own is never used."""
        for layer in self.adapted.values():
            layer.train(training)

    def draw_dropout(self, pack: Pack, pairs: Sequence[int], *numbers: int) -> None:
        """Say what the adapters' dropout is drawn from for the coming row.

        Args:
            pack: the row.
            pairs: the numbers of its pairs; a pair's dropout depends on its own number alone.
            numbers: what else it depends on.
        """
        for place, layer in enumerate(self.adapted.values()):
            if layer.dropout:
                seeds = (int(fingerprint(map(str, (*numbers, pair, place))), 16) >> 1 for pair in pairs)  # of 63 bits
                layer.noise = tuple(zip(seeds, pack.places_of_pairs, strict=True))

    def keep(self, trials: list[int]) -> None:
        """Drop all adapters but these."""
        self.trials = len(trials)
        for layer in self.adapted.values():
            layer.keep(trials)

    def answer_logps(self, pack: Pack, *, keep_states: bool = False) -> AnswerLogps:
        """Log-probs of a row's answers under every trial's adapter."""
        hidden = self._hidden(pack)[:, pack.predicting]
        counted = [self._count(pack, hidden[trial]) for trial in range(self.trials)]
        logps, logits = (torch.stack(values) for values in zip(*counted, strict=True))
        states = hidden[:, pack.places(STATES)] if keep_states else hidden[:, :0]
        shape = (self.trials, pack.pairs, 2 * STATES if keep_states else 0, hidden.shape[-1])
        return AnswerLogps(logps, logits, states.reshape(shape))

    def _hidden(self, pack: Pack) -> Tensor:
        """Last hidden states, [trials, tokens of the row, size]."""
        ids, positions = (each.repeat(self.trials, 1) for each in (pack.input_ids, pack.positions))
        how: dict[str, Any] = {"segments": pack.segments, "by_trial": self.products.by_trial}
        if pack.mask is not None:
            how = {"attention_mask": pack.mask.repeat(self.trials, 1)}
        states = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False, **how)
        hidden: Tensor = states.last_hidden_state
        return hidden.reshape(self.trials, -1, hidden.shape[-1])

    def _count(self, pack: Pack, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logps, logits = token_logps(
            hidden, self.head.weight, self.head.bias, pack.targets, softcap=self.softcap, products=self.products
        )
        zeros = torch.zeros(len(pack.answer_tokens), device=hidden.device)
        return (
            zeros.index_add(0, pack.answers, logps),
            zeros.index_add(0, pack.answers, logits) / pack.answer_tokens,
        )


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a model's parameters in place, and no buffers: rotary frequencies stay exact."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare a model's logits with what the engine computes: last hidden states times the output embedding, bent.

    Raises:
        BadInput: they differ: there is a transform, a scale or nothing of the kind in between.
    """
    head = model.get_output_embeddings()
    refused = BadInput(
        f"--model: {type(model).__name__} computes its logits by more than its output embedding; use --engine trl"
    )
    if not isinstance(head, torch.nn.Linear):
        raise refused
    seen: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        ids = torch.arange(_HEAD_TOKENS, device=model.device).remainder(head.out_features)[None]
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        hook.remove()
    ours = head(seen[-1][0]).float() if seen and seen[-1].shape[-1] == head.in_features else logits.new_zeros(1)
    ours = soft_cap(ours, final_softcap(model.config))
    if ours.shape != logits.shape or (ours - logits).abs().max() > _HEAD_ROOM * logits.abs().max():
        raise refused


# Tokens that a head is checked with, and the share of the largest logit by which rounding may move one.
_HEAD_TOKENS, _HEAD_ROOM = 16, 0.02
