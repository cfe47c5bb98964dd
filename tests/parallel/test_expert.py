"""Experts on several ranks train as on one: any mesh, dropless and with a capacity, with every kind of balancing."""

from typing import Any

import pytest
import torch

from internlm.config.checks import ConfigError
from internlm.config.loader import load_config
from internlm.config.schema import Config
from internlm.core.launch import simulated_world
from internlm.core.mesh import build_mesh
from internlm.model.moe import Router
from internlm.model.transformer import build_model
from internlm.parallel.parallelize import parallelize
from tests.config.told import Told, assert_told
from tests.parallel.oracle import build_trainer, compare, make_config
from tests.pool import run_ranks

EXPERTS: dict[str, Any] = {"num_experts": 8, "num_layers": 2}
DROPLESS = {**EXPERTS, "moe": {"top_k": 2}}
CAPACITY = {**EXPERTS, "moe": {"top_k": 2, "capacity_factor": 0.75, "min_capacity": 1, "balance_over": "first"}}
SHARED = {
    **EXPERTS,
    "moe": {"top_k": 3, "score": "sigmoid", "num_shared_experts": 1, "mix_shared": True, "intermediate_size": 24},
}
BIASED = {**EXPERTS, "moe": {"top_k": 2, "bias_rate": 0.01}}
ALL = {**EXPERTS, "moe": {**CAPACITY["moe"], **SHARED["moe"], **BIASED["moe"]}}
OPTIONS = {"dropless": DROPLESS, "all": ALL}
LOSSES = {"moe_loss_coeff": 0.1, "moe_z_loss_coeff": 0.01}


def agree(ranks: int, parallel: dict[str, Any], model: dict[str, Any], **sections: Any) -> None:
    compare(ranks, parallel, model=model, loss=LOSSES, **sections)


@pytest.mark.parametrize("model", [CAPACITY, SHARED], ids=["capacity", "shared"])
def test_two_ranks(model: dict[str, Any]) -> None:
    agree(2, {"expert": {"size": 2}}, model)


@pytest.mark.parametrize(
    ("ranks", "parallel", "model"),
    [
        (2, {}, "all"),
        (4, {"expert": {"size": 4}}, "all"),
        (4, {"expert": {"size": 4}, "tensor": {"size": 2, "mode": "mtp"}}, "all"),
        (4, {"expert": {"size": 2}, "tensor": {"size": 2, "mode": "msp"}}, "all"),
        (4, {"expert": {"size": 4}, "context": {"ring": 2}}, "all"),
        (4, {"expert": {"size": 4}, "context": {"ulysses": 2}}, "all"),
        (4, {"expert": {"size": 2}, "pipeline": {"size": 2}}, "all"),
        (4, {"expert": {"size": 2}, "pipeline": {"size": 2, "schedule": "zbv"}}, "all"),
        (2, {"pipeline": {"size": 2, "schedule": "dualpipev"}}, "dropless"),
        (4, {"expert": {"size": 2}, "context": {"ulysses": 2}, "tensor": {"size": 2, "mode": "mtp"}}, "all"),
    ],
    ids=str,
)
def test_beside_other_axes(ranks: int, parallel: dict[str, Any], model: str) -> None:
    """Mostly with all options of the router at once."""
    agree(ranks, parallel, {**OPTIONS[model], "num_layers": 4 if "pipeline" in parallel else 2})


@pytest.mark.parametrize(
    "zero",
    [
        {"zero1": {"size": 1}},
        {"zero1": {"size": 4}, "gradient": {"size": 2}},
        {"weight": {"size": 2}, "gradient": {"size": 2}, "zero1": {"size": 4}},
    ],
    ids=str,
)
def test_hybrid_zero_shares_experts_over_their_own_replicas(zero: dict[str, Any]) -> None:
    agree(4, {"expert": {"size": 2}, **zero}, BIASED)


