"""The folder that an export goes to."""

from pathlib import Path

from internlm.utils.errors import UserError

INDEX = "model.safetensors.index.json"


def prepare_folder(folder: Path, force: bool) -> None:
    """Makes `folder`, and with `force` clears it of an earlier export. Raises UserError for any other content."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"target {folder} is a file; give a folder")
    if folder.exists() and any(folder.iterdir()):
        if not force:
            raise UserError(f"target folder {folder} is not empty; give another one, or --force to replace an export")
        if other := _other_than_export(folder):
            raise UserError(f"target folder {folder} holds {other}, which is no export and stays; give another folder")
        for old in ("config.json", INDEX, *(file.name for file in folder.glob("model*.safetensors"))):
            (folder / old).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def _other_than_export(folder: Path) -> str | None:
    """A sign that a checkpoint or a run lies in `folder`; None: it can be cleared for an export."""
    signs = ("manifest.json", "*/manifest.json", "model_tp*.pt", "metrics.jsonl")
    found = [path.relative_to(folder) for sign in signs for path in folder.glob(sign)]
    return str(found[0]) if found else None
