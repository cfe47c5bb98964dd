"""A bar that shows how much of a model is converted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress
from torch import Tensor


@contextmanager
def watched(read: Callable[[str], Tensor], total: int) -> Iterator[Callable[[str], Tensor]]:
    """`read`, which shows on stderr how many of `total` parameters it was asked for."""
    with Progress(console=Console(stderr=True)) as bar:
        task, seen = bar.add_task("parameters", total=total), set[str]()

        def counted(name: str) -> Tensor:
            value = read(name)
            seen.add(name)
            bar.update(task, completed=len(seen))
            return value

        yield counted
