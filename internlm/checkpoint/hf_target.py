"""The folder that an export goes to."""

import re
from pathlib import Path

from internlm.checkpoint.hf_remote_code import REMOTE_CODE_FILES
from internlm.checkpoint.hf_tokenizer import TOKENIZER_FILES
from internlm.utils.errors import UserError

INDEX = "model.safetensors.index.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
_WEIGHTS_AND_CONFIG = re.compile(r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX))


def prepare_folder(folder: Path, force: bool) -> None:
    """Makes `folder`, and with `force` removes every file that an export can write, and nothing else.

    Raises UserError for a folder that is not empty, with `force` for one of a checkpoint or a run.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"target {folder} is a file; give a folder")
    if folder.exists() and any(folder.iterdir()):
        if not force:
            raise UserError(f"target folder {folder} is not empty; give another one, or --force to replace an export")
        if other := _other_than_export(folder):
            raise UserError(f"target folder {folder} holds {other}, which is no export and stays; give another folder")
        others = {*TOKENIZER_FILES, *REMOTE_CODE_FILES, *ADAPTER_FILES}
        for file in folder.iterdir():  # what is left would be loaded with the new export
            if _WEIGHTS_AND_CONFIG.fullmatch(file.name) or file.name in others:
                file.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def _other_than_export(folder: Path) -> str | None:
    """A sign that a checkpoint or a run lies in `folder`; None: it can be cleared for an export."""
    signs = ("manifest.json", "*/manifest.json", "model_tp*.pt", "metrics.jsonl")
    found = [path.relative_to(folder) for sign in signs for path in folder.glob(sign)]
    return str(found[0]) if found else None
