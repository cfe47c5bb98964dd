"""Every parallel axis, alone and together, trains as one rank does."""

from typing import Any

import pytest

from tests.parallel.oracle import compare

ZERO: list[tuple[int, dict[str, Any]]] = [
    (2, {"zero1": {"size": 1}}),
    (4, {"zero1": {"size": 4}, "gradient": {"size": 2}}),
    (2, {"weight": {"size": 2}, "gradient": {"size": 2}, "zero1": {"size": 2}}),
]


@pytest.mark.parametrize(("world_size", "parallel"), ZERO)
def test_data_ranks(world_size: int, parallel: dict[str, Any]) -> None:
    compare(world_size, parallel)
