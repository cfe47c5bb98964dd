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
from internlm.utils.json_files import read_json
from internlm.utils.logger import get_logger

FOLDER = Path(__file__).parent / "templates"

logger = get_logger(__name__)


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

    def _render_or_none(self, said: Mapping[str, Any]) -> str | None:
        with suppress(UserError):
            return self._render(said)
        return None

    def turn_marks(self, control: "re.Pattern[str]") -> "re.Pattern[str]":
        """Finds the control tokens that begin and end turns: those that the template itself writes, and `stop`."""
        turns = [Message(role, "a") for role in ("system", "user", "assistant", "user")]
        texts = (_text_or_none(self, turns) or "", _text_or_none(self, turns[1:]) or "")
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

_BY_MODEL_TYPE = {"internlm": "internlm1.1", "internlm2": "internlm2", "qwen2": "qwen2"}


def template_of(folder: str | Path) -> ChatTemplate:
    """The template of a Hugging Face folder: its own, or that of its model type.

    Its own is chat_template.jinja, or "chat_template" of tokenizer_config.json (of several, the one named default).
    Raises UserError where there is neither.
    """
    folder = Path(folder)
    settings = read_json(folder / "tokenizer_config.json")
    source = _own_source(folder, settings)
    if source is not None:
        tokens = {key: _token(value) for key, value in settings.items() if key.endswith("_token") and _token(value)}
        return ChatTemplate(f"of {folder}", source, _stops(folder, settings, tokens), tokens)
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in _BY_MODEL_TYPE:
        raise UserError(
            f'{folder}: no chat_template.jinja, no "chat_template" in tokenizer_config.json, and model_type '
            f"{model_type!r} has no built-in one. Name a template: {', '.join(BUILT_IN)}, or a file."
        )
    name = _BY_MODEL_TYPE[model_type]
    hint = " (internlm-chat-7b and -8k were trained with internlm: name it)" if model_type == "internlm" else ""
    logger.info(f"{folder}: no chat template of its own; {name} by its model type{hint}")
    return BUILT_IN[name]


def find_template(name: str) -> ChatTemplate:
    """A template by the name of a built-in one, by the path of a Jinja file, or of a Hugging Face folder.

    Raises UserError for anything else.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(name)
    if path.is_dir():
        return template_of(path)
    if not path.is_file():
        raise UserError(f"chat template {name!r}: neither built in ({', '.join(BUILT_IN)}) nor a file or folder.")
    return ChatTemplate(name, path.read_text(encoding="utf-8"))


def with_marks(template: ChatTemplate) -> ChatTemplate:
    """The template itself, or, where it lacks generation marks, the built-in one that writes the same texts."""
    if template.marks_answers:
        return template
    asked = [Message("user", "\tone "), Message("assistant", " two\n")]  # blanks show what is trimmed
    probes: list[tuple[list[Message], list[dict[str, Any]]]] = [
        ([*asked, Message("user", "three"), Message("assistant", "four")], []),
        ([Message("system", " zero\n"), *asked], []),
    ]
    if "tools" in template.source:
        function = {"name": "f", "description": "é", "parameters": {"type": "object", "properties": {}}}
        probes.append((asked, [{"type": "function", "function": function}]))
    if "tool_calls" in template.source:
        calls, results = (ToolCall("f", {"x": "é"}), ToolCall("g", {})), [Message("tool", "\n2"), Message("tool", "3 ")]
        probes += [([*asked[:1], Message("assistant", said, tool_calls=calls), *results], []) for said in ("", "so ")]
    for known in BUILT_IN.values():
        marked = replace(template, source=known.source)
        if all(_text_or_none(template, *probe) == _text_or_none(marked, *probe) for probe in probes):
            logger.info(f"chat template {template.name} has no generation marks; {known.name} writes the same and has")
            return marked
    return template


def _text_or_none(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
) -> str | None:
    with suppress(UserError):
        return template.render(messages, tools=tools or None)
    return None


def _own_source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = settings.get("chat_template")
    if isinstance(source, list):
        by_name = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, Mapping)}
        source = by_name.get("default")
    return source if isinstance(source, str) else None


def _token(value: Any) -> str:
    """A special token as tokenizer_config.json gives it: its text, or an object with that as "content"."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else ""


def _stops(folder: Path, settings: Mapping[str, Any], tokens: Mapping[str, str]) -> tuple[str, ...]:
    """The texts of generation_config.json's end ids and of the tokenizer's eos token."""
    ids = read_json(folder / "generation_config.json").get("eos_token_id", [])
    added = {number: _token(token) for number, token in settings.get("added_tokens_decoder", {}).items()}
    for token in read_json(folder / "tokenizer.json").get("added_tokens", []):
        added.setdefault(str(token.get("id")), _token(token))
    stops = [added.get(str(number), "") for number in (ids if isinstance(ids, list) else [ids])]
    return tuple(dict.fromkeys(text for text in (*stops, tokens.get("eos_token", "")) if text))
