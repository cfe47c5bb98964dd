"""float16 with its loss scaler, and bfloat16, on every axis: as one rank but for the order of sums, and an overflow
is skipped once, by all ranks."""

from functools import cache
from typing import Any

import pytest

from internlm.config.schema import Config
from tests.parallel.layouts import FOUR, MOE, Layout, context, experts, pipeline, tensor, zero
from tests.parallel.oracle import build_trainer, make_config, num_rows
from tests.pool import run_ranks

STEPS = 3
LAYOUTS = {
    "zero2": Layout(2, zero(1, 2, 2)),
    "zero3": Layout(2, zero(2, 2, 2)),
    "mtp": Layout(2, tensor(2)),
    "fsp": Layout(2, tensor(2, "fsp")),
    "ulysses": Layout(2, context(ulysses=2)),
    "ring": Layout(2, context(ring=2)),
    "1f1b": Layout(2, pipeline(2)),
    "zbv": Layout(2, pipeline(2, "zbv"), FOUR),
    "experts": Layout(2, experts(2), MOE),
}
# The first step overflows on any layout; the scale that follows does not.
SCALER = {"fp16": {"initial_scale": 2.0**40}, "backoff_factor": 2.0**-30, "hysteresis": 1}


def trained(rank: int, world_size: int, config: Config, rows: int) -> list[tuple[float, float, bool]]:
    """Loss, gradient norm, and whether the update was made, of each step; then the validation loss."""
    trainer = build_trainer(rank, world_size, config, range(STEPS), rows)
    biases = trainer.optimizer.buffers.values()  # of routers, zero until an update
    steps = []
    for report in trainer.steps():
        assert steps or all(bool(bias.any()) == report.updated for bias in biases)
        steps.append((report.loss, report.grad_norm, report.updated))
    (validation,) = trainer.validate()
    return [*steps, (validation.loss, trainer.state.inf_nan_skip_batches, True)]


@cache
def alone(config_json: str, rows: int) -> list[tuple[float, float, bool]]:
    return run_ranks(1, trained, Config.model_validate_json(config_json), rows)[0]


@pytest.mark.parametrize("dtype", ["torch.float16", "torch.bfloat16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_trains_as_one_rank(name: str, dtype: str) -> None:
    layout = LAYOUTS[name]
    sections: dict[str, Any] = {**layout.sections, "grad_scaler": SCALER}
    sections["model"] = {**sections.get("model", {}), "dtype": dtype}
    config = make_config(layout.parallel, **sections)
    rows = num_rows(config, layout.ranks)
    expected = alone(make_config(None, **sections).model_dump_json(), rows)
    overflows = dtype == "torch.float16"
    assert [updated for _, _, updated in expected] == [not overflows, True, True, True]
    for found in run_ranks(layout.ranks, trained, config, rows):
        for (loss, norm, updated), (wanted_loss, wanted_norm, wanted_updated) in zip(found, expected, strict=True):
            assert updated == wanted_updated
            assert loss == pytest.approx(wanted_loss, rel=3e-3)
            assert not updated or norm == pytest.approx(wanted_norm, rel=3e-2)
        assert found[-1][1] == overflows  # batches skipped
