"""Where the time of a traced step went: `python benchmarks/trace.py RUN_DIR/traces/rank0.json.gz`.

Kernels are sorted into kinds by their names; idle is the time in which no kernel ran.
"""

import gzip
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

# The first pattern that a kernel's name matches says its kind.
KINDS = (
    ("communication", r"nccl"),
    ("attention", r"flash|sdpa|cudnn.*(attn|fprop|bprop)|fmha|attention"),
    ("matrix products", r"gemm|cutlass|nvjet|cublas|xmma|splitK"),
    ("optimizer", r"_adamw|norm_reduce|ReduceNorm|NormTwo|reduce_kernel.*Norm"),
    ("loss", r"_losses_and_gradient|softmax|cunn_SoftMax"),
    ("compiled blocks", r"^triton_"),
    ("copies", r"[Mm]emcpy|[Mm]emset|copy_kernel|copy"),
    ("other elementwise", r"."),
)


def kernel_table(trace: Path) -> str:
    """Milliseconds by kind, then the twelve longest kernels."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    by_kind: dict[str, float] = defaultdict(float)
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        by_kind[_kind(kernel["name"])] += kernel["dur"] / 1000
        by_name[kernel["name"]].append(kernel["dur"] / 1000)
    start = min(kernel["ts"] for kernel in kernels)
    span = max(kernel["ts"] + kernel["dur"] for kernel in kernels) - start
    by_kind["idle"] = (span - _covered(kernels)) / 1000
    total = span / 1000
    lines = [f"traced {total:.1f} ms"]
    lines += [f"  {ms:9.1f} ms {ms / total:6.1%}  {kind}" for kind, ms in sorted(by_kind.items(), key=lambda x: -x[1])]
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:22]
    lines += [f"  {sum(times):9.1f} ms {len(times):6d} x  {name[:110]}" for name, times in longest]
    return "\n".join(lines)


def _kind(name: str) -> str:
    return next(kind for kind, pattern in KINDS if re.search(pattern, name))


def _covered(kernels: list[dict[str, Any]]) -> float:
    """Microseconds in which at least one kernel ran."""
    covered, end = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel["ts"]):
        stop = kernel["ts"] + kernel["dur"]
        covered += max(0.0, stop - max(kernel["ts"], end))
        end = max(end, stop)
    return covered


if __name__ == "__main__":
    print(kernel_table(Path(sys.argv[1])))
