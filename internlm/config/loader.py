"""From a config file to a frozen `Config`.

file and its `_base_`s -> `section.key=value` overrides -> old spellings (legacy.py) -> family defaults (presets.py)
-> schema -> checks. Every problem on the way is collected, and all are raised together.
"""

import ast
import copy
import difflib
import logging
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from internlm.config.checks import ConfigError, find_problems
from internlm.config.fields import find_field, section_class
from internlm.config.legacy import UNBUILT_FAMILIES, Tree
from internlm.config.modernise import Report, modernise, settle
from internlm.config.presets import PRESETS
from internlm.config.problems import validation_problems
from internlm.config.schema import Config
from internlm.config.source import read_layers
from internlm.utils.logger import get_logger, log_once

logger = get_logger(__name__)


def load_config(
    source: str | Path | dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    **top_level: Any,
) -> Config:
    """The config of a run.

    `source` is a `.py` file, a stored `config.json`, or a dict. `overrides` are `section.key=value` texts; `top_level`
    are top-level keys (seed=, run_dir=) that win over all; None is not given. With `world_size` the sizes of `parallel`
    are checked against it too. Raises ConfigError with all problems.
    """
    report = Report()
    tree: Tree = {}
    for origin, layer in read_layers(source):
        tree = merge(tree, modernise(layer, origin, report))
    tree = merge(tree, modernise(_parse_overrides(overrides, report), "override", report))
    tree = merge(tree, {key: value for key, value in top_level.items() if value is not None})
    tree = _with_family(settle(tree, report), report)
    config, problems = _validate(tree, world_size)
    problems = [*report.problems, *problems]
    title = "config" if isinstance(source, dict) else str(source)
    if problems or config is None:
        raise ConfigError(title, problems)
    for note in report.notes:
        log_once(logger, note)
    for warning in report.warnings:
        log_once(logger, warning, logging.WARNING)
    if config.data.valid_every and config.data.valid_folder is None:
        log_once(logger, f"data.valid_every = {config.data.valid_every} has no effect without data.valid_folder")
    return config


def merge(base: Tree, top: Tree) -> Tree:
    """`base` with `top` over it: dicts merge key by key, anything else is replaced."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


# ---- overrides -------------------------------------------------------------------------------------------------------


def _parse_overrides(overrides: Sequence[str], report: Report) -> Tree:
    tree: Tree = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            report.problems.append(f"override {text!r}: expected section.key=value, as model.num_layers=4")
            continue
        if not value:  # what a shell makes of data.train_folder=$UNSET, which would mean random tokens
            report.problems.append(f"override {text!r}: there is no value; write {key}=None or {key}='' for none")
            continue
        if key.isupper() and key not in Config.model_fields:
            report.problems.append(f"override {text!r}: a constant of the file has done its work; set the key itself")
            continue
        *parents, last = key.split(".")
        section = tree
        for name in parents:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                report.problems.append(f"override {text!r}: {name} was given a plain value by another override")
                break
        else:
            section[last] = _parse_value(key, value)
    return tree


def _parse_value(key: str, text: str) -> Any:
    """A Python literal, else the text itself; a key of type str takes the text as it is (`data.skip_batches=3`)."""
    words = {"true": True, "false": False, "none": None, "null": None}
    try:
        value = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    field = find_field(tuple(key.split(".")))
    annotation = None if field is None else field.annotation
    kinds = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if str in kinds and not isinstance(value, str) and not (value is None and type(None) in kinds):
        return text
    return value


# ---- family, schema, checks ------------------------------------------------------------------------------------------


def _with_family(tree: Tree, report: Report) -> Tree:
    family = tree.get("model_type", Config.model_fields["model_type"].default)
    if family in PRESETS:
        model = tree.get("model", {})
        return {**tree, "model": merge(PRESETS[family], model)} if isinstance(model, dict) else tree
    if family in UNBUILT_FAMILIES:
        report.problems.append(f"model_type = {family!r}: {UNBUILT_FAMILIES[family]} is not available yet")
    elif isinstance(family, str):
        close = difflib.get_close_matches(family.upper(), PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        report.problems.append(f"model_type = {family!r}: unknown; expected one of {', '.join(PRESETS)}{hint}")
    return tree


def _validate(tree: Tree, world_size: int | None) -> tuple[Config | None, list[str]]:
    """The config, and every problem of schema and checks.

    When keys are wrong, the checks still run on the rest: each wrong key gets its default, or a stand-in where it has
    none, and what the checks then say about that key itself is left out.
    """
    try:
        config = Config.model_validate(tree)
        return config, find_problems(config, world_size)
    except ValidationError as error:
        problems = validation_problems(error, tree)
    patched = copy.deepcopy(tree)
    for path in problems:
        _stand_in(patched, path)
    wrong = [".".join(map(str, path)) for path in problems]
    try:
        found = find_problems(Config.model_validate(patched), world_size)
        others = [line for line in found if not any(key in line for key in wrong)]
    except ValidationError:  # a whole section is missing; the checks would have nothing to look at
        others = []
    return None, [*problems.values(), *others]


def _stand_in(tree: Tree, path: tuple[str | int, ...]) -> None:
    section: Any = tree
    for name in path[:-1]:
        section = section.get(name) if isinstance(section, dict) else None
    field = find_field(path)
    if not isinstance(section, dict):
        return
    section.pop(str(path[-1]), None)
    if field is not None and field.is_required() and section_class(field.annotation) is None:
        section[str(path[-1])] = "." if field.annotation is str else 64
