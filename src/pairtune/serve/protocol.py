"""OpenAI's chat-completions request: the supported part of the protocol."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pairtune.models.sampling import SamplingParams

_MAX_TOKENS = 512  # default, if the request sets no limit


class _Lenient(BaseModel):
    """A part of a request in which `null` means that a field is not given, as at OpenAI."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    tool_calls: Annotated[list[Any] | None, Field(max_length=0)] = None

    def turn(self) -> dict[str, str]:
        """The message as the chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class _StreamOptions(_Lenient):
    include_usage: bool = False


class _ResponseFormat(BaseModel):
    type: Literal["text"]


class _Extension(_Lenient):
    queue: bool = False


class ChatRequest(_Lenient):
    """A chat-completions request. Unsupported values of these fields are refused, and fields not named here ignored.

    What would change an answer is named here, so that nobody takes it for granted: penalties, formats, tools.
    """

    model_config = ConfigDict(extra="ignore")

    model: str
    messages: Annotated[list[_Message], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=1, le=1000)] = 50
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    n: Literal[1] = 1
    logprobs: Literal[False] = False
    top_logprobs: Literal[0] = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] = {}
    response_format: _ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] = []
    tool_choice: Literal["none", "auto"] = "none"
    functions: Annotated[list[Any], Field(max_length=0)] = []
    # As vLLM has them: the last message is the beginning of the answer, which goes on from there.
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    pairtune: _Extension = _Extension()

    @field_validator("frequency_penalty", "presence_penalty")
    @classmethod
    def _no_penalty(cls, given: float) -> float:
        if given:
            raise ValueError("penalties are not supported; leave it out, or give 0")
        return given

    @model_validator(mode="after")
    def _one_of_both(self) -> ChatRequest:
        if self.continue_final_message and (self.add_generation_prompt or self.messages[-1].role != "assistant"):
            raise ValueError(
                "continue_final_message needs add_generation_prompt false, and an assistant's message at the end"
            )
        return self

    def params(self, room: int) -> SamplingParams:
        """The sampling parameters, with at most `room` tokens."""
        wanted = self.max_completion_tokens or self.max_tokens or _MAX_TOKENS
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return SamplingParams(
            max_tokens=min(wanted, room),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=tuple(filter(None, stop)),
            seed=self.seed,
        )
