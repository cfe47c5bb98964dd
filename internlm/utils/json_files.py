"""Small JSON files, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from internlm.utils.errors import UserError, writing


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; empty where there is no file. Raises UserError for a file that holds anything else."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object.")
    return value


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Raises UserError where the file can't be written."""
    with writing(str(file)):
        file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
