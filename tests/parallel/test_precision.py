"""Which float32 products a run allows."""

from collections.abc import Iterator

import pytest
import torch

from internlm.core.launch import World
from internlm.core.mesh import build_mesh
from internlm.model.transformer import build_model
from internlm.parallel.parallelize import parallelize
from internlm.utils.device import set_matmul_precision
from tests.checkpoint.fake import world_of_one
from tests.solver.tiny import CPU, make_config


@pytest.fixture(autouse=True)
def precision_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("dtype", "precision"), [("torch.tf32", "high"), ("torch.float32", "highest"), ("torch.bfloat16", "highest")]
)
def test_tf32_is_allowed_where_the_config_asks(dtype: str, precision: str) -> None:
    torch.set_float32_matmul_precision("medium")
    config = make_config(model={"dtype": dtype})
    with world_of_one():
        parallelize(build_model(config), config, build_mesh(config.parallel, World(0, 0, 1, CPU)))
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.gpu
def test_tf32_rounds_what_float32_keeps() -> None:
    one_and_a_bit = torch.full((64, 64), 1 + 2.0**-16, device="cuda")
    eye = torch.eye(64, device="cuda")
    for dtype, kept in (("torch.float32", True), ("torch.tf32", False)):
        set_matmul_precision(dtype)
        assert torch.equal(one_and_a_bit @ eye, one_and_a_bit) is kept
