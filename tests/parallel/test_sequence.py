"""Rows cut between ranks: attention against each document on its own, and training against one rank."""

from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.core.launch import World
from internlm.core.mesh import build_mesh
from internlm.model.batch import IGNORE_INDEX, Batch, Segments
from internlm.ops.attention import attention_reference
from internlm.parallel.sequence import SequenceAttention, own_part
from tests.parallel.oracle import CPU, compare, make_config
from tests.parallel.test_zigzag import random_lengths
from tests.pool import run_ranks

ROW = 32
LAYOUTS = [(1, 2), (1, 4), (2, 1), (4, 1), (2, 2)]  # (ring, ulysses)
# The whole row, tokens alone, and two at random
DOCUMENTS = [(ROW,), (1,) * ROW, random_lengths(ROW, 2), random_lengths(ROW, 4), (ROW - 1, 1), (1, ROW - 1)]


def row_of(lengths: tuple[int, ...], *sizes: tuple[int, int]) -> tuple[Batch, list[Tensor]]:
    """A row, whose tokens are their places in it, and a random tensor [tokens, heads, head_dim] for each of `sizes`."""
    generator = torch.Generator().manual_seed(len(lengths))
    places = torch.arange(ROW)
    labels = torch.where(places % 3 == 0, IGNORE_INDEX, places)
    positions = torch.cat([torch.arange(length) for length in lengths])
    batch = Batch(places, labels, positions, Segments.of(lengths), places % 2, int((places % 3 != 0).sum()))
    return batch, [torch.randn(ROW, *size, generator=generator, dtype=torch.float64) for size in sizes]


def inputs_of(index: int) -> tuple[Batch, list[Tensor]]:
    """A row with the documents of that number, a gradient, q, k and v; key/value heads are 4, 2 or 1."""
    kv_heads = (4, 2, 1)[index % 3]
    return row_of(DOCUMENTS[index], (4, 8), (4, 8), (kv_heads, 8), (kv_heads, 8))


def attention_on_rank(rank: int, world_size: int, ring: int, ulysses: int) -> list[tuple[Batch, list[Tensor]]]:
    """This rank's part of each row, with attention and the gradients of q, k and v for its tokens."""
    config = make_config({"context": {"ring": ring, "ulysses": ulysses}})
    mesh = build_mesh(config.parallel, World(rank, rank, world_size, CPU))
    attend = SequenceAttention(mesh.group("ulysses"), mesh.group("ring"))
    results = []
    for index in range(len(DOCUMENTS)):
        row, (grad, *whole) = inputs_of(index)
        part = own_part(row, mesh)
        own = [x[part.tokens].requires_grad_() for x in whole]
        out = attend(own[0], own[1], own[2], part.segments)
        out.backward(grad[part.tokens])
        results.append((part, [out.detach(), *(x.grad for x in own if x.grad is not None)]))
    return results


def each_document_alone(index: int) -> tuple[Batch, list[Tensor]]:
    """The row, and attention of its documents one by one with the gradients of q, k and v."""
    row, (grad, *whole) = inputs_of(index)
    q, k, v = (x.requires_grad_() for x in whole)
    documents = zip(*(x.split(row.segments.lengths) for x in (q, k, v)), strict=True)
    out = torch.cat([attention_reference(*document, Segments.of((len(document[0]),))) for document in documents])
    out.backward(grad)
    return row, [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize(("ring", "ulysses"), LAYOUTS)
def test_packed_on_ranks_is_each_document_alone(ring: int, ulysses: int) -> None:
    ranks = run_ranks(ring * ulysses, attention_on_rank, ring, ulysses)
    for index in range(len(DOCUMENTS)):
        row, expected = each_document_alone(index)
        seen: list[int] = []
        for results in ranks:
            part, found = results[index]
            seen += part.tokens.tolist()
            assert torch.equal(part.labels, row.labels[part.tokens])
            assert torch.equal(part.positions, row.positions[part.tokens])
            assert part.type_ids is not None and torch.equal(part.type_ids, part.tokens % 2)
            assert part.num_trained == int((part.labels != IGNORE_INDEX).sum())
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs[part.tokens])
        assert sorted(seen) == list(range(ROW))


# (ranks, parallel, model)
TRAINED: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (2, {"tensor": {"size": 2, "mode": "isp"}, "weight": {"size": 2, "overlap": True}}, {"checkpoint": True}),
    (4, {"context": {"ulysses": 4}, "zero1": {"size": 2}}, {"num_kv_attention_heads": 2}),
    (2, {"context": {"ring": 2}}, {"qk_norm": True}),
    (4, {"context": {"ring": 4}, "weight": {"size": 2}, "gradient": {"size": 4}}, {"checkpoint": True}),
    (4, {"context": {"ring": 2, "ulysses": 2}, "zero1": {"size": 1}}, {"num_kv_attention_heads": 1}),
    (4, {"context": {"ulysses": 2}, "tensor": {"size": 2, "mode": "msp"}}, {"checkpoint": 0.5}),
    (4, {"context": {"ring": 2}, "tensor": {"size": 2}}, {"num_kv_attention_heads": 2}),
]


@pytest.mark.parametrize(("world_size", "parallel", "model"), TRAINED)
def test_trains_as_one_rank(world_size: int, parallel: dict[str, Any], model: dict[str, Any]) -> None:
    compare(world_size, parallel, model=model, loss={"label_smoothing": 0.1})


def test_the_rule_of_2023() -> None:
    """The mean over micro batches of each one's mean, of which every rank sees but a part."""
    compare(2, {"context": {"ring": 2}}, loss={"reduction": "micro_batch"})
