"""One line of fine-tuning data, in any of the usual shapes, to what it says.

| shape | keys |
|---|---|
| messages | messages: [{role, content, tool_calls, name, trained}], tools |
| sharegpt | conversations: [{from, value}], system, tools |
| alpaca | instruction, input, output, system, history: [[question, answer]] |
| prompt/completion | prompt, completion: two texts, or two lists of messages; texts get no template |
| plain text | text |
| preference | chosen, rejected, prompt: as prompt/completion, with two answers |
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from internlm.data.message import Message, short
from internlm.utils.errors import UserError

_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
SHAPES = "messages, conversations, instruction + output, prompt + completion, text, or chosen + rejected"


@dataclass(frozen=True)
class Conversation:
    """Turns, for a chat template to write."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class PlainText:
    """A document without turns: `completion` is trained on, `prompt` is not."""

    prompt: str
    completion: str


Record = Conversation | PlainText


def parse_line(line: str) -> Mapping[str, Any]:
    """The object in a line of JSON. Raises UserError."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"broken JSON ({error}): {line.strip()[:60]}") from error
    if not isinstance(value, Mapping):
        raise UserError(f"expected a JSON object, found {short(value)}.")
    return value


def record_of(value: Mapping[str, Any]) -> Record:
    """What to learn from one object. Raises UserError for an unknown shape or a broken one."""
    if value.get("messages") is not None:
        return _conversation(value["messages"], value)
    if value.get("conversations") is not None:
        return _conversation([_from_sharegpt(turn) for turn in _list(value, "conversations")], value)
    if value.get("instruction") is not None:
        return _alpaca(value)
    if value.get("completion") is not None:
        return _joined(value.get("prompt", ""), value["completion"], value, "completion")
    if isinstance(value.get("text"), str):
        return PlainText("", value["text"])
    raise UserError(f"the keys {', '.join(map(str, value)) or '(none)'} are of no known shape; expected {SHAPES}.")


def pair_of(value: Mapping[str, Any]) -> tuple[Record, Record]:
    """The chosen and the rejected record of one object; only the answer that differs is trained on.

    Without "prompt" both are whole conversations. Raises UserError.
    """
    if value.get("chosen") is None or value.get("rejected") is None:
        raise UserError(f'preference data needs "chosen" and "rejected"; found {", ".join(map(str, value))}.')
    prompt = value.get("prompt")
    both: list[Record] = []
    for key in ("chosen", "rejected"):
        answer = value[key]
        if prompt is None and isinstance(answer, list) and len(answer) > 1:
            whole = _conversation(answer, value)
            last = len(whole.messages) - 1
            turns = tuple(replace(turn, trained=number == last) for number, turn in enumerate(whole.messages))
            both.append(replace(whole, messages=turns))
        else:
            both.append(_joined(prompt or "", answer, value, key))
    return both[0], both[1]


def _joined(prompt: Any, answer: Any, value: Mapping[str, Any], key: str) -> Record:
    """Two texts, or two lists of messages, of which the turns of the second are trained on."""
    if isinstance(prompt, str) and isinstance(answer, str):
        return PlainText(prompt, answer)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(prompt, list) or not isinstance(answer, list):
        raise UserError(f'"prompt" and "{key}" must be texts or lists of messages, found {short(prompt)}.')
    asked = [replace(Message.of(turn), trained=False) for turn in prompt]
    answered = [replace(turn, trained=turn.role == "assistant") for turn in map(Message.of, answer)]
    return replace(_conversation([], value), messages=(*asked, *answered))


def _conversation(turns: list[Any], value: Mapping[str, Any]) -> Conversation:
    if not isinstance(turns, list):
        raise UserError(f'"messages" is {short(turns)}; expected a list.')
    messages = [turn if isinstance(turn, Message) else Message.of(turn) for turn in turns]
    system = value.get("system")
    if isinstance(system, str) and system:
        messages.insert(0, Message("system", system))
    tools = value.get("tools") or []
    if isinstance(tools, str):
        tools = parse_line(f'{{"tools": {tools}}}')["tools"]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f'"tools" is {short(tools)}; expected a list of objects.')
    return Conversation(tuple(messages), tuple(tools))


def _from_sharegpt(turn: Any) -> Message:
    if isinstance(turn, Mapping) and "from" in turn:
        source, text = turn["from"], turn.get("value")
        role = _SHAREGPT_ROLES.get(str(source), str(source))
        if source == "function_call":
            return Message.of({"role": role, "tool_calls": [parse_line(str(text))]})
        return Message.of({"role": role, "content": text, "weight": turn.get("weight")})
    return Message.of(turn)


def _alpaca(value: Mapping[str, Any]) -> Conversation:
    turns = []
    for pair in value.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f'"history" holds {short(pair)}; expected [question, answer].')
        turns += [Message("user", _string(pair[0], "history")), Message("assistant", _string(pair[1], "history"))]
    question = _string(value["instruction"], "instruction")
    more = _string(value.get("input") or "", "input")
    turns.append(Message("user", f"{question}\n{more}" if more else question))
    turns.append(Message("assistant", _string(value.get("output"), "output")))
    return _conversation(turns, value)


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise UserError(f'"{key}" is {short(value)}; expected a text.')
    return value


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(value[key], list):
        raise UserError(f'"{key}" is {short(value[key])}; expected a list.')
    return value[key]
