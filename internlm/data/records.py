"""One line of fine-tuning data, in any of the usual shapes, to what it says.

| shape | keys |
|---|---|
| messages | messages: [{role, content, tool_calls, name, trained}], tools |
| sharegpt | conversations: [{from, value}], system, tools |
| alpaca | instruction, input, output, system, history: [[question, answer]] |
| prompt/completion | prompt, completion: two texts, or two lists of messages; texts get no template |
| plain text | text |
| preference | chosen, rejected, prompt: as prompt/completion, with two answers, or with two whole conversations |
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from internlm.data.message import Message, messages_of, short
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
    except (ValueError, RecursionError) as error:
        raise UserError(f"broken JSON ({error}): {line.strip()[:60]}") from error
    if not isinstance(value, Mapping):
        raise UserError(f"expected a JSON object, found {short(value)}.")
    return value


def record_of(value: Mapping[str, Any]) -> Record:
    """What to learn from one object. Raises UserError for an unknown shape or a broken one."""
    return _seen(_record_of(value), value)


def _seen(record: Record, value: Mapping[str, Any]) -> Record:
    """Raises UserError if the object has tools, and the record is a text, in which no template writes them."""
    if isinstance(record, PlainText) and value.get("tools"):
        raise UserError('"tools" beside a text, which no chat template writes: leave them out, or give messages.')
    return record


def _record_of(value: Mapping[str, Any]) -> Record:
    if value.get("messages") is not None:
        return _conversation(value["messages"], value)
    if value.get("conversations") is not None:
        return _conversation([_from_sharegpt(turn) for turn in _list(value, "conversations")], value)
    if value.get("instruction") is not None:
        return _alpaca(value)
    if value.get("completion") is not None:
        return _joined(value.get("prompt") or "", value["completion"], value, "completion")
    if isinstance(value.get("text"), str):
        return PlainText("", value["text"])
    raise UserError(f"the keys {', '.join(map(str, value)) or '(none)'} are of no known shape; expected {SHAPES}.")


def pair_of(value: Mapping[str, Any]) -> tuple[Record, Record]:
    """The chosen and the rejected record of one object; only the answer that differs is trained on.

    Without "prompt" both are whole conversations. Raises UserError.
    """
    if value.get("chosen") is None or value.get("rejected") is None:
        raise UserError(f'preference data needs "chosen" and "rejected"; found {", ".join(map(str, value))}.')
    prompt, chosen, rejected = value.get("prompt"), value["chosen"], value["rejected"]
    if prompt in (None, "", []) and isinstance(chosen, list) and isinstance(rejected, list):
        prompt = chosen[:-1]
        if [Message.of(turn) for turn in prompt] != [Message.of(turn) for turn in rejected[:-1]]:
            raise UserError(
                '"chosen" and "rejected" differ before their last turns, so they answer different questions.'
            )
        chosen, rejected = chosen[-1:], rejected[-1:]
    better, worse = _joined(prompt or "", chosen, value, "chosen"), _joined(prompt or "", rejected, value, "rejected")
    if type(better) is not type(worse):
        raise UserError(
            'one of "chosen" and "rejected" is a text, the other a list of messages; write both in one way.'
        )
    if better == worse:
        raise UserError('"chosen" and "rejected" are the same, so nothing can be learnt from them.')
    return _seen(better, value), worse


def _joined(prompt: Any, answer: Any, value: Mapping[str, Any], key: str) -> Record:
    """Two texts, or two lists of messages, of which the turns of the second are trained on.

    Many public sets repeat the prompt in the second list: what is said twice is taken once.
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        return PlainText(prompt, answer)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(prompt, list) or not isinstance(answer, list):
        raise UserError(f'"prompt" and "{key}" must be texts or lists of messages, found {short(prompt)}.')
    asked, whole = messages_of(prompt), messages_of(answer)
    if whole[: len(asked)] != asked:  # it is the answer alone; results in it may be of calls in the prompt
        whole = messages_of([*prompt, *answer])
    answered = whole[len(asked) :]
    if key != "completion" and any(turn.role == "user" for turn in answered):
        raise UserError(
            f'"{key}" has turns of a user, but does not begin with "prompt"; give whole conversations without '
            '"prompt", or answers alone.'
        )
    return _conversation([_chosen(turn, False) for turn in asked] + [_chosen(turn, True) for turn in answered], value)


def _chosen(turn: Message, trained: bool) -> Message:
    """The turn, with what holds for answers that don't say themselves whether they are trained on."""
    return replace(turn, trained=trained) if turn.role == "assistant" and turn.trained is None else turn


def _conversation(turns: list[Any], value: Mapping[str, Any]) -> Conversation:
    if not isinstance(turns, list):
        raise UserError(f'"messages" is {short(turns)}; expected a list.')
    messages = messages_of(turns)
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
        marks = {key: turn.get(key) for key in ("trained", "weight")}
        role = _SHAREGPT_ROLES.get(str(source), str(source))
        if source == "function_call":
            return Message.of({"role": role, "tool_calls": [parse_line(str(text))], **marks})
        if text is None:
            raise UserError(f'a turn without "value": {short(turn)}.')
        return Message.of({"role": role, "content": text, **marks})
    return Message.of(turn)


def _alpaca(value: Mapping[str, Any]) -> Conversation:
    turns = []
    for pair in _list(value, "history") if value.get("history") else []:
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
