"""One model in memory: from a batch of tokens to the logits of the next ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pairtune.engine.norms import replace_norms
from pairtune.engine.policy import PACKED_FAMILIES
from pairtune.engine.softcap import final_softcap, soft_cap
from pairtune.serve.adapters import AdapterStack
from pairtune.serve.batch_attention import ATTENTION, ForwardBatch, slot_runs
from pairtune.serve.kv_cache import KVCache, PrefillChunk, PrefixCopy
from pairtune.serve.request import NotBatchable


@dataclass(frozen=True)
class DecodeToken:
    """The last token of an answer, which has not been through the model.

    Attributes:
        slot: of its conversation.
        token: its id.
        position: in the conversation.
        adapter: under which it is computed; None: the base.
    """

    slot: int
    token: int
    position: int
    adapter: str | None


@dataclass(frozen=True)
class PromptChunk:
    """Tokens of a prompt.

    Attributes:
        chunk: where they go.
        ids: of these tokens.
        adapter: under which they are computed; None: the base.
        last: whether the prompt ends with them.
    """

    chunk: PrefillChunk
    ids: Sequence[int]
    adapter: str | None
    last: bool


class ModelRunner:
    """See the module.

    Args:
        model: of transformers, changed in place; a base model, or a whole tuned one.
        slots: conversations at once.

    Raises:
        NotBatchable: its family's attention cannot be batched here.
    """

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        family = model.config.model_type
        if family not in PACKED_FAMILIES:
            raise NotBatchable(
                f"models of the family {family} are not served here; vLLM or llama.cpp may, with --backend"
            )
        self.model = model
        replace_norms(model)
        model.set_attn_implementation(ATTENTION)
        self.adapters = AdapterStack(model)
        self.cache = KVCache(model, slots)

    def forward(
        self, decoding: Sequence[DecodeToken], prompts: Sequence[PromptChunk], copies: Sequence[PrefixCopy] = ()
    ) -> Tensor:
        """Logits of the next token of each decoding conversation and of each prompt that ends, in this order.

        Args:
            decoding: in the order of their slots.
            prompts: chunks of prompts.
            copies: what a chunk takes over from one before it.

        Returns:
            [conversations, vocabulary], float32.
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
        self.cache.reserve(max(positions) + 1)
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
        logits: Tensor = self.model.get_output_embeddings()(hidden[0, last]).float()
        return soft_cap(logits, final_softcap(self.model.config))
