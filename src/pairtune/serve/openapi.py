"""The OpenAPI description of the worker's HTTP interface, for the clients and tests that are made from one."""

from __future__ import annotations

from functools import cache
from typing import Any

from pairtune.serve.protocol import ChatRequest
from pairtune.version import __version__

_SCHEMAS = "#/components/schemas/{model}"
_REFUSALS = {
    400: "A field is missing or wrong, the model cannot be loaded, or the prompt is too long.",
    401: "The key is missing or wrong.",
    404: "There is no such model.",
    413: "The request is too large.",
    415: "The content type is not application/json.",
    429: "Too many requests wait.",
    500: "The answer failed.",
    503: "The model was just unloaded, or has failed.",
}
_TEXT, _INTEGER = {"type": "string"}, {"type": "integer"}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "properties": required | optional, "required": list(required)}


def _listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_OR_NULL = {"type": ["string", "null"]}
_ERROR = _object({"error": _object({"message": _TEXT, "type": _TEXT, "param": _OR_NULL, "code": _OR_NULL})})
_HEALTH = _object({"status": {"enum": ["ok", "failed"]}}, load={"type": "object"})
_EXTENSION = _object({"base": _TEXT, "run": _OR_NULL, "fingerprint": _TEXT})
_MODEL = _object({"id": _TEXT, "object": {"const": "model"}, "created": _INTEGER, "owned_by": _TEXT})
_MODEL["properties"]["pairtune"] = _EXTENSION
_MODELS = _object({"object": {"const": "list"}, "data": _listed(_MODEL)})
_CHOICE = _object(
    {
        "index": {"const": 0},
        "message": _object({"role": {"const": "assistant"}, "content": _TEXT}),
        "finish_reason": {"enum": ["stop", "length"]},
    }
)
_USAGE = _object({"prompt_tokens": _INTEGER, "completion_tokens": _INTEGER, "total_tokens": _INTEGER})
_COMPLETION = _object(
    {
        "id": _TEXT,
        "object": {"const": "chat.completion"},
        "created": _INTEGER,
        "model": _TEXT,
        "system_fingerprint": _TEXT,
        "choices": _listed(_CHOICE),
        "usage": _USAGE,
    }
)


@cache
def openapi() -> dict[str, Any]:
    """The description, as OpenAPI 3.1: the request as `ChatRequest` checks it, replies and refusals."""
    request = ChatRequest.model_json_schema(ref_template=_SCHEMAS)
    parts = request.pop("$defs")
    stream = {"text/event-stream": {"schema": _object({"data": _TEXT})}}  # each event: a chunk as JSON, or [DONE]
    chat = _operation("Answer a conversation", _COMPLETION, *_REFUSALS)
    chat["responses"]["200"]["content"] |= stream
    chat["requestBody"] = {"required": True, "content": {"application/json": {"schema": request}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "pairtune worker", "version": __version__},
        "paths": {
            "/health": {"get": _operation("Whether the worker lives", _HEALTH, also=(503, _HEALTH)) | {"security": []}},
            "/v1/models": {"get": _operation("The models that are served", _MODELS, 401)},
            "/v1/chat/completions": {"post": chat},
        },
        "components": {
            "schemas": parts | {"Refusal": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _operation(
    summary: str, reply: dict[str, Any], *refusals: int, also: tuple[int, dict[str, Any]] | None = None
) -> dict[str, Any]:
    responses = {"200": _reply("The reply.", reply)}
    if also:
        responses[str(also[0])] = _reply("The reply.", also[1])
    refused = {"$ref": _SCHEMAS.format(model="Refusal")}
    responses |= {str(status): _reply(_REFUSALS[status], refused) for status in refusals}
    return {"summary": summary, "responses": responses}


def _reply(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
