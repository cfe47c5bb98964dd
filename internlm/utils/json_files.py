"""Small files of one JSON object, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from internlm.utils.errors import UserError, writing


def parse_object(content: bytes | bytearray, file: str) -> dict[str, Any]:
    """The JSON object that is the content of `file`. Raises UserError for anything else."""
    try:
        value = json.loads(content)
    except ValueError as error:  # also bytes that are no text
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object; fetch or write it again")
    return value


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; empty where there is no file. Raises UserError for a file that holds anything else."""
    return parse_object(file.read_bytes(), str(file)) if file.is_file() else {}


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Raises UserError where the file can't be written."""
    with writing(str(file)):
        file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
