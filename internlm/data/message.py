"""Turns of a conversation, in the one form that readers of data and chat programs make of all others."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from internlm.utils.errors import UserError

ROLES = ("system", "user", "assistant", "tool", "environment", "developer")


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant wants called."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn. `name` says which tool a result is from, or who speaks. Raises UserError for an unknown role."""

    role: str  # one of ROLES
    content: str = ""
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    trained: bool | None = None  # whether an answer is trained on; None: as the run's settings say

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UserError(f'role "{self.role}" is unknown; known are {", ".join(ROLES)}.')

    @staticmethod
    def of(value: Any) -> "Message":
        """From an object in the OpenAI form: role, content (a text, or a list of text parts), name, tool_calls.

        "trained" (true or false) or "weight" (0 or 1) choose whether an answer is trained on. Raises UserError.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
            raise UserError(f'expected an object with "role" and "content", found {short(value)}.')
        trained = value.get("weight") if value.get("trained") is None else value["trained"]
        if trained not in (None, 0, 1):
            raise UserError(f'"trained" (or "weight") is {short(trained)}; expected true or false.')
        if not isinstance(value.get("name"), str | None):
            raise UserError(f'"name" is {short(value["name"])}; expected a text.')
        calls = value.get("tool_calls") or []
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise UserError(f'"tool_calls" is {short(calls)}; expected a list.')
        if calls and value["role"] != "assistant":
            raise UserError(f'"tool_calls" in a turn of role "{value["role"]}": only the assistant calls functions.')
        if value.get("function_call") is not None:
            raise UserError('"function_call" is an earlier form of "tool_calls": write [{"function": ...}] there.')
        if value.get("content") is None and not calls:
            raise UserError(f'a turn without "content" (or "tool_calls"): {short(value)}.')
        return Message(
            value["role"],
            _text(value.get("content")),
            value.get("name"),
            tuple(map(_tool_call, calls)),
            None if trained is None else bool(trained),
        )

    def as_dict(self) -> dict[str, Any]:
        """As templates read it."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_calls:
            turn["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return turn


def messages_of(values: Iterable[Any]) -> list[Message]:
    """Turns as `Message.of` reads them; a tool's result with a "tool_call_id" gets the name of that call.

    Raises UserError for the id of a call that no turn before made.
    """
    names: dict[Any, str] = {}
    found = []
    for value in values:
        message = value if isinstance(value, Message) else Message.of(value)
        if isinstance(value, Mapping):
            calls = zip(value.get("tool_calls") or [], message.tool_calls, strict=True)
            names |= {str(given["id"]): call.name for given, call in calls if given.get("id") is not None}
            called = value.get("tool_call_id")
            if called is not None and str(called) not in names:
                raise UserError(f'"tool_call_id" is {short(called)}, which no call before has as its "id".')
            if message.name is None and called is not None:
                message = replace(message, name=names[str(called)])
        found.append(message)
    return found


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A value as JSON has it, each text and key in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {with_texts(key, change): with_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [with_texts(inner, change) for inner in value]
    return value


def short(value: Any) -> str:
    """The beginning of a value as JSON, for messages."""
    return json.dumps(value, ensure_ascii=False, default=str)[:60]


def _text(content: Any) -> str:
    """The text of a turn's content. Raises UserError for images and the like."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(
        isinstance(p, Mapping) and isinstance(p.get("text"), str) and p.get("type", "text") == "text" for p in content
    ):
        return "".join(part["text"] for part in content)
    raise UserError(f'"content" is {short(content)}; expected a text or a list of parts of type "text".')


def _tool_call(value: Any) -> ToolCall:
    """From {"function": {"name": ..., "arguments": ...}} or the inner object; arguments may be JSON in a string."""
    call = value.get("function", value) if isinstance(value, Mapping) else {}
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(call.get("name"), str) or not isinstance(arguments, Mapping):
        raise UserError(f'tool call {short(value)}: expected a "name" and an object of "arguments".')
    return ToolCall(call["name"], arguments)
