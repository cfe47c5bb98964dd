"""Reading config files: Python that is run, its `_base_`s before it, or a stored JSON."""

import copy
import difflib
import importlib
import json
import runpy
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from internlm.config.checks import ConfigError
from internlm.config.legacy import Tree
from internlm.config.schema import Config


def read_layers(source: str | Path | dict[str, Any], open_files: tuple[Path, ...] = ()) -> Iterator[tuple[str, Tree]]:
    """(origin, names) of `source` and, before it, of its bases."""
    if isinstance(source, dict):
        origin, folder, names = "dict", Path.cwd(), copy.deepcopy(source)
    else:
        path = Path(source)
        if path.resolve() in open_files:
            raise ConfigError(str(source), [f"_base_ of {open_files[-1]} leads back to {path}"])
        origin, folder, names = str(source), path.parent, _read(path)
        open_files = (*open_files, path.resolve())
    bases = names.pop("_base_", ())
    bases = [bases] if isinstance(bases, str | Path) else bases
    if not isinstance(bases, list | tuple) or not all(isinstance(base, str | Path) for base in bases):
        raise ConfigError(origin, [f"_base_ = {bases!r}: expected a path or a list of paths"])
    for base in bases:
        yield from read_layers(folder / base, open_files)
    yield origin, {key: value for key, value in names.items() if _is_key(key)}


def _is_key(name: str) -> bool:
    """Names with an underscore in front and constants of the file, such as SEQ_LEN, are no keys."""
    return not name.startswith("_") and (not name.isupper() or name in Config.model_fields)


def _read(path: Path) -> Tree:
    if not path.is_file():
        beside = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {path.parent / beside[0]}?" if beside else ""
        raise ConfigError(str(path), [f"no such file{hint}"])
    if path.suffix == ".json":
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(str(path), [f"not a JSON object: {error}"]) from error
        if not isinstance(value, dict):
            raise ConfigError(str(path), [f"holds a {type(value).__name__}, expected a JSON object"])
        return value
    if path.suffix != ".py":
        raise ConfigError(str(path), ["a config is a Python file and ends in .py"])
    with _importable(path.parent.resolve(), Path.cwd()):
        try:
            names = runpy.run_path(str(path))
        except (Exception, SystemExit) as error:
            raise ConfigError(str(path), [_where(error, path)]) from error
    return {key: value for key, value in names.items() if not isinstance(value, ModuleType) and not callable(value)}


def _where(error: BaseException, path: Path) -> str:
    """The line of the config file at which it failed."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}: {(error.text or '').strip()}"
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), "?")
    return f"line {line}: {type(error).__name__}: {error}"


@contextmanager
def _importable(*folders: Path) -> Iterator[None]:
    """Modules beside the config may be imported while it runs, and are forgotten after: another config has its own."""
    known = set(sys.modules)
    sys.path[:0] = [str(folder) for folder in folders]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in folders:
            sys.path.remove(str(folder))
        for name in set(sys.modules) - known:
            stem = Path(*name.split("."))
            homes = {folder / end for folder in folders for end in (stem.with_suffix(".py"), stem / "__init__.py")}
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file) in homes and name.split(".")[0] != "internlm":
                del sys.modules[name]
