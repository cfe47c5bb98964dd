"""The body of a chat completion in OpenAI's form, and what is wrong with one that is refused."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from internlm.apis.chat import ChatModel, ReplyOptions
from internlm.apis.sampling import Sampling
from internlm.data.message import Message, messages_of, short
from internlm.utils.errors import UserError

_TURN_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "function_call"}  # the last has its own message


class _Strict(BaseModel):
    """Unknown keys and values of another JSON type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # changes no answer


class TextFormat(_Strict):
    type: Literal["text"]


class Request(_Strict):
    """The body of a chat completion. Unknown keys are refused, as they might change the answer.

    A key that is null counts as absent, as with OpenAI, and what is not offered may be asked for in its neutral value.
    """

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0)
    max_tokens: int | None = Field(None, gt=0)
    max_completion_tokens: int | None = Field(None, gt=0)
    max_length: int | None = None  # accepted and without effect, as in 2023
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    # not offered
    n: int | None = Field(None, ge=1, le=1)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    logprobs: Literal[False] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=0)
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: Literal[True] | None = None
    # these change no answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body

    def turns(self) -> list[Message]:
        """Raises UserError for turns that can't be read, and for keys in them that this server would ignore."""
        for number, turn in enumerate(self.messages):
            ignored = [key for key, value in turn.items() if value and key not in _TURN_KEYS]
            if ignored:
                raise UserError(f"messages.{number}.{ignored[0]}: not offered here")
        return messages_of(self.messages)

    def options(self, chat: ChatModel) -> ReplyOptions:
        """Raises UserError for what can't be done."""
        for tool in self.tools or ():
            function = tool.get("function", tool)
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise UserError(f'tools: {short(tool)} has no function with a "name"')
        if self.stream_options and not self.stream:
            raise UserError("stream_options: only with stream=true")
        default = ReplyOptions().sampling
        sampling = Sampling(
            default.temperature if self.temperature is None else self.temperature,
            self.top_k or 0,
            self.top_p or default.top_p,
            self.repetition_penalty or 1.0,
        )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        limit = self.max_completion_tokens or self.max_tokens or chat.max_length
        tools = () if self.tool_choice == "none" else tuple(self.tools or ())
        return ReplyOptions(sampling, limit, self.seed, stop, tools)


def problem(found: Mapping[str, Any]) -> str:
    """A fault that pydantic found in a body, in a line."""
    if found["type"] == "json_invalid":
        return f"the body is no JSON: {found['ctx']['error']} at character {found['loc'][1]}"
    message = "not offered here" if found["type"] in ("extra_forbidden", "literal_error") else found["msg"]
    return f"{'.'.join(map(str, found['loc'][1:])) or 'the body'}: {message}"
