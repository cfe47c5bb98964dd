"""Which chat template a name, a file or a Hugging Face folder stands for, and what stands in for one without marks."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from internlm.data.chat_template import BUILT_IN, ChatTemplate
from internlm.data.message import Message, ToolCall
from internlm.utils.errors import UserError
from internlm.utils.json_files import read_json
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

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
        if all(template.text_or_none(talk, False, t) == marked.text_or_none(talk, False, t) for talk, t in probes):
            logger.info(f"chat template {template.name} has no generation marks; {known.name} writes the same and has")
            return marked
    return template


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
