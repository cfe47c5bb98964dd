"""The engine against torch's AdamW in one process, for every way to cut; and what it promises besides."""

import threading
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.core.launch import World
from internlm.core.mesh import build_mesh
from internlm.solver import grad_norm
from tests.pool import run_ranks
from tests.solver.tiny import (
    BETA2,
    CPU,
    LR,
    Chain,
    Run,
    batch_of,
    build_engine,
    difference,
    divisor_chains,
    global_rows,
    make_config,
    train_engine,
    train_on,
    train_reference,
    train_step,
)

CLIP = 0.1  # below the norm of every step, so that clipping always acts
BF16: dict[str, Any] = {"model": {"dtype": "torch.bfloat16"}}
FP16: dict[str, Any] = {
    "model": {"dtype": "torch.float16"},
    "hybrid_zero_optimizer": {"master": "fp32"},
    "grad_scaler": {"hysteresis": 1, "fp16": {"initial_scale": 2.0**14}},
}


def cases(rank: int, world_size: int, chain: Chain, references: dict[float, Run]) -> dict[Any, dict[str, float]]:
    """Differences to the references, for accumulation 1 and 3, with clipping and without."""
    mesh = build_mesh(make_config(chain).parallel, World(rank, rank, world_size, CPU))
    return {
        (accumulation, clip): difference(train_on(mesh, make_config(chain, clip), accumulation), run)
        for accumulation in (1, 3)
        for clip, run in references.items()
    }


@cache
def references() -> dict[float, Run]:
    runs = {clip: train_reference(make_config(clip=clip)) for clip in (0.0, CLIP)}
    assert min(runs[CLIP].norms) > CLIP
    return runs


@pytest.mark.parametrize(
    ("world_size", "chain"), [(ranks, chain) for ranks in (1, 2, 4, 8) for chain in divisor_chains(ranks)]
)
def test_every_divisor_chain_trains_as_one_process_does(world_size: int, chain: Chain) -> None:
    for found in run_ranks(world_size, cases, chain, references()):
        assert len(found) == 4
        for case, differences in found.items():
            assert max(differences.values()) < 1e-6, (case, differences)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_two_ranks_agree_bit_for_bit_however_the_states_are_cut(accumulation: int) -> None:
    """The sum of two numbers doesn't depend on who adds, and the norm is summed in fp64: nothing is left to differ.

    Over several micro batches, sums come in another order where gradients are reduced each time.
    """
    chains = [chain for chain in divisor_chains(2) if accumulation == 1 or chain[1] == 1]
    first, *others = (run_ranks(2, train_engine, make_config(chain, CLIP), accumulation)[0] for chain in chains)
    assert others
    for other in others:
        assert difference(first, other) == {"loss": 0.0, "norm": 0.0, "parameters": 0.0}


