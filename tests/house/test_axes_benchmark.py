"""What benchmarks/axes.py runs and counts, and benchmarks/numerics.py computes, apart from GPUs."""

import pytest

from benchmarks.axes import ONE, TWO, Case, config_of
from benchmarks.numerics import table
from benchmarks.trace import communication_of


def kernel(name: str, start: float, stop: float) -> dict[str, object]:
    return {"name": name, "ts": start * 1000, "dur": (stop - start) * 1000}


def test_communication_is_hidden_while_another_kernel_runs() -> None:
    send, copy, multiply = "ncclDevKernel_AllReduce", "Memcpy PtoP (Device -> Device)", "nvjet_gemm"
    kernels = [
        kernel(multiply, 0, 10),
        kernel(send, 2, 5),  # hidden
        kernel(copy, 4, 7),  # hidden, and for one millisecond beside the other transfer
        kernel(send, 9, 14),  # for one of five
        kernel("Memcpy DtoH (Device -> Pinned)", 10, 15),  # hides nothing
        kernel(multiply, 15, 16),
    ]
    assert communication_of(kernels) == pytest.approx((16, 10, 6))
    assert communication_of(kernels[:1]) == pytest.approx((10, 0, 0))


@pytest.mark.parametrize("case", [*ONE, *TWO], ids=lambda case: case.key)
@pytest.mark.parametrize("tiny", [True, False], ids=["tiny", ""])
def test_layouts_are_possible_and_train_on_the_same_rows(case: Case, tiny: bool) -> None:
    num_gpus = 1 if case in ONE else 2
    config, alone = config_of(case, num_gpus, tiny), config_of(Case(case.model, "one GPU"), 1, tiny)
    readers = num_gpus
    for size in config.parallel.axis_sizes.values():
        readers //= size
    assert config.data.micro_num * readers == alone.data.micro_num
    assert config.data.seq_len == alone.data.seq_len and config.data.micro_bsz == alone.data.micro_bsz


def test_differences_are_taken_seed_by_seed() -> None:
    """Seeds that differ by a factor of two, formats by one percent: 1 and 3 % have a mean of 2 and an error of 1."""
    rows = table({"a": [2.0, 4.0], "b": [2.02, 4.12], "c": [2.0, 4.0]}).splitlines()
    assert rows[2:4] == ["| a | 3.0000 | +0.00 % | 0.00 % |", "| b | 3.0700 | +2.00 % | 1.00 % |"]
    assert rows[5].endswith("pooled over the rows: 0.71 %")  # of 1 and 0
