"""Forward passes of one model: from a batch of tokens to next-token logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pairtune.engine.norms import replace_norms
from pairtune.engine.policy import PACKED_FAMILIES
from pairtune.engine.softcap import final_softcap, logit_scale, soft_cap
from pairtune.serve.adapters import AdapterStack
from pairtune.serve.batch_attention import ATTENTION, ForwardBatch, slot_runs
from pairtune.serve.kv_cache import KVCache, PrefillChunk, PrefixCopy
from pairtune.serve.request import NotBatchable


@dataclass(frozen=True)
class DecodeToken:
    """The last sampled token of an answer, still to be decoded.

    Attributes:
        slot: the request's slot.
        token: the token id.
        position: its position in the sequence.
        adapter: the request's adapter; None: the base model.
    """

    slot: int
    token: int
    position: int
    adapter: str | None


@dataclass(frozen=True)
class PromptChunk:
    """A chunk of a prompt with its tokens.

    Attributes:
        chunk: its slot and positions.
        ids: its token ids.
        adapter: the request's adapter; None: the base model.
        last: whether it is the prompt's last chunk.
    """

    chunk: PrefillChunk
    ids: Sequence[int]
    adapter: str | None
    last: bool


class ModelRunner:
    """Runs batches through a model with its KV cache and adapters.

    Args:
        model: a transformers model, base or fully tuned; it is modified in place.
        slots: the number of concurrent requests.
        context: the most tokens of a request.

    Raises:
        NotBatchable: the attention of the model's family cannot be batched here.
    """

    def __init__(self, model: PreTrainedModel, slots: int, context: int) -> None:
        family = model.config.model_type
        if family not in PACKED_FAMILIES:
            raise NotBatchable(
                f"models of the family {family} cannot be served here; use vLLM or llama.cpp through --backend"
            )
        self.model = model
        replace_norms(model)
        model.set_attn_implementation(ATTENTION)
        self.adapters = AdapterStack(model)
        self.resize(slots, context)

    def resize(self, slots: int, context: int) -> None:
        """Replace the KV cache by an empty one."""
        self.cache = KVCache(self.model, slots, context)

    def forward(
        self, decoding: Sequence[DecodeToken], prompts: Sequence[PromptChunk], copies: Sequence[PrefixCopy] = ()
    ) -> Tensor:
        """Compute next-token logits for each decoding request and each completed prompt, in this order.

        Args:
            decoding: tokens of the decoding requests, in slot order.
            prompts: chunks of the prompts in prefill.
            copies: prefixes that a chunk takes over from an earlier one.

        Returns:
            Logits, [requests, vocabulary], float32.
        """
        device = self.model.device
        ids = [each.token for each in decoding]
        positions = [each.position for each in decoding]
        adapters = [each.adapter for each in decoding]
        last = list(range(len(decoding)))
        for prompt in prompts:
            ids += prompt.ids
            positions += range(prompt.chunk.start, prompt.chunk.end)
            adapters += [prompt.adapter] * prompt.chunk.length
            if prompt.last:
                last.append(len(ids) - 1)
        chunks = [(prompt.chunk.slot, prompt.chunk.end) for prompt in prompts]
        self.cache.reserve([*((each.slot, each.position + 1) for each in decoding), *chunks])
        self.adapters.assign(adapters, device)
        slots, decoded = [each.slot for each in decoding], positions[: len(decoding)]
        batch = ForwardBatch(
            self.cache,
            torch.tensor(slots, dtype=torch.long, device=device),
            torch.tensor(decoded, dtype=torch.long, device=device),
            slot_runs(slots, decoded),
            tuple(prompt.chunk for prompt in prompts),
            tuple(copies),
        )
        hidden = self.model.base_model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            batch=batch,
        ).last_hidden_state
        states = hidden[0, last] * logit_scale(self.model.config)
        logits: Tensor = self.model.get_output_embeddings()(states).float()
        return soft_cap(logits, final_softcap(self.model.config))