@pytest.mark.parametrize("size", [0, 5, 4096, 4097, 100_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_squares_added_by_rows(size: int, dtype: torch.dtype) -> None:
    values = (torch.randn(size, generator=torch.Generator().manual_seed(size)) * 3).to(dtype)
    found = grad_norm._sum_by_rows(values)  # what GPUs do
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(float(values.double().square().sum()), rel=5e-6)


@pytest.mark.parametrize("option", ["tied", "fp32_norm", "grad_fp32", "no_overlap_reduce", "no_overlap_gather"])
def test_options_train_as_one_process_does(option: str) -> None:
    sections: dict[str, Any] = {
        "tied": {"model": {"tie_word_embeddings": True}},
        "fp32_norm": {"use_fp32_norm": True},
        "grad_fp32": {"hybrid_zero_optimizer": {"grad_dtype": "torch.float32"}},
        "no_overlap_reduce": {"hybrid_zero_optimizer": {"overlap_sync_grad": False}},
        "no_overlap_gather": {"hybrid_zero_optimizer": {"overlap_sync_param": False}},
    }[option]
    reference = train_reference(make_config(clip=CLIP, **sections))
    for chain in [(1, 1, 2), (2, 2, 4)]:
        run = run_ranks(4, train_engine, make_config(chain, CLIP, **sections), 3)[3]
        assert max(difference(run, reference).values()) < 1e-6


def test_no_decay_parts_the_parameters() -> None:
    sections = {"adam": {"no_decay": ("*norm.weight",), "weight_decay": 50.0}}
    run = run_ranks(2, train_engine, make_config((1, 1, 2), **sections), 1)[0]
    assert float((run.parameters["head.norm.weight"] - 1).abs().max()) < 0.01  # lr * decay would be 5 % a step
    assert float(run.parameters["head.weight"].norm()) < float(
        train_reference(make_config()).parameters["head.weight"].norm()
    )


@pytest.mark.parametrize("chain", divisor_chains(2))
def test_split_master_trains_like_an_fp32_copy(chain: Chain) -> None:
    def run(master: str) -> Run:
        config = make_config(chain, CLIP, **BF16, hybrid_zero_optimizer={"master": master})
        return run_ranks(2, train_engine, config, 3)[1]

    assert difference(run("split"), run("fp32")) == {"loss": 0.0, "norm": 0.0, "parameters": 0.0}


@pytest.mark.parametrize(
    ("sections", "error"),
    [(BF16, 0.15), (FP16, 0.02), ({**BF16, "hybrid_zero_optimizer": {"moment_dtype": "torch.bfloat16"}}, 0.15)],
    ids=["bf16", "fp16", "bf16 moments"],
)
def test_16_bit_runs_follow_fp32(sections: dict[str, Any], error: float) -> None:
    """Not where the parameters are but how far they have moved is compared: a wrong update can't hide in their size."""
    reference = train_reference(make_config(clip=CLIP))
    start = train_reference(make_config(clip=CLIP), steps=0).parameters
    run = run_ranks(2, train_engine, make_config((1, 2, 2), CLIP, **sections), 3)[0]
    assert max(abs(a - b) for a, b in zip(run.losses, reference.losses, strict=True)) < 3e-4
    moved = torch.cat([(run.parameters[name].float() - start[name]).flatten() for name in start])
    expected = torch.cat([(reference.parameters[name] - start[name]).flatten() for name in start])
    assert float((moved - expected).norm() / expected.norm()) < error


def state_of(model: torch.nn.Module, engine: Any) -> dict[str, Tensor]:
    return {f"{piece.name}/{piece.kind}/{piece.box}": piece.read().clone() for piece in engine.pieces()}


def skip_a_step(rank: int, world_size: int, sections: dict[str, Any], chain: Chain) -> dict[str, Any]:
    mesh = build_mesh(make_config(chain).parallel, World(rank, rank, world_size, CPU))
    model, engine = build_engine(make_config(chain, CLIP, **sections), mesh)
    train_step(model, engine, mesh, 0, 1)
    before, scale = state_of(model, engine), engine.loss_scale
    engine.begin_step(1)
    factor = float("nan") if rank == world_size - 1 else 1.0  # one rank alone sees it
    (model.loss(batch_of(global_rows(1)[rank::world_size])).loss_sum * factor).backward()
    engine.end_backward()
    result = engine.step(LR, BETA2)
    after = state_of(model, engine)
    same = all(torch.equal(after[key], value) for key, value in before.items())
    outcome = {"ok": bool(result.ok), "same": same, "updates": engine.state_dict()["num_updates"]}
    scales = scale, engine.loss_scale
    loss, norm = train_step(model, engine, mesh, 2, 1)
    return {**outcome, "scales": scales, "finite_after": loss == loss and norm == norm}


@pytest.mark.parametrize("chain", divisor_chains(2))
@pytest.mark.parametrize("sections", [{}, BF16, FP16])
def test_a_step_that_is_not_finite_changes_nothing(sections: dict[str, Any], chain: Chain) -> None:
    for found in run_ranks(2, skip_a_step, sections, chain):
        before, after = found.pop("scales")
        assert found == {"ok": False, "same": True, "updates": 1, "finite_after": True}
        assert after == (before / 2 if sections is FP16 else 1.0)


IN_STEP = {"hybrid_zero_optimizer": {"overlap_sync_grad": False, "overlap_sync_param": False}}
NOT_AHEAD = {"weight": {"overlap": False}}


def run_held_back(rank: int, world_size: int, chain: Chain, sections: dict[str, Any], held: str, until: str) -> bool:
    """Holds an event of one unit back, such as a transfer, until another has come, such as one of compute.

    True if it came meanwhile; False if that stood still, waiting for what is held.
    """
    mesh = build_mesh(make_config(chain).parallel, World(rank, rank, world_size, CPU))
    reached, outcomes = threading.Event(), []

    def trace(event: str, unit: str) -> None:
        if f"{event} {unit}" == "backward embedding":  # what counts from here on is the next forward
            reached.clear()
        if f"{event} {unit}" == until:
            reached.set()
        if f"{event} {unit}" == held:
            outcomes.append(reached.wait(0.1 if sections else 60))

    model, engine = build_engine(make_config(chain, **{"model": {"num_layers": 4}, **sections}), mesh, trace)
    for step in range(2):
        train_step(model, engine, mesh, step, 1)
    assert outcomes
    return outcomes[0]


@pytest.mark.parametrize("sections", [{}, IN_STEP], ids=["overlap", "in step"])
@pytest.mark.parametrize("chain", [(1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 2)])
def test_backward_goes_on_while_gradients_travel(chain: Chain, sections: dict[str, Any]) -> None:
    found = run_ranks(2, run_held_back, chain, sections, "reduce.begin head", "backward layers.3")
    assert found == [not sections] * 2


@pytest.mark.parametrize("sections", [{}, IN_STEP], ids=["overlap", "in step"])
def test_forward_begins_while_updates_travel(sections: dict[str, Any]) -> None:
    found = run_ranks(2, run_held_back, (1, 1, 2), sections, "gather.begin head", "forward layers.2")
    assert found == [not sections] * 2


@pytest.mark.parametrize("sections", [{}, IN_STEP], ids=["overlap", "in step"])
@pytest.mark.parametrize("chain", [(2, 2, 2), (2, 2, 4)])
def test_parameters_are_fetched_while_the_unit_before_computes(chain: Chain, sections: dict[str, Any]) -> None:
    found = run_ranks(4, run_held_back, chain, sections, "fetch.begin layers.2", "used layers.1")
    assert found == [not sections] * 4


@pytest.mark.parametrize("sections", [{}, NOT_AHEAD], ids=["ahead", "in turn"])
def test_parameters_are_fetched_ahead_if_asked(sections: dict[str, Any]) -> None:
    found = run_ranks(2, run_held_back, (2, 2, 2), sections, "used layers.1", "fetch.begin layers.2")
    assert found == [not sections] * 2


def test_gradients_of_unused_parameters_are_zero() -> None:
    config = make_config()
    [(first, second)] = run_ranks(1, half_used, config)
    assert first > 0
    assert second == 0


def half_used(rank: int, world_size: int, config: Any) -> tuple[float, float]:
    """Gradient norms of two steps, the second of which uses no parameter."""
    mesh = build_mesh(config.parallel, World(rank, rank, world_size, CPU))
    model, engine = build_engine(config, mesh)
    _, norm = train_step(model, engine, mesh, 0, 1)
    engine.begin_step(1)
    engine.end_backward()
    return norm, float(engine.step(LR, BETA2).grad_norm)


def reload(rank: int, world_size: int, chain: Chain, sections: dict[str, Any], only_params: bool) -> bool:
    """Writes the pieces of one engine into another of other values."""
    mesh = build_mesh(make_config(chain).parallel, World(rank, rank, world_size, CPU))
    config = make_config(chain, CLIP, **sections)
    model, engine = build_engine(config, mesh)
    train_step(model, engine, mesh, 0, 1)
    other_model, other = build_engine(config.model_copy(update={"seed": 7}), mesh)
    for source, target in zip(engine.pieces(), other.pieces(), strict=True):
        if source.kind == "param" or not only_params:
            target.write(source.read())
    other.loaded({"param"} if only_params else {"param", "master", "exp_avg", "exp_avg_sq"})
    other.load_state_dict(engine.state_dict())
    if only_params:
        return all(
            torch.equal(engine.full_parameter(name), other.full_parameter(name)) for name in engine.parameter_names()
        ) and all(
            bool((p.read() == p.read().to(engine.units[0].full.dtype)).all())
            for p in other.pieces()
            if p.kind == "master"
        )
    result = train_step(model, engine, mesh, 1, 1)
    engine.wait()  # what its lane still fetches must not mix with the other engine's transfers in the same groups
    return result == train_step(other_model, other, mesh, 1, 1)


@pytest.mark.parametrize("only_params", [False, True])
@pytest.mark.parametrize("sections", [{}, BF16, {**BF16, "hybrid_zero_optimizer": {"master": "fp32"}}])
def test_pieces_carry_the_whole_state(sections: dict[str, Any], only_params: bool) -> None:
    assert all(run_ranks(4, reload, (2, 2, 2), sections, only_params))
