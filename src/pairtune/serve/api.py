"""The worker's HTTP interface: OpenAI's `/v1/models` and `/v1/chat/completions`.

Requests are JSON by their content type: a page of another site can post text and forms without being asked, but not
JSON. If there is a key, requests carry it as at OpenAI (`Authorization: Bearer KEY`); `/health` and
`/openapi.json`, which describes all this for programs, need none.

Every reply carries `system_fingerprint`: the hashes of the base model and the adapter. As an extension, a streaming
request with `"pairtune": {"queue": true}` receives its queue position while it waits, in chunks without choices.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

from jinja2 import TemplateError
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pairtune.errors import BadInput
from pairtune.serve.catalogue import Catalogue, OpenedModel, ServedModel
from pairtune.serve.openapi import openapi
from pairtune.serve.protocol import ChatRequest
from pairtune.serve.request import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    QueueFull,
    QueuePosition,
    SchedulerEnded,
    TextDelta,
)

# Maximum size of a request in bytes; enough for a context of a hundred thousand tokens.
_LARGEST = 2_000_000
# A generous upper bound for ordinary text; longer prompts are refused before they are tokenized.
_CHARACTERS_PER_TOKEN = 16
# The longest that a stream is silent while its answer waits or is thought about.
_SILENCE_SECONDS = 5.0


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str, param: str | None = None, **headers: str) -> None:
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}

    def response(self) -> Response:
        return JSONResponse(self.body, self.status, headers=self.headers)


def make_app(catalogue: Catalogue, hosts: list[str], key: str = "") -> Starlette:
    """Make the ASGI application.

    Args:
        catalogue: the models to serve.
        hosts: accepted values of the Host header; others are refused to prevent DNS rebinding.
        key: the key that requests must carry; empty: none.
    """
    worker = _Worker(catalogue, key)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(catalogue.close)

    return Starlette(
        routes=[
            Route("/health", worker.health),
            Route("/openapi.json", worker.describe),
            Route("/v1/models", worker.models),
            Route("/v1/chat/completions", worker.complete, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        lifespan=lifespan,
    )


class _Worker:
    def __init__(self, catalogue: Catalogue, key: str) -> None:
        self.catalogue, self._key = catalogue, key
        # Threads of their own, so that the list of models does not wait for models that are being loaded, or for
        # prompts that are being tokenized.
        self._loading = ThreadPoolExecutor(32, "pairtune-load")  # one for each model that is waited for
        self._tokenizing = ThreadPoolExecutor(2, "pairtune-tokenize")
        self._opening: dict[ServedModel, asyncio.Future[OpenedModel]] = {}

    async def health(self, request: Request) -> Response:
        loads = self.catalogue.loads()
        alive = all(load["alive"] for load in loads.values())
        said: dict[str, Any] = {"status": "ok" if alive else "failed"}
        with suppress(_Refused):
            self._check_key(request)
            said["load"] = loads
        return JSONResponse(said, 200 if alive else 503)

    async def describe(self, _: Request) -> Response:
        return JSONResponse(openapi())

    async def models(self, request: Request) -> Response:
        try:
            self._check_key(request)
        except _Refused as refusal:
            return refusal.response()
        return JSONResponse({"object": "list", "data": await asyncio.to_thread(self._listed)})

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._key and not secrets.compare_digest(given.encode(), self._key.encode()):
            message = "the key is missing or wrong; send it as Authorization: Bearer KEY"
            raise _Refused(401, message, "invalid_api_key", **{"WWW-Authenticate": "Bearer"})

    def _listed(self) -> list[dict[str, Any]]:
        return [
            {
                "id": each.id,
                "object": "model",
                "created": each.created,
                "owned_by": "pairtune",
                "pairtune": {
                    "base": each.base,
                    "run": each.run.resolve().name if each.run else None,
                    "fingerprint": self.catalogue.fingerprint(each),
                },
            }
            for each in self.catalogue.available()
        ]

    async def complete(self, request: Request) -> Response:
        try:
            self._check_key(request)
            asked = await _read(request)
            model = (await asyncio.to_thread(self.catalogue.models)).get(asked.model)
            if model is None:
                message = f"there is no model {asked.model!r}; /v1/models lists those that are served"
                raise _Refused(404, message, "model_not_found", "model")
            starting = asyncio.ensure_future(self._start(asked, model))
            if asked.stream and not (await asyncio.wait({starting}, timeout=_SILENCE_SECONDS))[0]:
                return _streamed(_late(starting))
            answer = await starting
        except _Refused as refusal:
            return refusal.response()
        except BadInput as error:
            return _bad_model(error).response()
        except ClientDisconnect:
            return Response(status_code=499)
        return _streamed(answer.stream()) if asked.stream else await answer.whole(request)

    async def _start(self, asked: ChatRequest, model: ServedModel) -> _Answer:
        loop = asyncio.get_running_loop()
        opened = await self._opened(model)
        return await loop.run_in_executor(self._tokenizing, self._submit, asked, opened, loop)

    async def _opened(self, model: ServedModel) -> OpenedModel:
        """The model in memory; all who ask for it while it is being loaded wait together, without a thread each."""
        if model not in self._opening:
            loop = asyncio.get_running_loop()
            opening = self._opening[model] = loop.run_in_executor(self._loading, self.catalogue.open, model)
            opening.add_done_callback(lambda _: self._opening.pop(model))
        return await asyncio.shield(self._opening[model])

    def _submit(self, asked: ChatRequest, opened: OpenedModel, loop: asyncio.AbstractEventLoop) -> _Answer:
        ids = _encode(opened, asked)
        answer = _Answer(asked, opened, len(ids))
        events = answer.events

        def emit(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        answer.request = opened.request(ids, asked.params(opened.context - len(ids)), emit)
        try:
            opened.scheduler.submit(answer.request)
        except QueueFull:
            raise _Refused(
                429, "too many requests are queued; try again later", "rate_limit_exceeded", **{"Retry-After": "5"}
            ) from None
        except SchedulerEnded:
            message = "the model was just unloaded, or has failed; the next request loads it again"
            raise _Refused(503, message, "unavailable", **{"Retry-After": "1"}) from None
        return answer


def _bad_model(error: BadInput) -> _Refused:
    return _Refused(400, str(error), "bad_model", "model")


def _streamed(events: AsyncIterator[str]) -> Response:
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _late(starting: asyncio.Future[_Answer]) -> AsyncIterator[str]:
    """The events of an answer that takes long to start, since its model is being loaded."""
    try:
        while not (await asyncio.wait({starting}, timeout=_SILENCE_SECONDS))[0]:
            yield _ALIVE
    finally:
        if not starting.done():
            starting.cancel()
    try:
        answer = starting.result()
    except (_Refused, BadInput) as error:
        refusal = error if isinstance(error, _Refused) else _bad_model(error)
        yield _event(refusal.body)
        yield _DONE
        return
    async for event in answer.stream():
        yield event


async def _read(request: Request) -> ChatRequest:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise _Refused(415, "the content type must be application/json", "unsupported_media_type")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST:
            raise _Refused(413, f"the request has more than {_LARGEST:,} bytes; shorten it", "request_too_large")
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _Refused(400, f"{where or 'request'}: {first['msg']}", "invalid_value", where or None) from error


def _encode(model: OpenedModel, asked: ChatRequest) -> list[int]:
    """Render the conversation with the model's chat template and tokenize it."""
    turns, context = [message.turn() for message in asked.messages], model.context
    if sum(len(turn["content"]) for turn in turns) > _CHARACTERS_PER_TOKEN * context:
        message = f"the prompt is far longer than this model's {context:,} tokens; shorten it"
        raise _Refused(400, message, "context_length_exceeded", "messages")
    try:
        ids = model.encode(turns, goes_on=asked.continue_final_message)
    except (TemplateError, ValueError) as error:
        raise _Refused(400, f"the chat template rejects these messages: {error}", "bad_messages", "messages") from error
    if not ids:
        raise _Refused(400, "the chat template renders these messages as nothing", "bad_messages", "messages")
    if len(ids) >= context:
        raise _Refused(
            400,
            f"{len(ids):,} tokens are too many for this model: prompt and answer share {context:,}",
            "context_length_exceeded",
            "messages",
        )
    return ids


