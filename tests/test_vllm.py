"""A tuned adapter at another server: exported, loaded as vLLM loads adapters, listed and talked to through `--backend`.

The server is a stand-in that speaks vLLM's endpoints; vLLM itself needs a GPU.
"""

from __future__ import annotations

import asyncio
import os

import httpx
import pytest
from conftest import small_run
from talker import VllmTalker, talking

from pairtune.publish.export import export_run

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "pairtune.web.settings")


@pytest.fixture
def backend(monkeypatch):
    import django

    django.setup()
    from pairtune.web import backend

    backend._client_of.cache_clear()
    monkeypatch.setattr(backend, "_model_list", backend._ModelList())
    return backend


def test_an_exported_adapter_is_loaded_listed_and_talked_to(tiny_model, tmp_path, backend, monkeypatch):
    from django.conf import settings

    run = small_run(tiny_model, tmp_path / "tuned")
    export_run(run, "adapter", tmp_path / "adapter")

    async def talk(model):
        return [part async for part in backend.answer(model, [{"role": "user", "content": "Hello"}], {"max_tokens": 8})]

    with talking(VllmTalker) as (address, server):
        monkeypatch.setattr(settings, "PAIRTUNE_BACKEND", address)
        asked = {"lora_name": "tuned", "lora_path": str(tmp_path / "adapter")}
        assert "added successfully" in httpx.post(f"{address}/v1/load_lora_adapter", json=asked).text
        adapter, base = asyncio.run(backend.models())
        assert (adapter.id, adapter.base, adapter.is_base, adapter.label) == ("tuned", "my-base", False, "tuned")
        assert (base.id, base.base, base.is_base, base.label) == ("my-base", "my-base", True, "my-base (base)")
        backend._client_of.cache_clear()
        parts = asyncio.run(talk("tuned"))
        assert "".join(part.text for part in parts) == "You said: Hello"
        assert server.asked[-1]["model"] == "tuned"
        assert server.asked[-1]["max_tokens"] == 8

        httpx.post(f"{address}/v1/unload_lora_adapter", json=asked)
        backend._client_of.cache_clear()
        with pytest.raises(backend.Unanswered, match="The model tuned is no longer available") as refused:
            asyncio.run(talk("tuned"))
        assert refused.value.remedy == "models"
