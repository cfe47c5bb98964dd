"""Where Triton's kernels are found, if this machine has Triton."""

from importlib import import_module
from typing import Any


def find_kernels(room: str) -> Any:
    """The module `internlm.ops.ROOM`, or None without Triton, which CPU builds of torch come without."""
    try:
        return import_module(f"internlm.ops.{room}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        return None
