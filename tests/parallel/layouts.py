"""Layouts of 2, 4 and 8 ranks, by name: what the matrices of tests are made of."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Layout:
    """Ranks, the config's `parallel` section, and further sections that it needs."""

    ranks: int
    parallel: dict[str, Any]
    sections: dict[str, Any] = field(default_factory=dict)


def zero(p: int, g: int, os: int) -> dict[str, Any]:
    return {"weight": {"size": p}, "gradient": {"size": g}, "zero1": {"size": os}}


def tensor(size: int, mode: str = "mtp") -> dict[str, Any]:
    return {"tensor": {"size": size, "mode": mode}}


LAYOUTS: dict[str, Layout] = {
    "one": Layout(1, {}),
    "ddp2": Layout(2, {}),
    "zero1": Layout(4, zero(1, 1, 4)),
    "zero2": Layout(4, zero(1, 4, 4)),
    "zero3": Layout(4, zero(4, 4, 4)),
    "hfsdp": Layout(8, zero(2, 2, 8)),
    "mtp2": Layout(2, tensor(2)),
    "msp4": Layout(4, tensor(4, "msp")),
    "fsp2-zero3": Layout(8, {**tensor(2, "fsp"), **zero(2, 2, 4)}),
}
