"""1,024 ranks, of which this process pretends each in turn: meshes, cuts, units and schedules that fit together.

Ranks that stand at the same place of the model (stage, tensor part, experts) hold the same units, so these are built
once for each such place; where every single rank stands, and what it updates, comes from the arithmetic of the mesh,
which test_mesh.py holds against the groups that torch makes.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest

from internlm.config.checks import find_problems
from internlm.config.loader import load_config
from internlm.config.schema import Config
from internlm.core.launch import simulated_world
from internlm.core.mesh import ZERO_AXES, Axes, axes_of_world, build_mesh, coordinates_of
from internlm.core.placement import Box, box_shape
from internlm.model.transformer import build_model
from internlm.parallel.pipeline_layout import pipeline_layout
from internlm.solver.buckets import UnitLayout
from internlm.solver.unit import owned_interval
from internlm.train.dry_run import report
from internlm.train.memory import layouts_of
from tests.parallel.test_timetable import check_complete, check_transfers

RANKS = 1024
CONFIGS = Path(__file__).parents[2] / "configs"
CASES: dict[str, tuple[str, list[str]]] = {
    "7B": ("7B_sft.py", ["parallel.zero1.size=8"]),
    "7B isp": ("7B_isp_256k.py", []),
    "70B": ("70B_llama2.py", []),
    "MoE": ("30B_qwen3_moe.py", []),
}


def config_of(case: str, more: Sequence[str] = ()) -> Config:
    file, overrides = CASES[case]
    no_data = ["data.type=synthetic", "data.train_folder=None", "data.valid_folder=None"]
    return load_config(CONFIGS / file, [*no_data, *overrides, *more])


def places(config: Config) -> dict[tuple[int, int, int], int]:
    """Some rank at every place of the model: (stage, tensor part, experts' part) -> rank."""
    model, _, expert = axes_of_world(config.parallel, RANKS)
    found: dict[tuple[int, int, int], int] = {}
    for rank in range(RANKS):
        here = coordinates_of(rank, model)
        found.setdefault((here["pipeline"], here["tensor"], coordinates_of(rank, expert)["expert"]), rank)
    return found


def built(config: Config, rank: int) -> list[UnitLayout]:
    with simulated_world(rank, RANKS) as world:
        return layouts_of(config, build_mesh(config.parallel, world))


@pytest.fixture(scope="module", params=CASES)
def plan(request: pytest.FixtureRequest) -> tuple[Config, dict[tuple[int, int, int], list[UnitLayout]]]:
    config = config_of(request.param)
    assert find_problems(config, RANKS) == []
    return config, {place: built(config, rank) for place, rank in places(config).items()}


def test_every_element_of_a_unit_is_updated_once_per_replica(plan: Any) -> None:
    """Over all ranks, the owned intervals of a unit are equal parts of its line, each in every replica."""
    config, by_place = plan
    model, dense, expert = axes_of_world(config.parallel, RANKS)
    owners: dict[tuple[Any, ...], Counter[tuple[int, int]]] = defaultdict(Counter)
    for rank in range(RANKS):
        at = coordinates_of(rank, model)
        at_expert = coordinates_of(rank, expert)
        for layout in by_place[at["pipeline"], at["tensor"], at_expert["expert"]]:
            sizes = expert if layout.kind == "expert" else dense
            axes = Axes(sizes, coordinates_of(rank, sizes), {})
            part = at_expert["expert"] if layout.kind == "expert" else at["tensor"]
            owners[at["pipeline"], layout.name, part][owned_interval(layout.size, axes)] += 1
            if rank < 8:  # the line holds its slots one after the other
                ends = [0, *(slot.stop for slot in layout.slots)]
                assert all(slot.start >= end for slot, end in zip(layout.slots, ends, strict=False))
                assert layout.slots[-1].stop <= layout.size
    for (stage, name, part), intervals in owners.items():
        layout = next(
            one for place, units in by_place.items() for one in units if one.name == name and place[0] == stage
        )
        sizes = expert if layout.kind == "expert" else dense
        shards = prod(sizes[axis] for axis in ZERO_AXES[1:])
        assert sorted(intervals) == [
            (i * layout.size // shards, (i + 1) * layout.size // shards) for i in range(shards)
        ]
        assert set(intervals.values()) == {sizes["replica"]}, (stage, name, part)


def test_the_parts_of_every_parameter_make_it_whole(plan: Any) -> None:
    """Boxes of all places: each parameter is either cut into disjoint boxes that fill it, or whole wherever it is."""
    config, by_place = plan
    boxes: dict[str, set[Box]] = defaultdict(set)
    shapes: dict[str, tuple[int, ...]] = {}
    for units in by_place.values():
        for slot in (slot for unit in units for slot in unit.slots):
            boxes[slot.name].add(slot.placement.box)
            shapes[slot.name] = slot.placement.shape
            assert box_shape(slot.placement.box) == slot.shape
    expected = {name: tuple(parameter.shape) for name, parameter in build_model(config).named_parameters()}
    assert shapes == expected
    for name, parts in boxes.items():
        assert sum(prod(box_shape(box)) for box in parts) == prod(shapes[name]), name
        for a, b in product(parts, parts):
            apart = any(x[1] <= y[0] or y[1] <= x[0] for x, y in zip(a, b, strict=True))
            assert a == b or apart, name


def test_memory_is_told(plan: Any) -> None:
    config, _ = plan
    text = report(config, RANKS)
    assert "memory per rank on 1024 ranks" in text
    print(text)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv", "dualpipev"])
def test_lists_of_actions(schedule: str) -> None:
    """The 70B on 16 stages of 8 tensor ranks, 8 replicas: what every stage does, in which order, and what it sends."""
    overrides = [f"model.num_chunks={5 if schedule == 'interleaved' else 1}", "data.micro_num=64"]
    overrides += ["parallel.pipeline.size=16", f"parallel.pipeline.schedule={schedule}", "parallel.zero1.size=8"]
    config = config_of("70B", overrides)
    assert find_problems(config, RANKS) == []
    layout = pipeline_layout(config)
    assert [layer for chunk in layout.layers for layer in chunk] == list(range(80))
    assert sorted(chunk for stage in range(16) for chunk in layout.chunks_of(stage)) == list(range(layout.num_chunks))
    check_complete(layout, 64)
    check_transfers(layout, 64)
