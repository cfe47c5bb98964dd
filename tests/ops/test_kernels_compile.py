"""Every Triton kernel compiles for Hopper, on a CPU too: the interpreter lets much pass that the compiler refuses."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

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


def launch_all(rooms: dict[str, ModuleType]) -> None:
    """Every kernel by the function that launches it."""
    x, labels = torch.zeros(4, 2, 64), torch.zeros(4, dtype=torch.int64)
    flat = [torch.zeros(8) for _ in range(5)]
    rooms["cross_entropy_kernel"].losses_and_gradient_(x[:, 0], labels, 0.0, 0.0, 1.0, True)
    rooms["adamw_kernel"].launch(*flat, 8, None, None)
    rooms["fp8_kernel"].cast(x[:, 0])
    rooms["rotary_kernel"].forward(torch.zeros(4, 2, 3, 8), torch.zeros(4, 4), torch.zeros(4, 4), False)
    rooms["swiglu_kernel"].forward(x)
    rooms["swiglu_kernel"].backward(x, x[:, 0])


def options_of_launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    options: dict[str, dict[str, Any]] = {}

    class Recorder:
        def __init__(self, kernel: str) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **given: options.update({self.kernel: given})

    rooms = {room: importlib.import_module(f"internlm.ops.{room}") for room in {k.split(".")[0] for k in KERNELS}}
    with monkeypatch.context() as patch:
        for kernel in KERNELS:
            room, name = kernel.split(".")
            patch.setattr(rooms[room], name, Recorder(kernel))
        launch_all(rooms)
    return options


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the options of its launch, to the same code whatever Triton contracts by default; AdamW's not at all."""
    options = options_of_launches(monkeypatch)[kernel]
    contracts = not kernel.startswith("adamw")
    assert options["enable_fp_fusion"] == contracts
    codes = []
    for default in ("0", "1") if kernel.startswith("adamw") else ("0",):
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
        codes.append(compiled(kernel, options))
    assert ".target sm_90" in codes[0] and len(set(codes)) == 1
    assert contracts or "fma." not in codes[0]


def test_without_its_option_adamw_would_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    assert "fma." in compiled("adamw_kernel._adamw", {})


def compiled(kernel: str, options: dict[str, Any]) -> str:
    """Its PTX."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    room, name = kernel.split(".")
    function = getattr(importlib.import_module(f"internlm.ops.{room}"), name)
    arguments = dict(zip(function.arg_names, KERNELS[kernel], strict=True))
    signature = {name: kind if isinstance(kind, str) else "constexpr" for name, kind in arguments.items()}
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    source = ASTSource(function, signature, constants)
    return triton.compile(source, target=GPUTarget(*HOPPER), options=options).asm["ptx"]


def test_no_kernel_is_left_out() -> None:
    ops = Path(importlib.import_module("internlm.ops").__path__[0])
    found = sum(path.read_text().count("@triton.jit") for path in ops.glob("*_kernel.py"))
    assert found == len(KERNELS)
