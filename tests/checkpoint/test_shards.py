"""Boxes cut one way, read another."""

import json
import random
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from internlm.checkpoint.shards import ShardIndex, file_of, key_of, parse_key
from internlm.checkpoint.storage import Storage
from internlm.checkpoint.tensor_file import write_tensors
from internlm.core.placement import Box, box_shape, boxes_of_interval
from internlm.solver.pieces import Piece
from internlm.utils.errors import UserError

SHAPE = (5, 3, 4)


def piece_of(
    box: Box, kind: str = "param", shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32
) -> Piece:
    return Piece("w", kind, shape, box, True, partial(torch.zeros, box_shape(box), dtype=dtype), lambda value: None)


def part_of(tensor: Tensor, box: Box) -> Tensor:
    return tensor[tuple(slice(*span) for span in box)]


def cuts(parts: int, seed: int) -> list[Box]:
    """Boxes of a random cut of the flat tensor into `parts` intervals."""
    inner = sorted(random.Random(seed).sample(range(1, prod(SHAPE)), parts - 1))
    ends = [0, *inner, prod(SHAPE)]
    return [box for a, b in pairwise(ends) for box, _, _ in boxes_of_interval(SHAPE, a, b)]


def write(folder: Path, tensor: Tensor, boxes: list[Box], kind: str = "param") -> ShardIndex:
    """One file per box."""
    storage, paths = Storage(str(folder)), []
    for rank, box in enumerate(boxes):
        paths.append(file_of(kind, rank))
        tensors = {key_of("w", kind, box): part_of(tensor, box).contiguous()}
        write_tensors(storage, paths[-1], tensors, {"shapes": json.dumps({"w": SHAPE})})
    return ShardIndex(storage, paths)


@pytest.mark.parametrize("saved_parts", [1, 2, 7])
@pytest.mark.parametrize("read_parts", [1, 3, 8])
def test_any_cut_reads_any_other(saved_parts: int, read_parts: int, tmp_path: Path) -> None:
    tensor = torch.randn(SHAPE)
    index = write(tmp_path, tensor, cuts(saved_parts, seed=1))
    columns: list[Box] = [((0, 5), (i, i + 1), (1, 3)) for i in range(3)]  # as a tensor-parallel rank would cut
    for box in cuts(read_parts, seed=2) + columns:
        assert torch.equal(index.read(piece_of(box)), part_of(tensor, box)), box


def test_scalar_and_key_text() -> None:
    for box in ((), ((0, 3),), ((1, 2), (30, 45))):
        assert parse_key(key_of("layers.0.w", "exp_avg", box)) == ("layers.0.w", "exp_avg", box)
    assert key_of("w", "master", ((0, 4), (0, 64))) == "w/master[0:4,0:64]"


def test_a_missing_box_is_named(tmp_path: Path) -> None:
    index = write(tmp_path, torch.randn(SHAPE), [((0, 4), (0, 3), (0, 4))])
    with pytest.raises(UserError, match=r"w/param\[3:5,0:3,0:4\]: the checkpoint holds 12 of its 24 elements"):
        index.read(piece_of(((3, 5), (0, 3), (0, 4))))


def test_a_box_saved_twice_is_refused(tmp_path: Path) -> None:
    whole = ((0, 5), (0, 3), (0, 4))
    index = write(tmp_path, torch.randn(SHAPE), [whole, whole])
    with pytest.raises(UserError, match="holds 120 of its 60 elements"):
        index.read(piece_of(whole))


def test_another_shape_gives_both(tmp_path: Path) -> None:
    index = write(tmp_path, torch.randn(SHAPE), cuts(1, 0))
    with pytest.raises(UserError, match=r"w: shape \[5, 3, 4\] in the checkpoint, \[5, 6, 4\] in this run"):
        index.read(piece_of(((0, 5), (0, 6), (0, 4)), shape=(5, 6, 4)))


def test_fp32_reads_masters_of_16_bit_runs_and_the_other_way_round(tmp_path: Path) -> None:
    tensor, whole = torch.randn(SHAPE), ((0, 5), (0, 3), (0, 4))
    write(tmp_path, tensor.bfloat16(), [whole])
    write(tmp_path, tensor, [whole], "master")
    index = ShardIndex(Storage(str(tmp_path)), ["model-00000.safetensors", "optimizer-00000.safetensors"])
    assert torch.equal(index.read(piece_of(whole)), tensor)
    assert torch.equal(index.read(piece_of(whole, dtype=torch.bfloat16)), tensor.bfloat16())
    fp32_only = write(tmp_path, tensor, [whole])
    assert torch.equal(fp32_only.read(piece_of(whole, "master")), tensor)
