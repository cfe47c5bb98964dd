"""Device facts: dtypes by name, which device this process computes on, its peak arithmetic, its memory."""

import re
import resource
import sys
import time
from functools import cache

import torch

from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger, log_once

logger = get_logger(__name__)

_DTYPES = {
    "torch.float32": torch.float32,
    "torch.tf32": torch.float32,
    "torch.bfloat16": torch.bfloat16,
    "torch.float16": torch.float16,
}

# Dense 16-bit tensor-core peaks in FLOP/s without sparsity, from the vendors' data sheets. A row applies when all its
# words occur in the device's name; the first such row counts.
_PEAK_16BIT: tuple[tuple[set[str], float], ...] = (
    ({"GB200"}, 2500e12),
    ({"B200"}, 2250e12),
    ({"H100", "PCIE"}, 756e12),
    ({"H100", "NVL"}, 835e12),
    ({"H800", "PCIE"}, 756e12),
    ({"H100"}, 989e12),
    ({"H800"}, 989e12),
    ({"H200"}, 989e12),
    ({"GH200"}, 989e12),
    ({"H20"}, 148e12),
    ({"A100"}, 312e12),
    ({"A800"}, 312e12),
    ({"A30"}, 165e12),
    ({"A40"}, 149.7e12),
    ({"A10"}, 125e12),
    ({"A10G"}, 70e12),
    ({"L40S"}, 362e12),
    ({"L40"}, 181e12),
    ({"L20"}, 119.5e12),
    ({"L4"}, 121e12),
    ({"4090"}, 165.2e12),
    ({"3090"}, 71e12),
)


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that a config calls `name`, such as "torch.bfloat16".

    "torch.tf32" is float32 storage, see `set_matmul_precision`. Raises UserError for other names.
    """
    if name not in _DTYPES:
        raise UserError(f"dtype {name!r} is not known; use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def set_matmul_precision(name: str) -> None:
    """Lets the process's float32 matrix products round their inputs to tf32 for the dtype "torch.tf32" alone.

    Tensor cores multiply such numbers (10 bits of mantissa instead of 23) several times faster. 16-bit products are not
    concerned.
    """
    tf32 = name == "torch.tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if tf32:
        log_once(logger, "float32 matrix products may round their inputs to tf32, as model.dtype asks")


def default_device() -> torch.device:
    """The current GPU of this process, or the CPU when there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def find_device(name: torch.device | str | None) -> torch.device:
    """The device of a name such as "cuda:1", None: `default_device`. Raises UserError where there is no such device."""
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        reason = str(error).partition("\n")[0]
        raise UserError(f"device {str(name)!r} can't be used ({reason}); here are {', '.join(here)}") from error
    return device


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished what was queued; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of torch's allocator on a GPU, of the whole process (resident set) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of `device` in `dtype`: the data sheet's dense figure where known, else measured once and logged."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        known = _data_sheet_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    measured = _measure_peak(device, dtype)
    logger.info(f"peak of {device} in {dtype} is not in the table: {measured / 1e12:.3g} TFLOP/s by a matrix product")
    return measured


def _data_sheet_peak(device_name: str) -> float | None:
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    return next((peak for needed, peak in _PEAK_16BIT if needed <= words), None)


def _measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some square matrix products, which grow until one takes 20 ms.

    No fixed size would do: it would take a CPU without 16-bit arithmetic seconds, or a GPU next to no time.
    """
    best, size = 0.0, 256
    while size <= 8192:
        a = torch.ones(size, size, dtype=dtype, device=device)
        seconds = min(_seconds_of_product(a) for _ in range(3))
        best = max(best, 2 * size**3 / seconds)
        if seconds > 0.02:
            break
        size *= 2
    return best


def _seconds_of_product(a: torch.Tensor) -> float:
    synchronize(a.device)
    start = time.perf_counter()
    a @ a
    synchronize(a.device)
    return time.perf_counter() - start


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU, or of the host, as Python or torch's allocator tells it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
