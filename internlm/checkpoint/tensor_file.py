"""safetensors files, written in one pass with their sha256, and read by byte ranges.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header that gives each
tensor's dtype, shape and byte range, then the bytes. It is read here directly, since the library maps local files only
and a checkpoint may lie in an object store; the tests read the same files with the library.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.storage import Storage, patiently
from internlm.utils.errors import UserError, writing

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_HEADER_LIMIT = 100 << 20  # of the format
_HASH_STEP = 1 << 22  # bytes per update, so that other threads of the process get their turn


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says about a file."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies."""

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte of the file


def write_bytes(
    storage: Storage, path: str, parts: Iterable[bytes | memoryview], total: int | None = None
) -> FileRecord:
    """Writes the parts one after another and hashes them on the way. `total`: their bytes, for messages.

    Raises:
        UserError: the file can't be written.
    """
    size, digest = 0, hashlib.sha256()
    what = storage.show(path) if total is None else f"{storage.show(path)}, which needs {total} bytes,"
    with writing(what), storage.writer(path) as write:
        for part in parts:
            for start in range(0, len(part), _HASH_STEP):
                piece = part[start : start + _HASH_STEP]
                digest.update(piece)
                write(piece)
            size += len(part)
    return FileRecord(size, digest.hexdigest())


def write_tensors(storage: Storage, path: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> FileRecord:
    """Writes CPU tensors under their keys."""
    kinds = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    return stream_tensors(storage, path, kinds, tensors.__getitem__, metadata)


def stream_tensors(
    storage: Storage,
    path: str,
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    value_of: Callable[[str], Tensor],
    metadata: dict[str, str],
) -> FileRecord:
    """Writes tensors of which dtype and shape are known before: each is asked for once, in order, and then dropped."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for key, (dtype, shape) in kinds.items():
        end = offset + prod(shape) * dtype.itemsize
        header[key] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the first tensor starts aligned

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little")
        yield text
        for key, (dtype, shape) in kinds.items():
            value = value_of(key)
            assert value.dtype == dtype and tuple(value.shape) == shape, (key, value.dtype, value.shape)
            yield _bytes_of(value)

    return write_bytes(storage, path, parts(), 8 + len(text) + offset)


def read_header(storage: Storage, path: str) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Entries by key, and the metadata. Raises ValueError where the file is no safetensors file."""
    length = int.from_bytes(patiently(partial(storage.read, path, 0, 8)), "little")
    if length > _HEADER_LIMIT:
        raise ValueError(f"{storage.show(path)}: header of {length} bytes; not a safetensors file")
    header = json.loads(patiently(partial(storage.read, path, 8, 8 + length)))
    metadata = header.pop("__metadata__", {})
    entries = {
        key: TensorEntry(path, _DTYPES[about["dtype"]], tuple(about["shape"]), 8 + length + about["data_offsets"][0])
        for key, about in header.items()
    }
    return entries, metadata


def read_slice(storage: Storage, entry: TensorEntry, box: tuple[tuple[int, int], ...]) -> Tensor:
    """The part [start, stop) per dim of a stored tensor; reads from its first to its last element, no more."""
    strides = torch.empty(entry.shape, device="meta").stride()
    first = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    last = sum((stop - 1) * stride for (_, stop), stride in zip(box, strides, strict=True))
    width = entry.dtype.itemsize
    start, stop = entry.start + first * width, entry.start + (last + 1) * width
    data = patiently(partial(storage.read, entry.path, start, stop))
    if len(data) != (last + 1 - first) * width:
        raise ValueError(f"{storage.show(entry.path)}: ends inside a tensor")
    flat = torch.frombuffer(data, dtype=entry.dtype)
    return flat.as_strided([stop - start for start, stop in box], strides)


def read_tensors(storage: Storage, path: str) -> dict[str, Tensor]:
    """All tensors of a small file."""
    entries, _ = read_header(storage, path)
    return {key: read_slice(storage, entry, tuple((0, n) for n in entry.shape)) for key, entry in entries.items()}


def _bytes_of(tensor: Tensor) -> memoryview:
    assert tensor.device.type == "cpu" and tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`value` in `dtype`; raises UserError where a finite value would become infinite."""
    result = value.to(dtype)
    if dtype == torch.float16 and value.dtype != dtype and bool((result.isinf() & value.isfinite()).any()):
        raise UserError(
            f"{name} holds {value.float().abs().max():.6g}, float16 ends at 65504: convert it with --dtype bfloat16"
        )
    return result
