"""A model with its adapters, as the engine sees it: packed pairs in, log-probs of their answers out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pairtune.data.table import TokenIds
from pairtune.engine.attention import ATTENTION
from pairtune.engine.logps import token_logps
from pairtune.engine.lora import LoraLinear
from pairtune.engine.norms import replace_norms
from pairtune.engine.packing import Pack, pack_batches, pad_pairs
from pairtune.errors import BadInput
from pairtune.runs import fingerprint

# Families whose attention goes through transformers' AttentionInterface and hands keywords on; each has a test.
PACKED_FAMILIES = frozenset(
    {"llama", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "mistral", "phi", "phi3"}
)

# Tokens of a row. Larger rows keep more activations until the backward pass, and beyond this multiply no faster.
TRAIN_TOKENS = 1024
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
        share_prompts: False lays each answer out with a prompt of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapted: dict[str, LoraLinear] | None = None,
        trials: int = 1,
        *,
        share_prompts: bool = True,
    ) -> None:
        self.model, self.adapted, self.trials = model, adapted or {}, trials
        self.share_prompts = share_prompts
        replace_norms(model)
        self.packed = model.config.model_type in PACKED_FAMILIES
        if self.packed:
            model.set_attn_implementation(ATTENTION)
        self.head = model.get_output_embeddings()
        if not isinstance(self.head, torch.nn.Linear):
            raise BadInput(f"--model: {type(model).__name__} has no plain output embedding; use --engine trl")
        if getattr(model.config, "logits_scaling", 1) != 1 or getattr(model.config, "logit_scale", 1) != 1:
            raise BadInput(f"--model: {type(model).__name__} scales its logits; use --engine trl")

    def checkpoint_activations(self) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again: less memory, more work."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # this layer's own flag alone: dropout inside it stays off

    @property
    def softcap(self) -> float | None:
        """The value below which the model bends its logits, or None."""
        softcap: float | None = getattr(self.model.config, "final_logit_softcapping", None)
        return softcap

    @property
    def slack(self) -> float:
        """Nats by which the log-prob of an answer may depend on what else is in its row; 0: not at all.

        On a CPU a packed pair's numbers are the same bits in any row: products are the same row by row (from 16 rows
        on), and attention is computed pair by pair.
        """
        if self.packed and self.model.device.type == "cpu":
            return 0.0
        return 1e-3 if self.model.dtype == torch.float32 else 0.25

    def rows(self, pairs: Sequence[TokenIds], max_tokens: int) -> Iterator[Pack]:
        """Pairs in rows for `answer_logps`."""
        if self.packed:
            return pack_batches(pairs, max_tokens, self.model.device, share_prompts=self.share_prompts)
        return pad_pairs(pairs, max_tokens, self.model.device)

    def train(self, training: bool) -> None:
        """Switch the adapters' dropout on or off; the model's own is never used."""
        for layer in self.adapted.values():
            layer.train(training)

    def draw_dropout(self, *numbers: int) -> None:
        """Say what the adapters' dropout is drawn from for the coming row: the same numbers give the same dropout."""
        for place, layer in enumerate(self.adapted.values()):
            if layer.dropout:
                layer.noise = int(fingerprint(map(str, (*numbers, place))), 16) >> 1  # a seed has 63 bits

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
        ids, positions = pack.input_ids, pack.positions
        how: dict[str, Any] = {"attention_mask": pack.mask}
        if self.packed:
            ids, positions = ids.expand(self.trials, -1), positions.expand(self.trials, -1)
            how = {"segments": pack.segments}
        states = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False, **how)
        hidden: Tensor = states.last_hidden_state
        return hidden.reshape(self.trials, -1, hidden.shape[-1])

    def _count(self, pack: Pack, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logps, logits = token_logps(hidden, self.head.weight, self.head.bias, pack.targets, softcap=self.softcap)
        zeros = torch.zeros(len(pack.answer_tokens), device=hidden.device)
        return (
            zeros.index_add(0, pack.answers, logps),
            zeros.index_add(0, pack.answers, logits) / pack.answer_tokens,
        )
