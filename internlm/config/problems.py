"""What is wrong with a config, in words: key, value, reason, fix."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from internlm.config.fields import field_type, find_field, keys, section_class
from internlm.config.modernise import old_keys
from internlm.config.schema import Config, Section

Path = tuple[str | int, ...]


def validation_problems(error: ValidationError, tree: dict[str, Any]) -> dict[Path, str]:
    """One problem for each wrong key, where pydantic reports a union once for each of its members."""
    found: dict[Path, str] = {}
    for details in error.errors(include_url=False):
        path = _key_path(details["loc"])
        if path not in found:
            found[path] = _describe(path, details, tree)
    return found


def _key_path(loc: Path) -> Path:
    """The part of pydantic's location that names keys of ours; behind it come union members and tuple indices."""
    for end in range(1, len(loc) + 1):
        field = find_field(loc[:end])
        if field is None or section_class(field.annotation) is None:
            return loc[:end]
    return loc


def _describe(path: Path, details: Mapping[str, Any], tree: dict[str, Any]) -> str:
    key = ".".join(str(name) for name in path)
    if details["type"] == "extra_forbidden":
        return f"{key}: unknown key; {nearest(key)}"
    field = find_field(path)
    if details["type"] == "missing" or field is None:
        meaning = f" ({field.description})" if field is not None else ""
        return f"{key}: missing{meaning}; it has no default, so the file or an override must give it"
    value = _look_up(tree, path, details["input"])
    section = section_class(field.annotation)
    expected = f"a dict with keys {', '.join(section.model_fields)}" if section else field_type(field)
    return f"{key} = {value!r}: {type(value).__name__}; expected {expected} ({field.description})"


def _look_up(tree: Any, path: Path, otherwise: Any) -> Any:
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            return otherwise
        tree = tree[name]
    return tree


def nearest(key: str) -> str:
    """A hint for an unknown key: the nearest name beside it, or the same name in another section."""
    section, _, name = key.rpartition(".")
    siblings = _names_in(section)
    if siblings is None:
        return nearest(section)
    close = difflib.get_close_matches(name, [*siblings, *old_keys(section)], n=1, cutoff=0.6)
    if close:
        return f"did you mean {section + '.' if section else ''}{close[0]}?"
    elsewhere = [known.path for known in keys() if known.path.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    where = f"section {section}" if section else "the top level"
    hint = "" if section else "; a helper of the file begins with an underscore or is written in CAPITALS"
    return f"{where} has {', '.join(siblings)}{hint}"


def _names_in(section: str) -> list[str] | None:
    model: type[Section] | None = Config
    for name in section.split(".") if section else ():
        field = model.model_fields.get(name) if model else None
        model = section_class(field.annotation) if field else None
    return None if model is None else list(model.model_fields)
