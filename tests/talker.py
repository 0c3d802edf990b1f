"""A stand-in for a model server, on the loopback: OpenAI's protocol, with answers that tests choose."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
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


@contextmanager
def talking() -> Iterator[tuple[str, Talker]]:
    """Run the server in a thread; yields its address and the server."""
    talker = Talker()
    routes = [
        Route("/v1/models", talker.models),
        Route("/v1/chat/completions", talker.complete, methods=["POST"]),
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
