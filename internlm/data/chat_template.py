"""Conversations to text: Jinja templates that say how turns are written and which parts the assistant wrote.

Templates are those of Hugging Face: the same variables and functions, and `{% generation %}...{% endgeneration %}`
around what the assistant writes, which fine-tuning trains on. They come with models from anywhere, so they run in
Jinja's sandbox: no attribute that starts with an underscore, no file, no module, nothing changed.
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from internlm.data.message import Message, ToolCall, with_texts
from internlm.data.tokenizer import any_of
from internlm.utils.errors import UserError

FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class ChatTemplate:
    """How a model's conversations are written. Texts hold the special tokens, `<s>` included: nothing is added later.

    Raises UserError where the source is no valid template.
    """

    name: str
    source: str
    stop: tuple[str, ...] = ()  # texts of the tokens at which an answer ends
    tokens: Mapping[str, str] = field(default_factory=dict)  # such as bos_token, for the template to write

    def __post_init__(self) -> None:
        _compiled(self.source, self.name)

    @property
    def marks_answers(self) -> bool:
        """Whether the source says what the assistant writes, which training on answers alone needs."""
        return re.search(r"{%-?\s*generation\b", self.source) is not None

    @property
    def plain_source(self) -> str:
        """The source without generation marks, for engines that don't know them."""
        return re.sub(r"[ \t]*{%-?\s*(?:end)?generation\s*-?%}\n?", "", self.source)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of `write`."""
        return self.write(messages, add_generation_prompt, tools).text

    def write(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        control: "re.Pattern[str] | None" = None,
        control_in_answers: "re.Pattern[str] | None" = None,
    ) -> "Written":
        """The conversation's text; with `add_generation_prompt` it ends where the assistant is to go on.

        `tools` are functions in the OpenAI form. `control` finds the texts of control tokens: what it finds in
        `tools`, in names, and in a turn that is not the assistant's is literal. So is what `control_in_answers` finds
        in the assistant's turns and calls. Raises UserError for turns that the template refuses, and for tools that it
        leaves out.
        """
        said = {"add_generation_prompt": add_generation_prompt, **self.tokens}
        try:
            said["messages"] = [_turn(message, control, control_in_answers) for message in messages]
            marked = self._render(said | {"tools": _guarded(tools, control)})
        except RecursionError as error:
            raise UserError(
                f"chat template {self.name} calls itself, or a turn or tool is nested too deeply"
            ) from error
        if tools and marked == self._render_or_none(said | {"tools": None}):
            raise UserError(
                f'chat template {self.name} writes no tools, so the model would not see those in "tools": leave them '
                "out, or take a template that writes them (internlm2 and qwen2 do)"
            )
        text, borders, literal = "", [], []
        for part in re.split(f"({_MARK}|{_GUARD})", marked):
            if part == _MARK:
                borders.append(len(text))
            elif part == _GUARD:
                literal.append(len(text))
            else:
                text += part
        return Written(text, list(zip(borders[::2], borders[1::2], strict=False)), literal)

    def _render(self, said: Mapping[str, Any]) -> str:
        try:
            return _compiled(self.source, self.name).render(said)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, MemoryError) as error:
            raise UserError(f"chat template {self.name}: {error or type(error).__name__}") from error

    def text_or_none(self, messages: Sequence[Message], *others: Any) -> str | None:
        """The text of `write` with the same arguments, None where that refuses."""
        with suppress(UserError):
            return self.write(messages, *others).text
        return None

    @property
    def tells_answers(self) -> bool:
        """Whether `answers_of` finds the answers of a plain conversation, by marks or without."""
        talk = [Message("user", "a"), Message("assistant", "b")]
        return self.marks_answers or self._answer(1, self.text_or_none(talk) or "", talk, None, None) is not None

    def answers_of(
        self,
        messages: Sequence[Message],
        written: "Written",
        wanted: Sequence[bool],
        tools: Sequence[Mapping[str, Any]] | None = None,
        control: "re.Pattern[str] | None" = None,
    ) -> list[tuple[int, int]]:
        """Where the `wanted` of the assistant's turns lie in what `write` made of a conversation. Raises UserError."""
        places = [index for index, message in enumerate(messages) if message.role == "assistant"]
        spans: Sequence[tuple[int, int] | None] = written.answers
        if not self.marks_answers:
            spans = [
                self._answer(index, written.text, messages, tools, control) if keep else None
                for index, keep in zip(places, wanted, strict=True)
            ]
        if len(spans) != len(places):
            raise UserError(
                f"chat template {self.name} marks {len(spans)} texts of {len(places)} assistant turns, so single turns "
                "cannot be chosen."
            )
        chosen = [span for span, keep in zip(spans, wanted, strict=True) if keep]
        found = [span for span in chosen if span is not None]
        if len(found) < len(chosen):
            raise UserError(
                f"chat template {self.name} has no generation marks, and writes an answer otherwise when turns follow "
                "than when it is the last one, so it does not say which text the assistant wrote. Train on last "
                'answers alone (data.train_on = "last"), or put {% generation %} and {% endgeneration %} around them.'
            )
        return found

    def _answer(
        self,
        index: int,
        text: str,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        control: "re.Pattern[str] | None",
    ) -> tuple[int, int] | None:
        """Where messages[index] lies in `text`, which `write` made of all of them, found without marks.

        The assistant wrote what follows the prompt that a model is given for this turn, up to the stop token at its
        end. None: the conversation up to there is not the beginning of `text`, or there is no stop token.
        """
        prompt = self.text_or_none(messages[:index], True, tools, control)
        ended = self.text_or_none(messages[: index + 1], False, tools, control)
        if prompt is None or ended is None or not (ended.startswith(prompt) and text.startswith(ended)):
            return None
        answer = ended.rstrip()
        return (len(prompt), len(answer)) if answer.endswith(self.stop) and len(answer) > len(prompt) else None

    def _render_or_none(self, said: Mapping[str, Any]) -> str | None:
        with suppress(UserError):
            return self._render(said)
        return None

    def turn_marks(self, control: "re.Pattern[str]") -> "re.Pattern[str]":
        """Finds the control tokens that begin and end turns: those that the template itself writes, and `stop`."""
        turns = [Message(role, "a") for role in ("system", "user", "assistant", "user")]
        texts = (self.text_or_none(turns) or "", self.text_or_none(turns[1:]) or "")
        return any_of({*self.stop, *control.findall("\n".join(texts))})


