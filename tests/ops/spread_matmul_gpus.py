"""Run by torchrun on the GPUs of one node: products by symmetric memory against a collective beside a GEMM, and timed.

torchrun --nproc_per_node=2 -m tests.ops.spread_matmul_gpus
"""

import torch
import torch.distributed as dist

from internlm.core.collectives import all_gather, reduce_scatter
from internlm.core.launch import launch
from internlm.ops import spread_matmul
from internlm.ops.spread_matmul import gather_matmul, matmul_scatter

TOKENS, SHAPES = 8192, {"wqkv": (4096, 12288), "w13": (4096, 21888), "w2": (10944, 4096)}  # of InternLM-7B


def milliseconds(work) -> float:  # type: ignore[no-untyped-def]
    for _ in range(3):
        work()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 10


def main() -> None:
    with launch() as world:
        group = dist.new_group()
        spread_matmul.WORTHWHILE = 0  # these are below it: plain would be compared with plain
        assert spread_matmul._has_peers(group)
        torch.manual_seed(world.rank)
        for name, (inner, outer) in SHAPES.items():
            outer //= world.size if name != "w2" else 1
            b = torch.randn(outer, inner, device="cuda", dtype=torch.bfloat16).T / inner**0.5
            x = torch.randn(TOKENS // (1 if name == "w2" else world.size), inner, device="cuda", dtype=torch.bfloat16)
            if name == "w2":
                fused, plain = lambda: matmul_scatter(x, b, group), lambda: reduce_scatter(x @ b, group).wait()  # noqa: B023
            else:
                fused, plain = lambda: gather_matmul(x, b, group)[1], lambda: all_gather(x, group).wait() @ b  # noqa: B023
            error = float((fused() - plain()).float().norm() / plain().float().norm())
            times = milliseconds(plain), milliseconds(fused)
            if world.rank == 0:
                print(
                    f"{name:5} plain {times[0]:.3f} ms  symmetric memory {times[1]:.3f} ms  error {error:.1e}",
                    flush=True,
                )
            assert error < 1e-2, (name, error)
        dist.barrier()


if __name__ == "__main__":
    main()