@pytest.mark.parametrize("kind", [True, "selective", "feed_forward"])
def test_recomputed_blocks_choose_the_same_experts(kind: Any) -> None:
    agree(2, {"expert": {"size": 2}}, {**ALL, "checkpoint": kind})


def test_beside_adapters_all_else_is_frozen() -> None:
    """Experts and biases too; and a router that no trained weight comes before is in the log on every layout."""
    lora = {"rank": 4, "target": ("layers.1.attention.w*",)}
    agree(2, {"pipeline": {"size": 2}}, {**ALL, "num_layers": 4}, lora=lora)
    config = make_config({"expert": {"size": 2}}, model=ALL, lora=lora)
    with simulated_world(1, 2) as world:
        model = build_model(config)
        parallelize(model, config, build_mesh(config.parallel, world))
    router = Router(config.model, torch.float32).requires_grad_(False)
    router.move_bias(torch.tensor([8.0] + [0.0] * 7), torch.tensor(True))
    assert router.bias is not None and not router.bias.any()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"layers.1.attention.{part}.lora_{letter}" for part in ("wqkv", "wo") for letter in "ab"]


def routed(rank: int, world_size: int, config: Config) -> tuple[list[int], list[int]]:
    """Bytes of expert parameters and of others that this rank keeps."""
    engine = build_trainer(rank, world_size, config, range(0)).optimizer
    of_experts = [unit for unit in engine.units if unit.layout.kind == "expert"]
    others = [unit for unit in engine.units if unit.layout.kind != "expert"]
    return [unit.shard.numel() for unit in of_experts], [unit.owned.numel() for unit in others]


def test_experts_are_dealt_out_and_cut_by_their_own_chain() -> None:
    """8 experts on 2 expert ranks, of which two pairs share: 4 a rank, cut in halves by weight.size=4 as gcd(4, 2)."""
    weights = 8 * 3 * 32 * 48
    sizes = {"expert": {"size": 2}, "weight": {"size": 4}, "gradient": {"size": 4}, "zero1": {"size": 4}}
    for experts, _ in run_ranks(4, routed, make_config(sizes, model=DROPLESS)):
        assert experts == [weights // 2 // 2] * 2


@pytest.mark.parametrize(
    ("overrides", "ranks", "told"),
    [
        (
            ["parallel.expert.size=3"],
            6,
            ("model.num_experts = 8", "parallel.expert.size = 3 (8 = 2 * 3 + 2)", "to one of 1, 2, 4, 8"),
        ),
        (
            ["parallel.expert.size=4"],
            6,
            ("parallel.expert.size = 4", "(6 / pipeline 1) = 6 is not divisible", "Set it to one of 1, 2"),
        ),
        (["parallel.expert.size=0"], 2, ("parallel.expert.size", "= 0", "expected a number of ranks, 1 or more")),
        (
            ["parallel.expert.size=2", "model.num_experts=1"],
            2,
            ("parallel.expert.size = 2", "model.num_experts = 1 has none", "set it to 1"),
        ),
        (
            ["model.moe.top_k=9"],
            1,
            ("model.moe.top_k = 9", "model.num_experts = 8", "set model.moe.top_k to 8 or less"),
        ),
        (["model.moe.mix_shared=True"], 1, ("model.moe.mix_shared", "num_shared_experts = 0", "set it to 1")),
        (
            ["parallel.tensor.size=2", "data.seq_len=31"],
            2,
            ("parallel.tensor.size = 2", "tokens of a row on one rank = 31", "Set data.seq_len to 32"),
        ),
        (
            ["parallel.tensor.size=4", "model.moe.num_shared_experts=1", "model.moe.intermediate_size=6"],
            4,
            ("parallel.tensor.size = 4", "width of shared experts = 6 is not divisible", "to one of 1, 2, 3, 6"),
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers(overrides: list[str], ranks: int, told: Told) -> None:
    sections = make_config(model=DROPLESS).model_dump()
    with pytest.raises(ConfigError) as caught:
        load_config(sections, overrides, world_size=ranks)
    assert_told(caught.value.problems, told)
