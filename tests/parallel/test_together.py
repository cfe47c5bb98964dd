"""Three and four axes at once, with every schedule, mode and class of Hybrid ZeRO, train as one rank does."""

from typing import Any

import pytest

from tests.parallel.layouts import DENSE_TOGETHER, MOE_TOGETHER
from tests.parallel.oracle import compare

TOGETHER = {**DENSE_TOGETHER, **MOE_TOGETHER}


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "recomputed"])
def test_eight_ranks(name: str, checkpoint: bool) -> None:
    layout = TOGETHER[name]
    sections: dict[str, Any] = layout.sections
    model = {**sections.get("model", {}), "checkpoint": checkpoint}
    compare(layout.ranks, layout.parallel, **{**sections, "model": model})
