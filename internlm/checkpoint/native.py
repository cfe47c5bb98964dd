"""Whole parameters out of a native checkpoint, without a process group: for export and generation."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from internlm.checkpoint.legacy.reader import LegacyReader
from internlm.checkpoint.legacy.resume import newest_legacy_folder
from internlm.checkpoint.manifest import (
    MANIFEST,
    PLACES,
    BrokenCheckpointError,
    Manifest,
    check_files,
    list_checkpoints,
    read_manifest,
)
from internlm.checkpoint.peft_reader import is_adapter_folder
from internlm.checkpoint.shards import ShardIndex
from internlm.checkpoint.storage import Storage
from internlm.config.schema import Config
from internlm.model.lora import merged
from internlm.solver.pieces import Piece
from internlm.utils.errors import UserError
from internlm.utils.json_files import parse_object
from internlm.utils.logger import get_logger

logger = get_logger(__name__)


class NativeReader:
    """The model of one checkpoint; its files are verified first.

    `folder` (or fsspec URL) is a step's folder, a folder of checkpoints or a run's folder: of several the newest good
    one is taken. Raises UserError when there is none.
    """

    def __init__(self, folder: str | Path) -> None:
        url = str(Path(folder).expanduser()) if "://" not in str(folder) else str(folder)
        self._storage, self._folder, manifest = _find(url.rstrip("/"))
        self.path = self._storage.show(self._folder)
        text = bytes(self._storage.read(f"{self._folder}/config.json"))
        try:
            self.config = Config.model_validate_json(text)
        except ValidationError as error:
            raise UserError(f"{self.path}/config.json is of another version of this program: {error}") from error
        self._index = ShardIndex(self._storage, [f"{self._folder}/{name}" for name in _model_files(manifest)])
        logger.info(f"reading the model of checkpoint {self.path}")

    def read(self, name: str) -> Tensor:
        """The global parameter `name` on the CPU, in the dtype it was trained in; in fp32 with its adapter, if any."""
        value = self._read(name)
        place, _, kind = name.rpartition(".")
        lora = self.config.lora
        if lora is None or kind != "weight" or not self.has(f"{place}.lora_a"):
            return value
        return merged(value, self._read(f"{place}.lora_a"), self._read(f"{place}.lora_b"), lora.scale)

    def names(self) -> list[str]:
        """All parameters, adapters included."""
        return list(self._index.shapes)

    def has(self, name: str) -> bool:
        return name in self._index.shapes

    def _read(self, name: str) -> Tensor:
        shape = self._index.shapes.get(name)
        if shape is None:
            raise UserError(f"{self.path} has no parameter {name}")
        whole = tuple((0, size) for size in shape)
        piece = Piece(name, "param", shape, whole, True, lambda: torch.empty(0), lambda value: None)
        try:
            return self._index.read(piece)
        except FileNotFoundError as error:
            raise UserError(
                f"{self.path} was removed while it was read, probably by its run (ckpt.keep_last): start again"
            ) from error


def _model_files(manifest: Manifest) -> list[str]:
    return [name for name in manifest.files if name.startswith("model-")]


def _find(url: str) -> tuple[Storage, str, Manifest]:
    """The storage, folder and manifest of the newest checkpoint at `url` whose model verifies."""
    parent, _, name = url.rpartition("/")
    here = Storage(url)
    if MANIFEST in here.names():
        candidates = [(0, Storage(parent or ("/" if url.startswith("/") else ".")), name)]
    else:
        roots = [Storage(f"{url}/{place}") for place in PLACES]
        candidates = [(step, root, folder) for root in roots for step, folder in list_checkpoints(root)]
        candidates.sort(key=lambda item: -item[0])
    if not candidates:
        raise UserError(f"{url} is no checkpoint and holds none: give a folder with {MANIFEST}, or the one above it")
    reasons = []
    for _, root, folder in candidates:
        try:
            manifest = read_manifest(root, folder)
            problems = check_files(root, folder, manifest, ["config.json", *_model_files(manifest)])
        except BrokenCheckpointError as error:
            problems = [str(error)]
        if not problems:
            return root, folder, manifest
        reasons.append(f"{root.show(folder)}: {'; '.join(problems)}")
        logger.warning(f"passing over a broken checkpoint: {reasons[-1]}")
    raise UserError("no checkpoint is whole:\n" + "\n".join(reasons))


CheckpointReader = NativeReader | LegacyReader


def open_checkpoint(
    folder: str | Path, mlp: Literal["old", "new"] | None = None, top_k: int | None = None
) -> CheckpointReader:
    """The reader of a checkpoint of this program or of the 2023 framework, or of the newest in a folder of them.

    `mlp` settles what a folder of 2023 with square feed-forward layers leaves open, `top_k` what one with experts may
    leave open, see `LegacyReader`.
    """
    url = str(Path(folder).expanduser()) if "://" not in str(folder) else str(folder)
    legacy = newest_legacy_folder(url)
    return NativeReader(folder) if legacy is None else LegacyReader(legacy, mlp=mlp, top_k=top_k)


def is_hf_folder(folder: str | Path) -> bool:
    """Whether an adapter of PEFT lies there, or a config.json of Hugging Face; those of runs have a model section."""
    storage = Storage(str(folder))
    if is_adapter_folder(storage):
        return True
    if "config.json" not in storage.names():
        return False
    about = parse_object(storage.read("config.json"), storage.show("config.json"))
    return "model_type" in about and "model" not in about
