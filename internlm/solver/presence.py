"""Fetches a unit's parameters just before they are used, and drops them just after, if ranks share them (p > 1).

    forward    a module waits for the parameters of its units, while those of the next unit are being fetched; they are
               dropped after the module, unless its backward follows at once
    backward   they are fetched again before the module's backward; while that is computed, so are those of the unit
               before it; the engine drops them when the unit's last gradient has arrived

If every rank keeps all parameters (p = 1), nothing is fetched, and a module only waits for the values that the last
update sends.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from internlm.core.lanes import Lane
from internlm.solver.unit import Unit

Trace = Callable[[str, str], None]  # (event, unit)


class Presence:
    """Watches the calls of a model's modules.

    `units` are in the order of the forward pass. Without `ahead`, each is fetched only when its turn comes.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], lane: Lane, ahead: bool, trace: Trace) -> None:
        self.units, self.lane, self.ahead, self.trace = units, lane, ahead, trace
        users: dict[str, list[int]] = {}
        for index, unit in enumerate(units):
            for name in unit.layout.modules:
                users.setdefault(name, []).append(index)
        for name, indices in users.items():
            module = model.get_submodule(name)
            module.register_forward_pre_hook(partial(self._before_forward, indices))
            if any(units[index].sharded for index in indices):
                module.register_forward_hook(partial(self._after_forward, indices))

    def fetch_ahead(self, index: int) -> None:
        """Starts gathering the parameters of unit `index`, if there is one."""
        if self.ahead and 0 <= index < len(self.units):
            self._fetch(self.units[index])

    def _fetch(self, unit: Unit) -> None:
        """Starts gathering a unit's parameters, unless they are here or on their way."""
        if unit.sharded and not unit.present:
            unit.allocate()
            unit.present = True
            unit.pending.append(self.lane.submit(traced(self.trace, "fetch", unit, unit.gather)))

    def use(self, unit: Unit) -> None:
        """Makes compute wait for a unit's parameters."""
        self._fetch(unit)
        while unit.pending:
            unit.pending.pop(0)()

    def drop(self, unit: Unit) -> None:
        """Frees a unit's parameters until their next use."""
        if unit.sharded and unit.present:
            while unit.pending:
                unit.pending.pop(0)()
            unit.free()

    def units_of(self, modules: Collection[str]) -> list[Unit]:
        """The units that some modules use."""
        return [unit for unit in self.units if not unit.modules.isdisjoint(modules)]

    def _before_forward(self, indices: list[int], module: nn.Module, args: Any) -> None:
        for index in indices:
            self.use(self.units[index])
            self.trace("forward", self.units[index].layout.name)
        self.fetch_ahead(max(indices) + 1)

    def _after_forward(self, indices: list[int], module: nn.Module, args: Any, output: Any) -> None:
        for index in indices:
            unit = self.units[index]
            self.trace("used", unit.layout.name)
            # the last module's backward follows at once, and a shared unit is needed at both ends
            if index + 1 < len(self.units) and len(unit.layout.modules) == 1:
                self.drop(unit)
        for leaf in tree_leaves(vars(output) if hasattr(output, "__dataclass_fields__") else output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(partial(self._before_backward, indices))

    def _before_backward(self, indices: list[int], grad: Tensor) -> None:
        for unit in self.units[max(indices) + 1 :]:
            if not unit.layout.trainable:  # no gradient said that its backward is done
                self.drop(unit)
        for index in indices:
            self.use(self.units[index])
        self.fetch_ahead(min(indices) - 1)


def traced(trace: Trace, event: str, unit: Unit, work: Callable[[], None]) -> Callable[[], None]:
    """`work` on a unit, with its begin and end reported to `trace`."""

    def run() -> None:
        trace(f"{event}.begin", unit.layout.name)
        work()
        trace(f"{event}.end", unit.layout.name)

    return run