class _Answer:
    """The response to one request, streamed or whole."""

    request: GenerationRequest

    def __init__(self, asked: ChatRequest, model: OpenedModel, prompt_tokens: int) -> None:
        self.asked, self.scheduler, self.prompt_tokens = asked, model.scheduler, prompt_tokens
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": model.fingerprint,
        }

    async def stream(self) -> AsyncIterator[str]:
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            while True:
                try:
                    event = await asyncio.wait_for(self.events.get(), _SILENCE_SECONDS)
                except TimeoutError:
                    yield _ALIVE
                    continue
                match event:
                    case TextDelta(text):
                        yield self._chunk({"content": text})
                    case QueuePosition(ahead) if self.asked.pairtune.queue:
                        yield _event({**self.head, "object": _CHUNK, "choices": [], "pairtune": {"queue": ahead}})
                    case Finished(reason, tokens):
                        yield self._chunk({}, reason)
                        if self.asked.stream_options.include_usage:
                            yield _event({**self.head, "object": _CHUNK, "choices": [], "usage": self._usage(tokens)})
                        break
                    case Failed(message):
                        yield _event({"error": {"message": message, "type": "server_error", "code": "failed"}})
                        break
            yield _DONE
        finally:
            self.scheduler.cancel(self.request)  # a client that disconnects frees its slot at once

    async def whole(self, request: Request) -> Response:
        gone = asyncio.create_task(_gone(request))
        text = ""
        ended: Finished | None = None
        try:
            while ended is None:
                event = asyncio.create_task(self.events.get())
                await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    return Response(status_code=499)
                match event.result():
                    case TextDelta(piece):
                        text += piece
                    case Finished() as last:
                        ended = last
                    case Failed(reason):
                        error = {"message": reason, "type": "server_error", "param": None, "code": "failed"}
                        return JSONResponse({"error": error}, 500)
        finally:
            gone.cancel()
            self.scheduler.cancel(self.request)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": ended.reason, "logprobs": None}
        body = {**self.head, "object": "chat.completion", "choices": [choice], "usage": self._usage(ended.tokens)}
        return JSONResponse(body)

    def _chunk(self, delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _event({**self.head, "object": _CHUNK, "choices": [choice]})

    def _usage(self, tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
        }


_CHUNK = "chat.completion.chunk"
_DONE = "data: [DONE]\n\n"
_ALIVE = ": waiting\n\n"  # a comment, which clients pass over: it tells them that the server has not gone


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
