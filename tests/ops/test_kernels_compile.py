"""Every Triton kernel compiles for Hopper, on a CPU too: the interpreter lets much pass that the compiler refuses."""

import importlib
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

HOPPER = ("cuda", 90, 32)
# kernel: its arguments in order, a type of Triton's for each, or a value where it is a constant
KERNELS = {
    "cross_entropy_kernel._losses_and_gradient": [
        *("*bf16", "*i64", "*fp32", "*fp32", "*i1", "i32", "fp32", "fp32", "fp32"),
        *(92544, -100, True, True, 4096),
    ],
    "adamw_kernel._adamw": ["*i16", "*bf16", "*bf16", "*bf16", "*i16", "*fp32", "i64", "i64", 1, 1024],
    "fp8_kernel._largest": ["*bf16", "*fp32", "i64", 1024],
    "fp8_kernel._cast": ["*bf16", "*fp32", "*fp8e4nv", "*fp8e4nv", "*fp32", "i32", "i32", 448.0, 64],
    "rotary_kernel._split": [*["*bf16"] * 4, "*fp32", "*fp32", "i32", 2, 64, 64, False, True, 4],
    "swiglu_kernel._forward": ["*bf16", "*bf16", "i32", 1024],
    "swiglu_kernel._backward": ["*bf16", "*bf16", "*bf16", "i32", 1024],
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles(kernel: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    room, name = kernel.split(".")
    function = getattr(importlib.import_module(f"internlm.ops.{room}"), name)
    arguments = dict(zip(function.arg_names, KERNELS[kernel], strict=True))
    signature = {name: kind if isinstance(kind, str) else "constexpr" for name, kind in arguments.items()}
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    compiled = triton.compile(ASTSource(function, signature, constants), target=GPUTarget(*HOPPER))
    assert ".target sm_90" in compiled.asm["ptx"]


def test_no_kernel_is_left_out() -> None:
    ops = Path(importlib.import_module("internlm.ops").__path__[0])
    found = sum(path.read_text().count("@triton.jit") for path in ops.glob("*_kernel.py"))
    assert found == len(KERNELS)
