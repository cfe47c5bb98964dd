"""The schema as a flat list of keys, for help, documentation and error messages."""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from internlm.config.schema import Config, Section

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}  # attributes of pydantic's bounds


@dataclass(frozen=True)
class Key:
    """One knob: its dotted path, and what help says about it."""

    path: str
    type: str
    default: str
    meaning: str

    @property
    def section(self) -> str:
        """The top-level section, or "" for a top-level key."""
        return self.path.split(".")[0] if "." in self.path else ""


def section_class(annotation: Any) -> type[Section] | None:
    """The Section that a field holds, also behind `| None`; None when it holds a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for arg in get_args(annotation) if (found := section_class(arg))), None)
    return None


def keys(model: type[Section] = Config, prefix: str = "") -> Iterator[Key]:
    """Every key below `model`, nested sections flattened, in the order of the schema."""
    for name, field in model.model_fields.items():
        inner = section_class(field.annotation)
        if inner is not None:
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield Key(f"{prefix}{name}", field_type(field), _default(field), field.description or "")


def find_field(path: tuple[str | int, ...]) -> FieldInfo | None:
    """The field at a path of names; what follows a plain value (a tuple index, a dict key) is ignored."""
    model: type[Section] | None = Config
    field: FieldInfo | None = None
    for name in path:
        if model is None:
            break
        field = model.model_fields.get(str(name))
        if field is None:
            return None
        model = section_class(field.annotation)
    return field


def field_type(field: FieldInfo) -> str:
    """The type in words, such as "int > 0 or None"."""
    return type_text(field.annotation, tuple(field.metadata))


def type_text(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = tuple(bound for item in args[1:] for bound in getattr(item, "metadata", (item,)))
        return type_text(args[0], bounds)
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(arg) for arg in args)
    if origin is Literal:
        return " | ".join(repr(arg) for arg in args)
    if origin is tuple:
        return f"list of {type_text(args[0])}"
    if origin is dict:
        return f"dict of {type_text(args[0])} to {type_text(args[1])}"
    if annotation is type(None):
        return "None"
    if section_class(annotation):
        return "dict"
    return annotation.__name__ + _bounds(metadata)


def _bounds(metadata: tuple[Any, ...]) -> str:
    found = {sign: getattr(item, name) for name, sign in _SIGNS.items() for item in metadata if hasattr(item, name)}
    if set(found) == {">=", "<="}:
        return f" in [{found['>=']}, {found['<=']}]"
    if set(found) == {">", "<"}:
        return f" in ({found['>']}, {found['<']})"
    return "".join(f" {sign} {bound}" for sign, bound in found.items())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, float) and value == 8 / 3:
        return "8/3"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e9:
        return f"{value:.1f}"
    return repr(list(value)) if isinstance(value, tuple) else repr(value)
