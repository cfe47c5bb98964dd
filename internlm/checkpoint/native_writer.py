"""A model from elsewhere as a checkpoint of ours, written tensor by tensor."""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from internlm.checkpoint.commit import work_folder
from internlm.checkpoint.hf_names import native_shapes
from internlm.checkpoint.lease import claim_folder
from internlm.checkpoint.manifest import MANIFEST, Manifest, list_checkpoints
from internlm.checkpoint.shards import file_of, key_of
from internlm.checkpoint.storage import Storage
from internlm.checkpoint.tensor_file import cast, stream_tensors, write_bytes
from internlm.checkpoint.triggers import new_token
from internlm.config.schema import Config
from internlm.train.state import TrainState
from internlm.utils.device import torch_dtype
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger

logger = get_logger(__name__)


def write_native(named: Callable[[str], Tensor], config: Config, folder: str | Path) -> str:
    """Writes the model as checkpoint of step 0 in `folder`; returns its path. It holds parameters only.

    `named(name)` returns a global native parameter; each is asked for once, in order. Tensors get the dtype of
    `config.model`. Raises UserError when the folder holds checkpoints already, is in use, or can't be written.
    """
    storage = Storage(str(folder))
    _refuse_existing(storage)
    with closing(claim_folder(storage, "target folder")):
        _refuse_existing(storage)  # another may have ended in between
        return _write(named, config, storage)


def _refuse_existing(storage: Storage) -> None:
    if existing := list_checkpoints(storage):
        raise UserError(f"{storage.url} holds checkpoints already ({existing[0][1]} ...); give another target folder")


def _write(named: Callable[[str], Tensor], config: Config, storage: Storage) -> str:
    """Writes all of it, or on an error leaves nothing."""
    token, step = new_token(), 0
    work = work_folder(storage, step, token)
    dtype = torch_dtype(config.model.dtype)
    shapes = native_shapes(config.model)
    whole = {key_of(name, "param", tuple((0, size) for size in shape)): name for name, shape in shapes.items()}
    metadata = {"token": token, "step": str(step), "shapes": json.dumps(shapes)}

    @torch.no_grad()
    def value_of(key: str) -> Tensor:
        return cast(named(whole[key]).detach().cpu(), dtype, whole[key]).contiguous()

    model = file_of("param", 0)
    kinds = {key: (dtype, shapes[name]) for key, name in whole.items()}
    state = {"train": asdict(TrainState()), "optimizer": {"num_updates": 0}}
    with storage.new_folder(work):
        files = {
            model: stream_tensors(storage, f"{work}/{model}", kinds, value_of, metadata),
            "config.json": write_bytes(storage, f"{work}/config.json", [config.model_dump_json(indent=1).encode()]),
            "state.json": write_bytes(storage, f"{work}/state.json", [json.dumps(state, indent=1).encode()]),
        }
        saved_at = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = Manifest(step, "normal", token, saved_at, {"ranks": 1}, dict(sorted(files.items())))
        write_bytes(storage, f"{work}/{MANIFEST}", [manifest.render()])
        if storage.is_local:
            storage.rename_folder(work, str(step))
    path = storage.show(str(step))
    logger.info(f"wrote {path}: {len(shapes)} parameters in {config.model.dtype}")
    return path
