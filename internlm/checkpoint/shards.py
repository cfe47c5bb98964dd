"""Tensors by name, kind and box: how a rank's pieces become files, and how any other layout finds its part in them.

A key reads `layers.3.attention.wo.weight/master[0:4,0:64]`: parameter name, kind (param, master, exp_avg, exp_avg_sq),
and the box of the global tensor that is stored. The boxes of all ranks' files together tile every tensor, so a reader
needs no knowledge of the ranks that wrote them.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor

from internlm.checkpoint.storage import Storage
from internlm.checkpoint.tensor_file import TensorEntry, read_header, read_slice
from internlm.core.placement import Box, box_shape
from internlm.solver.pieces import Piece
from internlm.utils.errors import UserError

_KEY = re.compile(r"(?P<name>.+)/(?P<kind>\w+)\[(?P<box>[\d:,]*)\]")


def key_of(name: str, kind: str, box: Box) -> str:
    return f"{name}/{kind}[{','.join(f'{start}:{stop}' for start, stop in box)}]"


def parse_key(key: str) -> tuple[str, str, Box]:
    """(name, kind, box) of a key. Raises ValueError."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"{key!r} is not of the form name/kind[start:stop,...]")
    ranges = [part.split(":") for part in match["box"].split(",") if part]
    return match["name"], match["kind"], tuple((int(start), int(stop)) for start, stop in ranges)


def file_of(kind: str, rank: int) -> str:
    """The file that holds a kind of tensors."""
    return f"{'model' if kind == 'param' else 'optimizer'}-{rank:05d}.safetensors"


class HostCopy:
    """Copies of pieces in host memory, page-locked beside a GPU. The memory is kept for the next save."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, pieces: Iterable[Piece], rank: int) -> dict[str, dict[str, Tensor]]:
        """Copies what this rank has to write: tensors by file and key. Valid until the next call."""
        files: dict[str, dict[str, Tensor]] = defaultdict(dict)
        on_gpu = False
        for piece in pieces:
            if not piece.owner or not prod(box_shape(piece.box)):
                continue
            key, source = key_of(piece.name, piece.kind, piece.box), piece.read()
            on_gpu = on_gpu or source.is_cuda
            buffer = self._buffers.get(key)
            if buffer is None:
                buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._buffers[key] = buffer
            buffer.copy_(source, non_blocking=True)
            files[file_of(piece.kind, rank)][key] = buffer
        if on_gpu:
            torch.cuda.synchronize()
        return dict(files)


def metadata_of(pieces: Iterable[Piece], token: str, step: int) -> dict[str, str]:
    """What stands in the header of a shard: of which save it is, and the whole tensors' shapes."""
    shapes = {piece.name: list(piece.global_shape) for piece in pieces}
    return {"token": token, "step": str(step), "shapes": json.dumps(shapes)}


class ShardIndex:
    """Where each box of a checkpoint lies, read from the headers of its shards."""

    def __init__(self, storage: Storage, paths: Sequence[str]) -> None:
        self.storage = storage
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._boxes: dict[tuple[str, str], list[tuple[Box, TensorEntry]]] = defaultdict(list)
        for path in paths:
            entries, metadata = read_header(storage, path)
            self.shapes.update((name, tuple(shape)) for name, shape in json.loads(metadata["shapes"]).items())
            for key, entry in entries.items():
                name, kind, box = parse_key(key)
                self._boxes[name, kind].append((box, entry))

    def read(self, piece: Piece) -> Tensor:
        """The values of a piece, put together from all boxes that overlap it, in the dtype they were saved in.

        Raises:
            UserError: the tensor has another size in the checkpoint, or some of its elements are not there.
        """
        self._check_shape(piece)
        boxes = self._boxes.get((piece.name, self._saved_kind(piece)), [])
        value = torch.empty(box_shape(piece.box), dtype=boxes[0][1].dtype if boxes else None)
        found = 0
        for box, entry in boxes:
            common = _overlap(box, piece.box)
            if common is None:
                continue
            target = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(common, piece.box, strict=True))
            source = tuple((a - low, b - low) for (a, b), (low, _) in zip(common, box, strict=True))
            value[target] = read_slice(self.storage, entry, source)
            found += prod(box_shape(common))
        if found != value.numel():
            what = key_of(piece.name, piece.kind, piece.box)
            raise UserError(f"{what}: the checkpoint holds {found} of its {value.numel()} elements")
        return value

    def _check_shape(self, piece: Piece) -> None:
        saved = self.shapes.get(piece.name)
        if saved is None:
            raise UserError(
                f"{key_of(piece.name, piece.kind, piece.box)}: the checkpoint has no tensor {piece.name}; "
                "the model of this run is another one"
            )
        if saved != tuple(piece.global_shape):
            raise UserError(
                f"{piece.name}: shape {list(saved)} in the checkpoint, {list(piece.global_shape)} in this run; "
                "give the model section the sizes of the checkpoint"
            )

    def _saved_kind(self, piece: Piece) -> str:
        """Which saved kind fills a piece: fp32 and 16-bit runs read each other's checkpoints, as exactly as may be."""
        masters, params = (self._boxes.get((piece.name, kind)) for kind in ("master", "param"))
        if piece.kind == "master" and not masters:
            return "param"
        if piece.kind == "param" and masters and params and params[0][1].dtype != torch.float32:
            return "master" if piece.read().dtype == torch.float32 else "param"
        return piece.kind


def _overlap(a: Box, b: Box) -> Box | None:
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return None if any(start >= stop for start, stop in common) else common
