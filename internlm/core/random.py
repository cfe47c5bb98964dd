"""Random numbers that don't depend on the layout, and the state that a resume needs."""

import hashlib

import torch
from torch import Tensor


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed for the stream called `name`: the same on every machine and in every run."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def rng_state() -> dict[str, Tensor]:
    """The state of torch's default generators on this rank, as uint8 tensors on the CPU."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Puts back what `rng_state` returned; a stream that this machine lacks is left out."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
