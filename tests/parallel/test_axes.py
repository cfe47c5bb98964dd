"""Every parallel axis, alone on two and four ranks and with every other one, trains as one rank does."""

from itertools import combinations
from math import prod

import pytest

from internlm.config.schema import ParallelConfig
from tests.parallel.layouts import (
    ALONE,
    DENSE_TOGETHER,
    FOUR,
    MOE,
    MOE_TOGETHER,
    PAIRS,
    Layout,
    context,
    experts,
    pipeline,
    tensor,
    zero,
)
from tests.parallel.oracle import compare

LETTERS = {"pipeline": "P", "ring": "R", "ulysses": "U", "tensor": "T"}
MATRIX = {**ALONE, **PAIRS}


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "recomputed"])
def test_trains_as_one_rank(name: str, checkpoint: bool) -> None:
    layout = MATRIX[name]
    model = {**layout.sections.get("model", {}), "checkpoint": checkpoint}
    compare(layout.ranks, layout.parallel, **{**layout.sections, "model": model})


ADAPTED: dict[str, Layout] = {
    "P-R zbv": Layout(4, {**pipeline(2, "zbv"), **context(ring=2)}, FOUR),
    "U-T fsp zero3": Layout(4, {**context(ulysses=2), **tensor(2, "fsp"), **zero(2, 2, 2)}),
    "T-E mtp": Layout(2, {**tensor(2), **experts(2)}, MOE),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_train_as_on_one_rank(name: str) -> None:
    layout = ADAPTED[name]
    compare(layout.ranks, layout.parallel, **layout.sections, lora={"rank": 4, "target": ("*.attention.w*",)})


def axes_of(layout: Layout) -> str:
    """Letters of the axes of more than one rank, in the order of layouts.py."""
    parallel = ParallelConfig.model_validate(layout.parallel)
    sizes = parallel.axis_sizes
    data, experts = layout.ranks > prod(sizes.values()), parallel.expert.size > 1
    wide = {letter for axis, letter in LETTERS.items() if sizes[axis] > 1}
    return "".join(letter for letter in "PDRUTE" if letter in wide or letter == "D" * data or letter == "E" * experts)


def test_the_matrix_is_whole() -> None:
    """Each axis alone on two and four ranks, all pairs, and twelve of three and more on eight."""
    alone = {(axes_of(layout), layout.ranks) for layout in ALONE.values()}
    # an axis of experts lies across the others; alone it has data ranks
    assert alone == {(axes, ranks) for axes in ("P", "D", "R", "U", "T", "DE") for ranks in (2, 4)}
    found = [axes_of(layout) for layout in PAIRS.values()]
    for a, b in combinations("PDRUTE", 2):
        assert any(a in axes and b in axes for axes in found), (a, b)
    together = {**DENSE_TOGETHER, **MOE_TOGETHER}
    assert len(together) >= 12
    for name, layout in {**PAIRS, **together}.items():
        letters = name.split()[0].replace("-", "")
        assert set(letters) <= set(axes_of(layout)), name
    assert all(layout.ranks == 8 and len(axes_of(layout)) > 2 for layout in together.values())
