"""Every parallel axis, alone and together, trains as one rank does."""

from typing import Any

import pytest

from tests.parallel.oracle import compare

ZERO: list[dict[str, Any]] = [
    {"zero1": {"size": 1}},
    {"zero1": {"size": 2}, "gradient": {"size": 2}},
    {"weight": {"size": 2}, "gradient": {"size": 2}, "zero1": {"size": 2}},
]


@pytest.mark.parametrize("parallel", ZERO)
def test_data_ranks(parallel: dict[str, Any]) -> None:
    compare(2, parallel)
