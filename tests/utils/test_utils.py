"""Logger, device facts and timers."""

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from internlm.utils.device import _data_sheet_peak, _measure_peak, peak_flops, torch_dtype
from internlm.utils.errors import UserError, exit_code
from internlm.utils.logger import common_warning, get_logger, log_once, setup_logging
from internlm.utils.timers import DeviceTimer, Timer


def test_rank_zero_writes_info_with_its_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0, 4, tmp_path / "run" / "train.log")
    get_logger("internlm.data").info("hello")
    out = capsys.readouterr().out
    assert "[rank 0/4] INFO hello" in out
    assert (tmp_path / "run" / "train.log").read_text() == out


def test_other_ranks_write_warnings_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(3, 4, tmp_path / "train.log")
    logger = get_logger("data")
    logger.info("hidden")
    common_warning(logger, "the same everywhere")
    assert capsys.readouterr().out == "" and not (tmp_path / "train.log").exists()
    logger.warning("mine")
    assert "[rank 3/4] WARNING mine" in capsys.readouterr().out


def test_a_common_warning_is_written_by_rank_zero(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0, 4)
    common_warning(get_logger("data"), "the same everywhere")
    assert "WARNING the same everywhere" in capsys.readouterr().out


def test_setting_up_twice_does_not_double_lines(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0, 1)
    setup_logging(0, 1)
    get_logger("x").info("once please")
    assert capsys.readouterr().out.count("once please") == 1


def test_file_only_lines_stay_off_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0, 1, tmp_path / "train.log")
    get_logger("x").info("step=1", extra={"file_only": True})
    assert capsys.readouterr().out == "" and "step=1" in (tmp_path / "train.log").read_text()


def test_log_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0, 1)
    logger = get_logger("once")
    for _ in range(3):
        log_once(logger, "a message of test_log_once")
    log_once(logger, "a message of test_log_once", logging.WARNING)
    assert capsys.readouterr().out.count("a message of test_log_once") == 2


def test_dtypes_by_name() -> None:
    assert torch_dtype("torch.bfloat16") is torch.bfloat16
    assert torch_dtype("torch.tf32") is torch.float32
    with pytest.raises(UserError, match=r"torch\.int8"):
        torch_dtype("torch.int8")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("Some New Thing 9000", None),
    ],
)
def test_data_sheet_peaks(name: str, peak: float | None) -> None:
    assert _data_sheet_peak(name) == peak


def test_cpu_peak_is_measured_once_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0, 1)
    peak_flops.cache_clear()
    cpu = torch.device("cpu")
    first = peak_flops(cpu, torch.float32)
    assert 1e6 < first < 1e15
    assert peak_flops(cpu, torch.float32) == first
    assert capsys.readouterr().out.count("by a matrix product") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_measuring_the_peak_takes_no_time_to_speak_of(dtype: torch.dtype) -> None:
    start = time.process_time()
    assert _measure_peak(torch.device("cpu"), dtype) > 1e6
    assert time.process_time() - start < 2  # CPU seconds; without 16-bit units, one product of size 1024 takes 2


def test_cpu_memory_is_a_peak_in_bytes() -> None:
    """In a process of its own, which gives the block back before it asks."""
    script = (
        "import torch; from internlm.utils.device import peak_memory;"
        "block = torch.ones(1 << 30, dtype=torch.uint8); del block; print(peak_memory(torch.device('cpu')))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 1 << 30 < int(result.stdout) < 4 << 30


def test_timers_measure_seconds() -> None:
    start = time.perf_counter()
    with Timer() as timer:
        time.sleep(0.02)
    most = time.perf_counter() - start
    stopped = timer.seconds
    time.sleep(0.01)
    assert 0.02 <= stopped == timer.seconds <= most
    start = time.perf_counter()
    running = Timer()
    time.sleep(0.02)
    lap = running.lap()
    assert lap >= 0.02 and lap + running.seconds <= time.perf_counter() - start
    device_timer, start = DeviceTimer(torch.device("cpu")), time.perf_counter()
    device_timer.start()
    time.sleep(0.02)
    device_timer.stop()
    assert 0.02 <= device_timer.seconds <= time.perf_counter() - start


def test_an_interrupted_tool_has_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert exit_code(interrupted) == 130 and capsys.readouterr().err == "interrupted\n"
