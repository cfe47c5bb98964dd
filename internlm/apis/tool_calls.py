r"""Function calls and code in an assistant's text, as chat models write them; the templates write them back.

InternLM2: `<|action_start|><|plugin|>\n{"name": ..., "parameters": {...}}<|action_end|>` calls a function, and
`<|action_start|><|interpreter|>\n` with a block of Python runs code (its model card's chat format). Qwen:
`<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>`.
"""

import json
import re
from collections.abc import Mapping

from internlm.data.message import ToolCall

INTERPRETER = "interpreter"  # the function name of code to run; its argument is "code"
STARTS = ("<|action_start|>", "<tool_call>")

_CALL = re.compile(
    r"<\|action_start\|>\s*<\|(?P<kind>plugin|interpreter)\|>\s*(?P<body>.*?)\s*(?:<\|action_end\|>|\Z)"
    r"|<tool_call>\s*(?P<json>.*?)\s*(?:</tool_call>|\Z)",
    re.DOTALL,
)
# The end of a block begins or ends a line: other backticks are part of the code.
_CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)


def parse_tool_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """The text around the calls, and the calls in order.

    The end of the last call may be missing, since models stop there. What looks like a call and can't be read stays
    in the text.
    """
    calls: list[ToolCall] = []

    def take(found: re.Match[str]) -> str:
        call = (
            _interpreter(found["body"]) if found["kind"] == INTERPRETER else _function(found["body"] or found["json"])
        )
        if call is None:
            return found[0]
        calls.append(call)
        return ""

    content = _CALL.sub(take, text)
    return (content.strip() if calls else content), tuple(calls)


def code_block(text: str) -> str | None:
    """The first fenced block of Python in a text, None where there is none."""
    found = _CODE.search(text)
    return found[1] if found else None


def _interpreter(body: str) -> ToolCall:
    code = code_block(body)
    return ToolCall(INTERPRETER, {"code": body if code is None else code})


def _function(body: str | None) -> ToolCall | None:
    try:
        call = json.loads(body or "")
    except ValueError:
        return None
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("parameters", call.get("arguments", {}))
    return ToolCall(call["name"], arguments) if isinstance(arguments, Mapping) else None


def before_calls(text: str) -> str:
    """The beginning of a growing text that certainly belongs to no call."""
    found = [place for start in STARTS if (place := text.find(start)) >= 0]
    if found:
        return text[: min(found)]
    held = max((n for start in STARTS for n in range(1, len(start)) if text.endswith(start[:n])), default=0)
    return text[: len(text) - held]
