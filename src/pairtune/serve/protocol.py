"""OpenAI's chat-completions request: the supported part of the protocol."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pairtune.models.sampling import SamplingParams

_MAX_TOKENS = 512  # default, if the request sets no limit


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def turn(self) -> dict[str, str]:
        """The message as the chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Extension(BaseModel):
    queue: bool = False


class ChatRequest(BaseModel):
    """A chat-completions request. Other fields are ignored; unsupported values of these are refused."""

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
    logprobs: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    # As vLLM has them: the last message is the beginning of the answer, which goes on from there.
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    pairtune: _Extension = _Extension()

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
