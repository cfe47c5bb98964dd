"""Single operations against what the chip allows: `python benchmarks/kernels.py`, on a GPU.

Ceilings are measured first: a large copy (bytes read and written) and the matrix products of a 7B block. Each line then
says how long an operation takes, what it achieves, and the share of its ceiling. Data are random.
"""

import statistics
from collections.abc import Callable

import numpy as np
import torch

from internlm.ops import attention_flash
from internlm.ops.adamw import adam_scalars, adamw_
from internlm.ops.attention import attention
from internlm.ops.attention_ragged import cudnn_applies
from internlm.ops.cross_entropy import linear_cross_entropy
from internlm.ops.segments import Segments

DEVICE = "cuda"
BF16 = torch.bfloat16


def milliseconds(function: Callable[[], object], repeats: int = 10) -> float:
    """Median time on the device, after three calls to warm up; the host's own work doesn't count."""
    times = []
    for repeat in range(repeats + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # cycles, 1 ms in which the host gets ahead
        start.record()
        function()
        stop.record()
        stop.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(stop))
    return statistics.median(times)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=BF16)


def ceilings() -> tuple[float, float]:
    """Bytes/s of a copy, FLOP/s of the matrix products of a 7B block over 8k tokens."""
    source, target = torch.empty(2, 2**31, dtype=torch.uint8, device=DEVICE).random_().unbind()
    copy = 2 * 2**31 / milliseconds(lambda: target.copy_(source)) * 1e3
    flops = time = 0.0
    for n, k in ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)):
        x, weight = random(8192, k), random(n, k)
        flops += 2 * 8192 * n * k
        time += milliseconds(lambda x=x, weight=weight: x @ weight.T)  # type: ignore[misc]
    return copy, flops / time * 1e3


def products(flops: float) -> None:
    """Matrix products of a block, forward and both gradients, by how many tokens they take at once.

    Each runs for two seconds, after which the card is at its power limit, as it is in a step.
    """
    blocks = {"7B": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))}
    blocks["1.8B"] = ((4096, 2048), (2048, 2048), (16384, 2048), (2048, 8192))
    for name, shapes in blocks.items():
        for tokens in (4096, 8192, 16384, 32768):
            inputs = [(random(tokens, k), random(n, k), random(tokens, n)) for n, k in shapes]

            def block(inputs: list[tuple[torch.Tensor, ...]] = inputs) -> None:
                for x, weight, grad in inputs:
                    _ = x @ weight.T, grad @ weight, grad.T @ x

            work = sum(6 * tokens * n * k for n, k in shapes)
            time = milliseconds(block, repeats=int(2 * flops / work))
            print(f"products of a {name} block, {tokens:,} tokens: {work / time / 1e9:.0f} TFLOP/s")


def adamw(copy: float) -> None:
    """26 bytes a parameter: read and written, but for the gradient."""
    size = 2**28
    grad, param = random(size), random(size)
    remainder = torch.zeros(size, dtype=torch.int16, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    scalars = adam_scalars(
        lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, update=1, grad_factor=one, ok=one > 0
    )
    for dtype in (torch.float32, BF16):
        moments = [torch.zeros(size, dtype=dtype, device=DEVICE) for _ in range(2)]
        time = milliseconds(
            lambda moments=moments: adamw_(param, grad, *moments, scalars, decay_stop=size, remainder=remainder)  # type: ignore[misc]
        )
        rate = size * (10 + 4 * dtype.itemsize) / time * 1e3
        print(f"AdamW, {dtype} moments, {size:,} parameters: {time:.2f} ms, {rate / 1e9:,.0f} GB/s, {rate / copy:.0%}")


def cross_entropy(flops: float) -> None:
    """Forward with gradients, vocabulary and width of InternLM-7B: three matrix products."""
    tokens, hidden, vocab = 8192, 4096, 103168
    x, weight = random(tokens, hidden).requires_grad_(), (random(vocab, hidden) / 64).requires_grad_()
    labels = torch.randint(vocab, (tokens,), device=DEVICE)
    time = milliseconds(lambda: linear_cross_entropy(x, weight, labels).loss_sum.backward())
    rate = 6 * tokens * hidden * vocab / time * 1e3
    print(f"linear + cross-entropy, {tokens:,} tokens: {time:.2f} ms, {rate / 1e12:.0f} TFLOP/s, {rate / flops:.0%}")


def attentions() -> None:
    """Forward and backward over 32k tokens of each backend that is there; causal FLOPs by real lengths."""
    tokens = 32768
    drawn = np.random.default_rng(0).lognormal(np.log(1024) - 0.5, 1.0, 400).astype(int).clip(8, tokens)
    rows = {f"even {longest}": [longest] * (tokens // longest) for longest in (1024, 4096, tokens)}
    rows |= {f"ragged {longest}": cut(drawn, longest, tokens) for longest in (4096, tokens)}
    for heads, kv_heads, size in ((32, 32, 128), (16, 8, 128), (16, 16, 64)):
        for name, lengths in rows.items():
            segments = Segments.of(tuple(lengths))
            segments.cu_seqlens = segments.cu_seqlens.to(DEVICE)
            q, k, v, upstream = (random(tokens, count, size) for count in (heads, kv_heads, kv_heads, heads))
            inputs = [x.requires_grad_() for x in (q, k, v)]
            flops = 14 / 2 * heads * size * sum(length**2 for length in lengths)
            print(f"attention, {heads}/{kv_heads} heads of {size}, {name}: {len(lengths)} segments", end="")
            for backend in ("flash4", "sdpa", "cudnn", "varlen"):
                if (backend == "cudnn" and not cudnn_applies(size)[0]) or (backend == "sdpa" and "ragged" in name):
                    continue
                if backend == "flash4" and attention_flash.load_flash4():
                    continue
                if backend == "varlen" and kv_heads != heads:
                    continue
                time = milliseconds(lambda: attention(*inputs, segments, backend).backward(upstream))  # type: ignore[misc]  # noqa: B023
                print(f", {backend} {time:.2f} ms {flops / time / 1e9:.0f} TFLOP/s", end="")
            print()


def cut(lengths: np.ndarray, longest: int, tokens: int) -> list[int]:
    """Documents cut to `longest`, as many as fill `tokens`."""
    pieces = [min(longest, length - at) for length in lengths.tolist() for at in range(0, length, longest)]
    ends = np.cumsum(pieces)
    count = int(np.searchsorted(ends, tokens))
    return [*pieces[:count], tokens - int(ends[count - 1])]


if __name__ == "__main__":
    copy, flops = ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"ceilings: copy {copy / 1e9:,.0f} GB/s, bf16 matrix products of a 7B block {flops / 1e12:.0f} TFLOP/s")
    products(flops)
    adamw(copy)
    cross_entropy(flops)
    attentions()
