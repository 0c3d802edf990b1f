"""A stand-in for a model server, on the loopback: OpenAI's protocol, with answers that tests choose."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import uvicorn
from safetensors import safe_open
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

BASE, ADAPTER = "a" * 16, "b" * 16
# The tuned model twice, as a run's winner is listed: under the run's name, and as one of its trials.
MODELS = {"tuned": f"{BASE}+{ADAPTER}", "tuned/lr-1": f"{BASE}+{ADAPTER}", "other": f"{BASE}+{'c' * 16}", "plain": BASE}
ANSWERS = {
    "table": "| Animal | Weight |\n|---|---:|\n| elephant | 1,234,567.89 |\n| mouse | 0.000123456789 |\n",
    "code": "```python\ndef f(x):\n    return x < 1  # less\n```\n",
    "arabic": "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 (hello)",
    "maths": "The mean is $\\bar{x}$, and\n\n$$\\frac{1}{n} \\sum_{i=1}^{n} x_i$$\n",
    "long": "\n\n".join(f"Paragraph {number} of a long answer, with a few words in it." for number in range(40)),
}
TOO_LONG = "6,031 tokens are too many for this model: prompt and answer share 4,096"


def _chunk(delta: dict, reason: str | None = None, model: str = "plain") -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    head = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": model}
    return f"data: {json.dumps({**head, 'system_fingerprint': MODELS.get(model, BASE), 'choices': [choice]})}\n\n"


class Talker:
    """What the server was asked, and how quickly it answers (seconds a word), all models or single ones.

    `says` are answers of single models to whatever they are asked.
    """

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.pace = 0.0
        self.silence = 0.0  # seconds, where a prompt asks for it
        self.paces: dict[str, float] = {}
        self.says: dict[str, str] = {}

    async def models(self, _: Request) -> Response:
        base = next(name for name, fingerprint in MODELS.items() if fingerprint == BASE)
        listed = [
            {
                "id": name,
                "object": "model",
                "created": 1,
                "owned_by": "tests",
                "pairtune": {"base": base, "run": None, "fingerprint": fingerprint},
            }
            for name, fingerprint in MODELS.items()
        ]
        return JSONResponse({"object": "list", "data": listed})

    async def complete(self, request: Request) -> Response:
        asked = await request.json()
        self.asked.append(asked)
        prompt = next(turn["content"] for turn in reversed(asked["messages"]) if turn["role"] == "user")
        if "too long" in prompt:
            error = {"message": TOO_LONG, "type": "invalid_request_error", "code": "context_length_exceeded"}
            return JSONResponse({"error": error}, 400)
        text = next((answer for key, answer in ANSWERS.items() if key in prompt), f"You said: {prompt}")
        text = self.says.get(asked["model"], text)
        if asked.get("continue_final_message"):
            text = " and so on."
        if "mute" in prompt:
            await asyncio.sleep(self.silence)
        words = self._words(text, asked["model"], "cut" in prompt, "falls silent" in prompt)
        return StreamingResponse(words, media_type="text/event-stream")

    async def _words(self, text: str, model: str, cut: bool, falls_silent: bool) -> AsyncIterator[str]:
        words = text.split(" ")
        for number, word in enumerate(words):
            yield _chunk({"content": word if number == 0 else f" {word}"}, model=model)
            if falls_silent:
                await asyncio.sleep(self.silence)
            if pace := self.paces.get(model, self.pace):
                await asyncio.sleep(pace)
        yield _chunk({}, "length" if cut else "stop", model)
        yield "data: [DONE]\n\n"


class VllmTalker(Talker):
    """The same as vLLM would: no extensions of ours, adapters that are loaded by name and path."""

    base = "my-base"

    def __init__(self) -> None:
        super().__init__()
        self.adapters: dict[str, str] = {}

    async def models(self, _: Request) -> Response:
        def card(name: str, root: str, parent: str | None) -> dict:
            fixed = {"object": "model", "created": 1, "owned_by": "vllm", "max_model_len": 2048, "permission": []}
            return {"id": name, "root": root, "parent": parent, **fixed}

        listed = [card(self.base, "/models/base", None)]
        listed += [card(name, path, self.base) for name, path in self.adapters.items()]
        return JSONResponse({"object": "list", "data": listed})

    async def complete(self, request: Request) -> Response:
        asked = await request.json()
        if asked["model"] not in (self.base, *self.adapters):
            message = f"The model `{asked['model']}` does not exist."
            error = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
            return JSONResponse({"error": error}, 404)
        return await super().complete(request)

    async def load(self, request: Request) -> Response:
        """`/v1/load_lora_adapter`: refuses what vLLM's PEFT helper would."""
        asked = await request.json()
        folder = Path(asked["lora_path"])
        config = json.loads((folder / "adapter_config.json").read_text())
        beyond = [name for name in ("modules_to_save", "use_dora", "layers_to_transform") if config.get(name)]
        names = safe_open(folder / "adapter_model.safetensors", "pt").keys()
        known = all(re.fullmatch(r"base_model\.model\..*\.lora_[AB]\.weight", name) for name in names)
        if config["peft_type"] != "LORA" or config["r"] > 16 or config["bias"] != "none" or beyond or not known:
            return JSONResponse({"error": {"message": "unsupported", "type": "BadRequestError", "code": 400}}, 400)
        self.adapters[asked["lora_name"]] = str(folder)
        return PlainTextResponse(f"Success: LoRA adapter '{asked['lora_name']}' added successfully.")

    async def unload(self, request: Request) -> Response:
        asked = await request.json()
        del self.adapters[asked["lora_name"]]
        return PlainTextResponse(f"Success: LoRA adapter '{asked['lora_name']}' removed successfully.")


T = TypeVar("T", bound=Talker)


@contextmanager
def talking(kind: type[T] = Talker) -> Iterator[tuple[str, T]]:  # type: ignore[assignment]
    """Run the server in a thread; yields its address and the server."""
    talker = kind()
    routes = [
        Route("/v1/models", talker.models),
        Route("/v1/chat/completions", talker.complete, methods=["POST"]),
    ]
    if isinstance(talker, VllmTalker):
        routes += [
            Route(f"/v1/{name}_lora_adapter", view, methods=["POST"])
            for name, view in {"load": talker.load, "unload": talker.unload}.items()
        ]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", talker
    finally:
        server.should_exit = True
        thread.join(10)