def _turn(
    message: Message, control: "re.Pattern[str] | None", control_in_answers: "re.Pattern[str] | None"
) -> dict[str, Any]:
    """A turn as templates read it, with guards."""
    content = _guarded(message.content, control_in_answers if message.role == "assistant" else control)
    calls = tuple(ToolCall(*_guarded((c.name, c.arguments), control_in_answers)) for c in message.tool_calls)
    return replace(message, content=content, name=_guarded(message.name, control), tool_calls=calls).as_dict()


def _guarded(value: Any, control: "re.Pattern[str] | None") -> Any:
    """`value` with a guard before whatever `control` finds in its texts."""
    return value if control is None else with_texts(value, partial(control.sub, rf"{_GUARD}\g<0>"))


class Written(NamedTuple):
    """A conversation as a template wrote it. Places are in characters."""

    text: str
    answers: list[tuple[int, int]]  # start and end of what the assistant wrote: its answers with their end tokens
    literal: list[int]  # where a turn says what would be a control token, had the template said it


# Stand in the text until it is complete, around what the assistant wrote and before what is literal. Nobody can have
# written them into a turn. Of letters and digits, so that they survive a filter such as tojson.
_MARK, _GUARD = (f"mark{secrets.token_hex(16)}" for _ in range(2))


class _Generation(Extension):
    """The tag `{% generation %}` of Hugging Face's templates."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{_MARK}{caller()}{_MARK}"


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own filter would escape for HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


@lru_cache(maxsize=64)
def _compiled(source: str, name: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise UserError(f"chat template {name}, line {error.lineno}: {error.message}") from error


def _built_in(name: str, *stop: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate(name, (FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), stop, tokens)


_S = {"bos_token": "<s>", "eos_token": "</s>"}

# internlm: internlm-chat-7b and -8k; internlm1.1: internlm-chat-7b-v1_1 and -20b; qwen2: Qwen2.5, with tools.
BUILT_IN: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        _built_in("chatml", "<|im_end|>"),
        _built_in("internlm", "<eoa>", "</s>", **_S),
        _built_in("internlm1.1", "<eoa>", "</s>", **_S),
        _built_in("internlm2", "<|im_end|>", "</s>", **_S),
        _built_in("llama3", "<|eot_id|>", "<|end_of_text|>", bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
        _built_in("qwen2", "<|im_end|>", "<|endoftext|>", eos_token="<|im_end|>"),
    )
}

# The text that InternLM's chat models of 2023 were given when the user gave no other.
META_INSTRUCTION = """You are an AI assistant whose name is InternLM (书生·浦语).
- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory \
(上海人工智能实验室). It is designed to be helpful, honest, and harmless.
- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as \
English and 中文."""
