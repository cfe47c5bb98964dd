"""Tensor parallel against one rank, and the cut cross-entropy against torch's."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from internlm.core.launch import World
from internlm.core.mesh import build_mesh
from internlm.model.transformer import build_model
from internlm.ops import cross_entropy as room
from internlm.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from internlm.parallel.tensor import CUTS, cut_tensors
from tests.parallel.oracle import CPU, compare, make_config
from tests.pool import run_ranks

MODES = ("mtp", "msp", "fsp")
QK_NORM = {"model": {"qk_norm": True, "norm_head": True, "qkv_bias": False, "num_kv_attention_heads": 2}}
TIED = {"model": {"tie_word_embeddings": True, "embed_grad_scale": 0.1, "residual_in_fp32": True}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sections", [QK_NORM, TIED], ids=["qk_norm", "tied"])
def test_two_ranks(mode: str, sections: dict[str, Any]) -> None:
    compare(2, {"tensor": {"size": 2, "mode": mode}}, **sections)


@pytest.mark.parametrize(("mode", "kind"), [("mtp", "feed_forward"), ("msp", True), ("fsp", "selective")])
def test_four_ranks_with_recomputed_blocks(mode: str, kind: Any) -> None:
    compare(4, {"tensor": {"size": 4, "mode": mode}}, model={"checkpoint": kind})


@pytest.mark.parametrize("mode", MODES)
def test_beside_sharded_data_ranks(mode: str) -> None:
    compare(4, {"tensor": {"size": 2, "mode": mode}, "weight": {"size": 2}, "zero1": {"size": 2}})


def losses_of_rank(rank: int, world_size: int, smoothing: float) -> dict[str, torch.Tensor]:
    """The cut cross-entropy on chunks of 5 rows, and torch's on the whole."""
    room.CHUNK_ELEMENTS["cpu"] = 5 * 24
    mesh = build_mesh(make_config({"tensor": {"size": world_size}}).parallel, World(rank, rank, world_size, CPU))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(17, 8, generator=generator)
    weight = torch.randn(24 * world_size, 8, generator=generator)
    labels = torch.randint(len(weight), (17,), generator=generator)
    labels[::5] = IGNORE_INDEX
    best = (hidden @ weight.T).argmax(-1)
    labels[1] = best[1]
    part = weight[rank * 24 : (rank + 1) * 24].clone().requires_grad_()
    own = hidden.clone().requires_grad_()
    out = linear_cross_entropy(own, part, labels, smoothing, group=mesh.group("tensor"))
    (out.loss_sum * 0.5).backward()
    hidden.requires_grad_(), weight.requires_grad_()
    whole = F.cross_entropy(
        hidden @ weight.T, labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing
    )
    (whole * 0.5).backward()
    assert own.grad is not None and part.grad is not None and hidden.grad is not None and weight.grad is not None
    torch.testing.assert_close(out.loss_sum, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(part.grad, weight.grad[rank * 24 : (rank + 1) * 24], rtol=1e-5, atol=1e-6)
    assert torch.equal(out.correct, best == labels) and out.correct.any()
    return {"part": own.grad, "whole": hidden.grad}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cut_cross_entropy_equals_torch(smoothing: float) -> None:
    results = run_ranks(4, losses_of_rank, smoothing)
    total = sum(result["part"] for result in results)
    torch.testing.assert_close(total, results[0]["whole"], rtol=1e-5, atol=1e-6)


def placements_of_rank(rank: int, world_size: int) -> dict[str, Any]:
    config = make_config({"tensor": {"size": world_size}}, model={"qk_norm": True, "qkv_bias": True})
    mesh = build_mesh(config.parallel, World(rank, rank, world_size, CPU))
    return cut_tensors(build_model(config), config, mesh)


def test_every_element_lies_on_one_rank() -> None:
    """Each cut parameter's boxes fill the global tensor; all others are known to be copies."""
    ranks = run_ranks(4, placements_of_rank)
    config = make_config(None, model={"qk_norm": True, "qkv_bias": True})
    for name, parameter in build_model(config).named_parameters():
        filled = torch.zeros(parameter.shape)
        for placements in ranks:
            filled[tuple(slice(*interval) for interval in placements[name].box)] += 1
        copies = 4 if ranks[0][name].axis is None else 1
        assert bool((filled == copies).all()), name
    assert sum(p.axis == "tensor" for p in ranks[0].values()) > len(CUTS)
