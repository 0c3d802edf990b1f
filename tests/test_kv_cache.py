"""The KV cache takes memory for what is written, and gives it back."""

from __future__ import annotations

import mmap
import sys

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pairtune.serve.kv_cache import KVCache, PrefillChunk

CONTEXT, SLOTS, LAYERS, HEADS, SIZE = 8192, 4, 2, 4, 64
TOKEN = 2 * LAYERS * HEADS * SIZE * 4  # bytes


@pytest.fixture
def cache():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=HEADS * SIZE,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    )
    return KVCache(LlamaForCausalLM(config), SLOTS, CONTEXT)


def write(cache, slot, start, length):
    chunk = PrefillChunk(slot, start, length)
    cache.reserve([(slot, chunk.end)])
    values = torch.randn(2, HEADS, length, SIZE)
    for layer in range(LAYERS):
        cache.write_chunk(layer, chunk, *values)
    return values


def taken(cache):
    """Bytes of the cache's own mappings that are in memory: the process's also hold what the allocator keeps."""
    starts = [tensor.data_ptr() for tensor in cache._keys + cache._values]
    total = 0
    for mapping in psutil.Process().memory_maps(grouped=False):
        first, last = (int(address, 16) for address in mapping.addr.split("-"))
        total += mapping.rss if any(first <= start < last for start in starts) else 0
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count and give back memory in their own ways")
def test_memory_is_taken_for_what_is_written_and_given_back(cache):
    before = taken(cache)
    assert cache.bytes == 0
    write(cache, 1, 0, CONTEXT)
    full = taken(cache) - before
    assert cache.bytes == TOKEN * CONTEXT
    assert full == cache.bytes, "one slot of four, in whole pages"
    cache.forget(1, 100)
    assert cache.bytes == TOKEN * 100
    kept = taken(cache) - before
    partial_pages = 2 * LAYERS * HEADS * mmap.PAGESIZE
    assert cache.bytes <= kept <= cache.bytes + partial_pages


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 100, 300])
def test_what_is_kept_stays_as_it_was(cache, tokens):
    others = {slot: write(cache, slot, 0, 300) for slot in (0, 1, 2)}
    cache.forget(1, tokens)
    for layer in range(LAYERS):
        for slot, values in others.items():
            kept = tokens if slot == 1 else 300
            for cached, written in zip(cache.read_chunk(layer, PrefillChunk(slot, 0, kept)), values, strict=True):
                assert torch.equal(cached, written[:, :kept])
    more = write(cache, 1, tokens, 50)
    keys, _ = cache.read_chunk(1, PrefillChunk(1, tokens, 50))
    assert torch.equal(keys[:, tokens:], more[0])


def test_a_request_beyond_the_context_has_room_too(cache):
    kept = write(cache, 3, 0, 40)
    write(cache, 0, 0, CONTEXT + 1)
    assert cache.capacity > CONTEXT
    assert torch.equal(cache.read_chunk(0, PrefillChunk(3, 0, 40))[0], kept[0])
    cache.forget(0, 7)
    assert cache.bytes >= TOKEN * CONTEXT
