"""Where the tensors of a Hugging Face folder lie: in safetensors, or in the pickles (`.bin`) of 2023.

Pickles go through the unpickler that checkpoints of 2023 go through, which runs nothing.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.hf_target import INDEX
from internlm.checkpoint.legacy.pickles import read_pickle
from internlm.checkpoint.storage import Storage
from internlm.checkpoint.tensor_file import TensorEntry, read_header, read_slice
from internlm.utils.errors import UserError
from internlm.utils.json_files import parse_object
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

_PICKLE_INDEX = "pytorch_model.bin.index.json"


class TensorFiles:
    """The tensors of a folder, by name. Raises UserError where it has none that we read, or where some are missing."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        self._index = ""  # the file that told of the others
        self.of_tensor = self._find()  # tensor -> file

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor on the CPU in its stored dtype; it must have `shape`."""
        path = self.of_tensor[name]
        file = self._storage.show(path)
        stored: Tensor | TensorEntry | None = (
            self._pickled(path).get(name) if path.endswith(".bin") else self._header(path).get(name)
        )
        if stored is None:
            raise UserError(f"{file} lacks {name}, which {self._index} promises")
        if tuple(stored.shape) != shape:
            raise UserError(f"{file}: {name} is {list(stored.shape)}, by config.json it should be {list(shape)}")
        if isinstance(stored, Tensor):
            return stored.detach()
        try:
            return read_slice(self._storage, stored, tuple((0, size) for size in stored.shape))
        except ValueError as error:
            raise UserError(f"{error} ({name}): the file is damaged, fetch it again") from error

    def _find(self) -> dict[str, str]:
        names = self._storage.names()
        if INDEX in names:
            return self._indexed(INDEX, names)
        if "model.safetensors" in names:
            return dict.fromkeys(self._header("model.safetensors"), "model.safetensors")
        here = self._storage.url
        pickles = {"pytorch_model.bin", _PICKLE_INDEX} & set(names)
        if pickles and not self._storage.is_local:
            raise UserError(f"{here} holds pickled weights, which are read from a local disk alone: copy it to one")
        if _PICKLE_INDEX in pickles:
            return self._indexed(_PICKLE_INDEX, names)
        if pickles:
            return dict.fromkeys(self._pickled("pytorch_model.bin"), "pytorch_model.bin")
        if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
            raise UserError(
                f"{here} holds weights under names that transformers doesn't give them: convert them with it "
                "(from_pretrained, then save_pretrained writes safetensors)"
            )
        raise UserError(f"{here} holds neither model.safetensors nor {INDEX}, nor pytorch_model.bin as in 2023")

    def _indexed(self, index: str, names: list[str]) -> dict[str, str]:
        self._index = index
        files = parse_object(self._storage.read(index), self._storage.show(index)).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise UserError(f"{self._storage.show(index)} has no weight_map of tensors and files; fetch it again")
        if outside := [file for file in files.values() if file != Path(file).name]:
            raise UserError(f"{self._storage.show(index)} names {outside[0]}, which is not in the folder")
        if missing := sorted(set(files.values()) - set(names)):
            raise UserError(f"{self._storage.show(missing[0])} is missing; {index} names it")
        return files

    def _header(self, path: str) -> dict[str, TensorEntry]:
        """Where the tensors of a file lie; each file is looked at once."""
        if path not in self._headers:
            file = self._storage.show(path)
            try:
                self._headers[path], _ = read_header(self._storage, path)
            except FileNotFoundError as error:
                raise UserError(f"{file} is missing; {self._index} names it") from error
            except (ValueError, KeyError) as error:  # no header, or a dtype that we don't know
                raise UserError(f"{file} is damaged or no safetensors file we can read: {error}") from error
        return self._headers[path]

    def _pickled(self, path: str) -> dict[str, Tensor]:
        """The tensors of a pickle, mapped anew each time, so that its pages don't add up in memory."""
        content: Any = read_pickle(self._storage, path)
        if not isinstance(content, dict):
            raise UserError(f"{self._storage.show(path)} holds a {type(content).__name__}, where named tensors belong")
        for key, value in content.items():
            if not isinstance(key, str) or not torch.is_tensor(value):
                raise UserError(
                    f"{self._storage.show(path)} holds {key!r}: a {type(value).__name__}, where names of tensors and "
                    "tensors belong; the file is damaged, or another program wrote it"
                )
        return content
