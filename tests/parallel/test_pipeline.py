"""Pipeline parallel: every schedule trains as one rank does."""

from typing import Any

import pytest

from tests.parallel.oracle import compare

SCHEDULES = ["1f1b", "interleaved", "zbv", "dualpipev"]
ZERO2 = {"gradient": {"size": 2}, "zero1": {"size": 2}}
ZERO3 = {"weight": {"size": 2}, **ZERO2}


def check(world_size: int, stages: int, schedule: str, parallel: dict[str, Any], **model: Any) -> None:
    if schedule == "interleaved":
        model["num_chunks"] = 2
    pipeline = {"size": stages, "schedule": schedule, **parallel.pop("pipeline", {})}
    compare(world_size, {"pipeline": pipeline, **parallel}, model=model)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_stages_and_tied_embeddings(schedule: str) -> None:
    check(2, 2, schedule, {}, tie_word_embeddings=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_four_stages_cut_unevenly(schedule: str) -> None:
    check(4, 4, schedule, {}, num_layers=10)


@pytest.mark.parametrize(
    ("schedule", "parallel"),
    [("1f1b", ZERO3), ("interleaved", ZERO2), ("zbv", ZERO3), ("dualpipev", {"zero1": {"size": 1}})],
)
def test_data_ranks_and_recomputation(schedule: str, parallel: dict[str, Any]) -> None:
    check(4, 2, schedule, {**parallel}, num_layers=8, checkpoint=0.5, tie_word_embeddings=True)


@pytest.mark.parametrize(("schedule", "mode"), [("1f1b", "mtp"), ("zbv", "msp"), ("dualpipev", "fsp")])
def test_tensor_ranks(schedule: str, mode: str) -> None:
    check(4, 2, schedule, {"tensor": {"size": 2, "mode": mode}}, tie_word_embeddings=True)
