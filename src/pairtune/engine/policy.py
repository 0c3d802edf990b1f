"""A model with its adapters as the engine uses it: packed pairs in, log-probs of their answers out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pairtune.data.table import TokenIds
from pairtune.engine.kernels import Kernels
from pairtune.engine.layers import replace_layers
from pairtune.engine.linears import replace_linears
from pairtune.engine.logps import token_logps
from pairtune.engine.lora import FlatAdapters, LoraLinear
from pairtune.engine.norms import replace_norms
from pairtune.engine.packed_attention import ATTENTION
from pairtune.engine.packing import Pack, pack_batches, pad_pairs
from pairtune.engine.products import PLAIN
from pairtune.engine.row_graphs import RowGraphs
from pairtune.engine.row_layout import RowLayout, takes_whole_rows
from pairtune.engine.softcap import final_softcap, logit_scale, soft_cap
from pairtune.errors import BadInput
from pairtune.files import fingerprint
from pairtune.footprint import ACCELERATOR_EVALUATION_ROW, ACCELERATOR_ROWS, EVALUATION_ROW, ROW_TOKENS

if TYPE_CHECKING:
    from pairtune.engine.sharding import ShardedWeights

T = TypeVar("T")

# Model families whose attention uses transformers' AttentionInterface and passes keywords on; each has a test.
PACKED_FAMILIES = frozenset(
    {
        *("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"),
        *("phi", "phi3", "cohere"),
        *("olmo", "olmo2", "olmo3", "granite", "gpt_neox", "starcoder2", "glm", "glm4", "exaone4", "helium"),
        *("ernie4_5", "hunyuan_v1_dense", "seed_oss", "arcee", "apertus"),
    }
)

# Tokens per row and trial in training: the same for any number of trials, so that gradients are accumulated in the same
# order. Larger rows keep more activations for the backward pass, and beyond this size products get no faster.
TRAIN_TOKENS = ROW_TOKENS
# Tokens per row for all trials together in evaluation, where no activations are kept.
EVALUATION_TOKENS = EVALUATION_ROW
# The same on an accelerator, which needs longer rows to be busy.
TRAIN_TOKENS_THERE, EVALUATION_TOKENS_THERE = ACCELERATOR_ROWS[0], ACCELERATOR_EVALUATION_ROW

# Evenly spaced positions of an answer whose last hidden states are kept on request.
STATES = 8


@dataclass(frozen=True)
class AnswerLogps:
    """Outputs for the answers of a row: 2i is the chosen, 2i + 1 the rejected answer of pair i.

    Where entries have a single answer, read 1 for the 2 in these shapes.

    Attributes:
        logps: summed over the answer's tokens, [trials, 2 * pairs], nats, float32.
        logits: mean over the answer's tokens and the vocabulary, [trials, 2 * pairs].
        states: last hidden states at some positions of the answers, [trials, pairs, 2 * STATES, size]; empty unless
            requested.
    """

    logps: Tensor
    logits: Tensor
    states: Tensor


class Policy:
    """A causal language model with K adapters, and the forward pass of pairs through them.

    Args:
        model: a transformers model; switched to packed attention if its family supports it.
        adapted: its layers with adapters; empty for full training and for evaluating the model as it is.
        trials: K; 1 without adapters.
        kernels: how products are computed on this machine; by default as the library computes them.
        share_prompts: False gives each answer its own copy of the prompt.
        sharded: the model's weights, if several processes divide them.

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
        sharded: ShardedWeights | None = None,
    ) -> None:
        self.model, self.adapted, self.trials = model, adapted or {}, trials
        self.kernels, self.share_prompts, self.sharded = kernels, share_prompts, sharded
        self.head = model.get_output_embeddings()
        self._graphs: RowGraphs | None = None
        if not self.adapted and model.config._attn_implementation != ATTENTION:  # otherwise it has been checked already
            check_head(model)
        replace_norms(model)
        self.packed = model.config.model_type in PACKED_FAMILIES
        if self.packed:
            model.set_attn_implementation(ATTENTION)
        self.flat = FlatAdapters(self.adapted) if self.adapted and takes_whole_rows(model.device) else None
        self._use_products()

    def _use_products(self) -> None:
        """Make all layers compute their products as the model's dtype requires on this machine."""
        self.products = self.kernels.products(self.dtype) if self.kernels else PLAIN
        replace_linears(self.model, self.products)
        self.needed_only = self.packed and replace_layers(self.model, self.products)
        for layer in self.adapted.values():
            layer.products = self.products
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """Drop the CUDA graphs and their memory: after weights or gradients were replaced, or memory ran out."""
        self._graphs = None

    @property
    def evaluation_tokens(self) -> int:
        """Tokens per row for all trials together in evaluation."""
        return EVALUATION_TOKENS if self.model.device.type == "cpu" else EVALUATION_TOKENS_THERE

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        own: torch.dtype = self.model.dtype
        return self.sharded.dtype if self.sharded else own

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Compute in a wider dtype within the context; the weights are restored bit for bit."""
        own = self.dtype
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
        """Activation checkpointing: keep only each layer's input for the backward pass and recompute the rest."""
        # Dropout has generators of its own, so that the state of the global ones need not be kept for the second pass.
        self.model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        self.forget_graphs()
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # only this module's flag: dropout inside it stays off

    @property
    def logit_scale(self) -> float:
        """What hidden states are multiplied by before the output embedding."""
        return logit_scale(self.model.config)

    @property
    def softcap(self) -> float | None:
        """The cap of the model's logits (see `engine.softcap`), or None."""
        return final_softcap(self.model.config)

    def rows(self, pairs: Sequence[TokenIds], max_tokens: int) -> Iterator[Pack]:
        """Pack or pad pairs into rows for `answer_logps`."""
        if self.packed:
            return pack_batches(pairs, max_tokens, self.model.device, share_prompts=self.share_prompts)
        return pad_pairs(pairs, max_tokens, self.model.device)

    def train(self, training: bool) -> None:
        """Switch the adapters' dropout on or off; the base model's own dropout is never used."""
        for layer in self.adapted.values():
            layer.train(training)

    def draw_dropout(self, pack: Pack, pairs: Sequence[int], *numbers: int) -> None:
        """Set the seeds of the adapters' dropout for the next row.

        Args:
            pack: the row.
            pairs: the row numbers of its pairs in their table; a pair's dropout depends on no other pair.
            numbers: further numbers that go into the seeds.
        """
        for index, layer in enumerate(self.adapted.values()):
            if layer.dropout:
                seeds = (int(fingerprint(map(str, (*numbers, pair, index))), 16) >> 1 for pair in pairs)  # 63 bits
                padding = ((0, pack.padding),) if pack.padding else ()
                layer.noise = (*zip(seeds, pack.pair_widths, strict=True), *padding)

    def keep(self, trials: list[int]) -> None:
        """Drop all adapters but these."""
        self.trials = len(trials)
        for layer in self.adapted.values():
            layer.keep(trials)
        if self.flat:
            self.flat.gather()
        self.forget_graphs()

    def in_step(self, items: Iterable[T]) -> Iterator[T]:
        """Go through items, with each of which `answer_logps` is called once; see `ShardedWeights.in_step`."""
        if not self.sharded:
            return iter(items)
        (idle,) = self.rows([TokenIds([0], [0], [0])], self.evaluation_tokens)
        return self.sharded.in_step(items, lambda: self.answer_logps(idle).logps)

    def answer_logps(self, pack: Pack, *, keep_states: bool = False) -> AnswerLogps:
        """Log-probs of a row's answers under every trial's adapter."""
        compute = partial(self._answer_logps, pack, keep_states)
        return AnswerLogps(*(self.sharded.gathered(compute) if self.sharded else compute()))

    def _answer_logps(self, pack: Pack, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self._hidden(pack)
        if not takes_whole_rows(self.model.device):
            summed = [self._sum_by_answer(pack, hidden[trial]) for trial in range(self.trials)]
            logps, logits = (torch.stack(values) for values in zip(*summed, strict=True))
        else:
            logps, logits = self._sums_of_all(pack, hidden)
        states = hidden[:, pack.spaced_indices(STATES)] if keep_states else hidden[:, :0]
        shape = (self.trials, pack.pairs, pack.answers_each * STATES if keep_states else 0, hidden.shape[-1])
        states = states.reshape(shape)
        if self.sharded:  # FSDP2 warns of views with gradients, for fear of changes in place
            return logps.clone(), logits, states.detach()
        return logps, logits, states

    def _hidden(self, pack: Pack) -> Tensor:
        """Last hidden states, scaled for the head, where they predict the answers' tokens: [trials, N, size]."""
        states, scale = self._predicting_states(pack), self.logit_scale
        return states if scale == 1 else states * scale

    def _predicting_states(self, pack: Pack) -> Tensor:
        if pack.layout is not None:
            states = self._replayed(pack)
            if states is None:
                states = self._states_of_row(pack.input_ids, pack.positions, pack.layout)
            return states.index_select(1, pack.predicting)
        ids, positions = (each.repeat(self.trials, 1) for each in (pack.input_ids, pack.positions))
        attention: dict[str, Any] = {"segments": pack.segments, "by_trial": self.products.by_trial}
        predicting = pack.predicting
        if pack.mask is not None:
            attention = {"attention_mask": pack.mask.repeat(self.trials, 1)}
        elif self.needed_only:
            attention["needed"] = pack.needed
            predicting = torch.searchsorted(attention["needed"], predicting)
        states = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False, **attention)
        hidden: Tensor = states.last_hidden_state
        return hidden.reshape(self.trials, -1, hidden.shape[-1])[:, predicting]

    def _states_of_row(self, ids: Tensor, positions: Tensor, layout: RowLayout) -> Tensor:
        """Last hidden states of all T tokens of a row on an accelerator, [trials, T, size]."""
        if self.flat:
            self.flat.spread(self.model.dtype)
        both = {"input_ids": ids.expand(self.trials, -1), "position_ids": positions.expand(self.trials, -1)}
        states: Tensor = self.model.base_model(**both, use_cache=False, segments=layout).last_hidden_state
        return states

    def _replayed(self, pack: Pack) -> Tensor | None:
        """The same through a CUDA graph; None where there are none: without gradients, or with dropout, say."""
        dropout = any(layer.dropout and layer.training for layer in self.adapted.values())
        if self.model.device.type != "cuda" or not torch.is_grad_enabled() or not self.flat or dropout:
            return None
        if self._graphs is None:
            self._graphs = RowGraphs(self._states_of_row, self.trials)
        return self._graphs.states(pack)

    def _sums_of_all(self, pack: Pack, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Sums by answer as below, [trials, answers] each, for all trials at once and without atomic additions."""
        targets, lengths = pack.targets.repeat(self.trials), pack.answer_tokens.repeat(self.trials)
        both = token_logps(
            hidden.flatten(0, 1),
            self.head.weight,
            self.head.bias,
            targets,
            softcap=self.softcap,
            products=self.products,
        )
        logps, logits = (torch.segment_reduce(each, "sum", lengths=lengths, unsafe=True) for each in both)
        return logps.view(self.trials, -1), (logits / lengths).view(self.trials, -1)

    def _sum_by_answer(self, pack: Pack, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logps, logits = token_logps(
            hidden, self.head.weight, self.head.bias, pack.targets, softcap=self.softcap, products=self.products
        )
        zeros = torch.zeros(len(pack.answer_tokens), device=hidden.device)
        return (
            zeros.index_add(0, pack.answers, logps),
            zeros.index_add(0, pack.answers, logits) / pack.answer_tokens,
        )


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a model's parameters in place, but not its buffers: rotary frequencies stay exact."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Check that a model's logits are its last hidden states times its output embedding, scaled and soft-capped if
    configured.

    Raises:
        BadInput: they are not: the model transforms them, or has no such output embedding.
    """
    head = model.get_output_embeddings()
    refused = BadInput(
        f"--model: the logits of {type(model).__name__} are not hidden states times output embedding; use --engine trl"
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
    fits = bool(seen) and seen[-1].shape[-1] == head.in_features
    ours = head(seen[-1][0] * logit_scale(model.config)).float() if fits else logits.new_zeros(1)
    ours = soft_cap(ours, final_softcap(model.config))
    if ours.shape != logits.shape or (ours - logits).abs().max() > _HEAD_ROOM * logits.abs().max():
        raise refused


# Tokens for checking a head, and the fraction of the largest logit by which rounding may change one.
_HEAD_TOKENS, _HEAD_ROOM = 16, 0.02
