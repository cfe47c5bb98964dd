"""Where the time of a traced step went: `python benchmarks/trace.py RUN_DIR/traces/rank0.json.gz`.

Kernels are sorted into kinds by their names; idle is the time in which no kernel ran, copies to and from the host left
out, and communication is hidden while another kernel runs.
"""

import gzip
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# The first pattern that a kernel's name matches says its kind.
KINDS = (
    ("host copies", r"Memcpy (HtoD|DtoH)"),
    ("communication", r"nccl|symmetric_memory|Memcpy PtoP"),
    ("attention", r"flash|sdpa|cudnn.*(attn|fprop|bprop)|fmha|attention"),
    ("matrix products", r"gemm|cutlass|nvjet|cublas|xmma|splitK"),
    ("optimizer", r"_adamw|norm_reduce|ReduceNorm|NormTwo|reduce_kernel.*Norm"),
    ("loss", r"_losses_and_gradient|softmax|cunn_SoftMax"),
    ("compiled blocks", r"^triton_"),
    ("copies", r"[Mm]emcpy|[Mm]emset|copy_kernel|copy"),
    ("other elementwise", r"."),
)


Kernel = dict[str, Any]  # with "name", and "ts" and "dur" in microseconds


class Communication(NamedTuple):
    """Milliseconds of a trace: from its first kernel to its last, with communication, with it beside other kernels."""

    span: float
    total: float
    hidden: float


def read_kernels(trace: Path) -> list[Kernel]:
    """The kernels and copies of a chrome trace, packed or not."""
    with (gzip.open if trace.suffix == ".gz" else open)(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


def communication_of(kernels: Sequence[Kernel]) -> Communication:
    """How long communication ran and how much of it is hidden; a wait inside a collective counts as communication."""
    on_device = _without_host_copies(kernels)
    sent = [kernel for kernel in on_device if _kind(kernel["name"]) == "communication"]
    computed = [kernel for kernel in on_device if _kind(kernel["name"]) != "communication"]
    total, both = _covered(sent), _covered(sent) + _covered(computed) - _covered(on_device)
    return Communication(_span(kernels) / 1000, total / 1000, both / 1000)


def kernel_table(trace: Path) -> str:
    """Milliseconds by kind, then the longest kernels."""
    kernels = read_kernels(trace)
    by_kind: dict[str, float] = defaultdict(float)
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        by_kind[_kind(kernel["name"])] += kernel["dur"] / 1000
        by_name[kernel["name"]].append(kernel["dur"] / 1000)
    span = _span(kernels)
    by_kind["idle"] = (span - _covered(_without_host_copies(kernels))) / 1000
    total = span / 1000
    lines = [f"traced {total:.1f} ms"]
    lines += [f"  {ms:9.1f} ms {ms / total:6.1%}  {kind}" for kind, ms in sorted(by_kind.items(), key=lambda x: -x[1])]
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:22]
    lines += [f"  {sum(times):9.1f} ms {len(times):6d} x  {name[:110]}" for name, times in longest]
    return "\n".join(lines)


def _without_host_copies(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Those take none of the device's units of computation."""
    return [kernel for kernel in kernels if _kind(kernel["name"]) != "host copies"]


def _kind(name: str) -> str:
    return next(kind for kind, pattern in KINDS if re.search(pattern, name))


def _span(kernels: Sequence[Kernel]) -> float:
    """Microseconds from the first start to the last end."""
    ends = [kernel["ts"] + kernel["dur"] for kernel in kernels]
    return max(ends) - min(kernel["ts"] for kernel in kernels) if kernels else 0.0


def _covered(kernels: Sequence[Kernel]) -> float:
    """Microseconds in which at least one kernel ran."""
    covered, end = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel["ts"]):
        stop = kernel["ts"] + kernel["dur"]
        covered += max(0.0, stop - max(kernel["ts"], end))
        end = max(end, stop)
    return covered


if __name__ == "__main__":
    print(kernel_table(Path(sys.argv[1])))
