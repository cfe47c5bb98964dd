"""AdamW: the torch path against torch.optim, the Triton kernel (in its interpreter without a GPU) bit for bit."""

import os
import subprocess
import sys

import pytest
import torch

from internlm.ops import adamw as room
from internlm.ops.adamw import adam_scalars, adamw_, adamw_reference_, join_master, round_to, split_master

SIZE, DECAY_STOP = 2500, 1700  # more than two blocks of the kernel, neither of them full
KINDS = ["plain", "split", "copy", "float16"]
STEPS = [(1.0, True), (0.37, True), (float("nan"), False), (1e-3, True)]  # clip factor, finite


def fresh(kind, moment_dtype, device="cpu"):
    """A shard's tensors: param, grads of all steps, moments, remainder, master."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(SIZE, generator=generator)
    grads = torch.randn(len(STEPS), SIZE, generator=generator)
    grads[2, 5] = float("inf")
    moments = [torch.zeros(SIZE, dtype=moment_dtype) for _ in range(2)]
    remainder = master = None
    param = weight
    if kind == "split":
        param, remainder = split_master(weight)
    elif kind != "plain":
        param, master = round_to(weight, torch.bfloat16 if kind == "copy" else torch.float16), weight
    grads = grads.to(param.dtype)
    return [None if x is None else x.to(device) for x in (param, grads, *moments, remainder, master)]


def run(update, kind, moment_dtype, device="cpu"):
    param, grads, exp_avg, exp_avg_sq, remainder, master = fresh(kind, moment_dtype, device)
    for number, (factor, ok) in enumerate(STEPS):
        scalars = adam_scalars(
            lr=1e-2,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
            update=number + 1,
            grad_factor=torch.tensor(factor, device=device),
            ok=torch.tensor(ok, device=device),
        )
        update(param, grads[number], exp_avg, exp_avg_sq, scalars, DECAY_STOP, remainder, master)
    return {"param": param, "m": exp_avg, "v": exp_avg_sq, "remainder": remainder, "master": master}


def assert_same_bits(found, expected):
    for name, value in expected.items():
        if value is not None:
            assert torch.equal(found[name].cpu(), value), (name, (found[name].cpu() != value).sum())


def check_kernel(device="cpu"):
    """Also run as a script, in a process where Triton interprets (and truncates to bf16 where GPUs round)."""
    from internlm.ops.adamw_kernel import launch

    for kind in KINDS:
        for moment_dtype in (torch.float32, torch.bfloat16)[: 1 + (device == "cuda")]:
            expected = run(adamw_reference_, kind, moment_dtype)
            assert_same_bits(run(launch, kind, moment_dtype, device), expected)
            assert_same_bits(run(adamw_reference_, kind, moment_dtype, device), expected)


def test_kernel_interpreted_equals_torch_bit_for_bit():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-m", "tests.ops.test_adamw"], check=True, env=environment)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernel_on_gpu_equals_torch_on_cpu_bit_for_bit():
    assert room._triton_update is not None
    check_kernel("cuda")


def test_torch_path_equals_torch_optim():
    """Three steps without clipping; the two orders of rounding differ in the last bits."""
    param, grads, *moments, _, _ = fresh("plain", torch.float32)
    theirs = [torch.nn.Parameter(part.clone()) for part in param.split((DECAY_STOP, SIZE - DECAY_STOP))]
    groups = [{"params": [theirs[0]], "weight_decay": 0.1}, {"params": [theirs[1]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), foreach=False)
    for number in (0, 1, 3):
        for part, grad in zip(theirs, grads[number].split((DECAY_STOP, SIZE - DECAY_STOP)), strict=True):
            part.grad = grad.clone()
        optimizer.step()
        one = torch.tensor(1.0)
        scalars = adam_scalars(
            lr=1e-2,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
            update=min(number, 2) + 1,
            grad_factor=one,
            ok=one > 0,
        )
        adamw_(param, grads[number], *moments, scalars, decay_stop=DECAY_STOP)
    torch.testing.assert_close(param, torch.cat([part.detach() for part in theirs]), rtol=3e-7, atol=1e-8)


def test_bf16_moments_are_rounded_between_steps():
    """The textbook's update in fp64, which rounds moments to bf16 when it puts them away and not before."""
    found = run(adamw_reference_, "plain", torch.bfloat16)
    param, grads, *_ = fresh("plain", torch.bfloat16)
    weight, mean, square = param.double(), torch.zeros(SIZE).double(), torch.zeros(SIZE).double()
    decay = 0.1 * (torch.arange(SIZE) < DECAY_STOP)
    for number, (factor, ok) in enumerate(STEPS):
        if not ok:
            continue
        g, update = grads[number].double() * factor, number + 1
        mean, square = 0.9 * mean + 0.1 * g, 0.95 * square + 0.05 * g * g
        corrected = mean / (1 - 0.9**update), (square / (1 - 0.95**update)).sqrt()
        weight = weight * (1 - 1e-2 * decay) - 1e-2 * corrected[0] / (corrected[1] + 1e-8)
        mean, square = mean.bfloat16().double(), square.bfloat16().double()
    torch.testing.assert_close(found["param"].double(), weight, rtol=1e-5, atol=1e-6)
    one_bit = {"rtol": 2**-7, "atol": 1e-12}  # fp32 and fp64 may fall on two sides of a border
    torch.testing.assert_close(found["m"].double(), mean, **one_bit)
    torch.testing.assert_close(found["v"].double(), square, **one_bit)


def test_split_master_trains_bit_for_bit_like_an_fp32_copy():
    split, copy = (run(adamw_reference_, kind, torch.float32) for kind in ("split", "copy"))
    assert torch.equal(join_master(split["param"], split["remainder"]), copy["master"])
    assert torch.equal(split["param"], copy["param"])


def test_a_void_update_changes_nothing():
    before, after = fresh("split", torch.float32), fresh("split", torch.float32)
    scalars = adam_scalars(
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        update=1,
        grad_factor=torch.tensor(float("nan")),
        ok=torch.tensor(False),
    )
    adamw_(after[0], after[1][2], after[2], after[3], scalars, decay_stop=SIZE, remainder=after[4])
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True) if x is not None)


if __name__ == "__main__":
    check_kernel()
