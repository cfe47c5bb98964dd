"""A run without a model: a few tensors that all hold one number, in a process group of one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.checkpoint.checkpointer import Checkpointer
from internlm.checkpoint.storage import Storage
from internlm.config.schema import Config, ParallelConfig
from internlm.core.launch import World
from internlm.core.mesh import build_mesh
from internlm.core.placement import box_shape, boxes_of_interval
from internlm.solver.pieces import Piece
from internlm.train.metrics import StepReport
from internlm.train.state import TrainState

SHAPES = {"embedding.weight": (12, 4), "layers.0.ffn.weight": (2, 6, 4), "head.norm.weight": (4,)}
KINDS = ("param", "exp_avg", "exp_avg_sq")


class FakeOptimizer:
    """Stands where `HybridZero` does. Of `ranks` ranks each owns as many elements of every tensor."""

    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES, rank: int = 0, ranks: int = 1) -> None:
        self.rank, self.ranks = rank, ranks
        self.tensors = {(name, kind): torch.zeros(shape) for name, shape in shapes.items() for kind in KINDS}
        self.num_updates = 0
        self.loaded_kinds: set[str] = set()
        self.read_hook: Callable[[], None] = lambda: None

    def fill(self, value: float) -> None:
        for tensor in self.tensors.values():
            tensor.fill_(value)
        self.num_updates = int(value)

    def values(self) -> set[float]:
        """The smallest and largest number of every piece."""
        return {float(x) for piece in self.pieces() for x in self._part(piece).aminmax()}

    def _part(self, piece: Piece) -> Tensor:
        return self.tensors[piece.name, piece.kind][tuple(slice(*span) for span in piece.box)]

    def pieces(self) -> list[Piece]:
        pieces = []
        for (name, kind), tensor in self.tensors.items():
            shape, size = tuple(tensor.shape), tensor.numel()
            first, stop = size * self.rank // self.ranks, size * (self.rank + 1) // self.ranks
            for box, _, _ in boxes_of_interval(shape, first + 1, stop) + boxes_of_interval(shape, first, first + 1):
                part = tensor[tuple(slice(*span) for span in box)]
                assert tuple(part.shape) == box_shape(box)
                pieces.append(Piece(name, kind, tuple(tensor.shape), box, True, partial(self._read, part), part.copy_))
        return pieces

    def _read(self, part: Tensor) -> Tensor:
        self.read_hook()
        return part

    def wait(self) -> None:
        pass

    def loaded(self, kinds: set[str]) -> None:
        self.loaded_kinds = set(kinds)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]


@contextmanager
def full(self: Storage, path: str) -> Iterator[Callable[[bytes | memoryview], None]]:
    """`Storage.writer` on a full disk."""
    raise OSError(28, "No space left on device")
    yield lambda data: None


@contextmanager
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_config(total_steps: int = 1000, vocab_size: int = 12, **ckpt: Any) -> Config:
    model = {"num_layers": 1, "hidden_size": 4, "vocab_size": vocab_size, "num_attention_heads": 1}
    data = {"seq_len": 8, "total_steps": total_steps}
    return Config.model_validate({"model": model, "data": data, "ckpt": ckpt})


class FakeRun:
    """A checkpointer with its run; `step()` is one update."""

    def __init__(self, folder: Path, config: Config, optimizer: FakeOptimizer | None = None, **options: Any) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.optimizer = optimizer or FakeOptimizer(rank=rank, ranks=ranks)
        self.state = TrainState()
        mesh = build_mesh(ParallelConfig(), World(rank, rank, ranks, torch.device("cpu")))
        self.checkpointer = Checkpointer(config, folder, self.optimizer, self.state, mesh, **options)  # type: ignore[arg-type]

    def step(self, updated: bool = True) -> None:
        self.state.batch_count += 1
        self.state.step_count += updated
        self.state.num_consumed_tokens += 8
        self.optimizer.fill(self.state.step_count)
        self.checkpointer.after_step(StepReport(self.state.batch_count, self.state.step_count))

    def train(self, steps: int) -> None:
        for _ in range(steps):
            if self.checkpointer.should_stop:
                return
            self.step()


def saved(folder: Path) -> list[str]:
    """Names in a folder of checkpoints, in the order of their steps; without hidden ones."""
    names = [path.name for path in folder.glob("[!.]*")]
    return sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
