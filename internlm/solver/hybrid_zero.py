"""Hybrid ZeRO: AdamW with parameters, gradients and optimizer states each sharded over ranks of their own choice.

Let p, g and os be the ranks that share parameters, gradients and optimizer states, with p | g | os | data ranks. Then

    (1, 1, 1)    is plain data parallelism           (1, dp, dp)    is ZeRO-2
    (1, 1, dp)   is ZeRO-1                            (dp, dp, dp)   is ZeRO-3
    (1, 1, 8)    is the 2023 framework's zero1 = 8    (k, k, k)      is HSDP, (k, k, dp) keeps states on all ranks

and a step is, for every unit (a transformer block, the embedding, the head):

    forward    wait for its parameters; when p > 1 gather them just before use, and prefetch the next unit's; drop them
    backward   gradients accumulate in flat buffers; once the unit's last gradient of a micro batch has come, they are
               reduce-scattered over g (when g > 1), and in the last micro batch reduced over everything that is left,
               on a lane beside compute, while the backward of earlier units goes on
    reduce     wait for what still runs; one all-reduce for the global norm
    update     AdamW on the owned parts, with clipping and loss scale folded in; a void update if the norm isn't finite
    gather     each unit's new values travel as soon as it is updated, while the next unit is updated and the next
               forward begins

With one rank the same code runs and there is nothing to send. Parameters that `parallel` has cut along the tensor or
the expert axis are, to the engine, smaller parameters: it works among the ranks that hold the same part (core/mesh.py).

The sharding of states, gradients and parameters is that of ZeRO (Rajbhandari et al., 2020); groups of independent sizes
follow InternLM's Hybrid ZeRO and AMSP (Chen et al., 2023).
"""

import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from internlm.config.schema import Config, HybridZeroConfig
from internlm.core.lanes import Lane, build_lanes
from internlm.core.mesh import Mesh
from internlm.core.placement import Placement
from internlm.ops.adamw import adam_scalars, adamw_
from internlm.solver.buckets import Slot, UnitLayout, plan_units
from internlm.solver.grad_norm import clip_factor, global_norm
from internlm.solver.grad_scaler import GradScaler
from internlm.solver.materialise import materialise_buffers, materialise_parameter
from internlm.solver.pieces import Piece, joined, pieces_of, pieces_of_buffers
from internlm.solver.presence import Presence, Trace, traced
from internlm.solver.unit import Unit
from internlm.utils.device import torch_dtype
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

ValueOf = Callable[[str, tuple[int, ...]], Tensor]

# Whole gradient buffers on their way to being reduced, when g > 1. A third would cost memory and hide nothing more.
MAX_IN_FLIGHT = 2


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step, still on the device: reading it is the trainer's one synchronisation."""

    grad_norm: Tensor  # fp32 [], unscaled, before clipping
    ok: Tensor  # bool []; False: the norm was not finite and nothing changed


class HybridZero:
    """Owns the memory of a model's parameters, gradients and optimizer states.

    Args:
        model: on the meta device. Its children (the members of a `ModuleList`) are the units, each called as a module.
        config: sizes in `parallel`, the rest in `hybrid_zero_optimizer`, `adam` and `grad_scaler`.
        value_of: (name, shape) -> the global parameter's value in fp32.
        placements: of the parameters that `parallelize` has cut; all others are whole.
        trace: called at "forward", "used" (p > 1), "backward" of a unit, and of the ".begin" and ".end" of its
            "reduce", "gather" (of updated values) and "fetch" (of sharded parameters).
        lanes: those of another engine on the same mesh, where there is one: with lanes of its own this engine's
            collectives would mix with the other's in an order that differs between ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        mesh: Mesh,
        value_of: ValueOf,
        placements: Mapping[str, Placement] | None = None,
        trace: Trace | None = None,
        lanes: tuple[Lane, Lane] | None = None,
    ) -> None:
        zero = config.hybrid_zero_optimizer
        self.mesh = mesh
        self.adam = config.adam
        self.clip_grad_norm = zero.clip_grad_norm
        self.trace = trace or _no_trace
        self.scaler = GradScaler(config.grad_scaler, enabled=torch_dtype(config.model.dtype) == torch.float16)
        self.lanes = lanes or build_lanes(mesh.device, zero.overlap_sync_grad, zero.overlap_sync_param)
        self.reduce_lane, self.gather_lane = self.lanes
        self.num_updates = 0
        self._unread_ok: Tensor | None = None
        self._in_flight: deque[Callable[[], None]] = deque()

        layouts = plan_units(model, config, mesh, placements)
        self.units = [self._build_unit(model, layout, zero, value_of) for layout in layouts]
        self.buffers = materialise_buffers(model, value_of, mesh.device)
        self.trained = [unit for unit in self.units if unit.layout.trainable]
        self.presence = Presence(model, self.units, self.gather_lane, config.parallel.weight.overlap, self.trace)
        self._watch_gradients()
        logger.info("hybrid zero over %s: %s", dict(mesh.dense.sizes), _in_gib(self.memory()))

    def _build_unit(self, model: nn.Module, layout: UnitLayout, zero: HybridZeroConfig, value_of: ValueOf) -> Unit:
        mesh = self.mesh
        parameters = {slot.name: materialise_parameter(model, slot.name, mesh.device) for slot in layout.slots}
        unit = Unit(
            layout,
            parameters,
            mesh.expert if layout.kind == "expert" else mesh.dense,
            mesh.device,
            copies=[mesh.dense.group("tensor")] if layout.kind == "copied" else [],
            ends=mesh.group("pipeline") if layout.slots[0].placement.at_both_ends else None,
            grad_dtype=layout.dtype if zero.grad_dtype == "model" else torch.float32,
            moment_dtype=torch_dtype(zero.moment_dtype),
            split=zero.master == "split",
        )
        for slot in layout.slots:
            value = value_of(slot.name, slot.placement.shape)
            unit.fill(slot, value[tuple(slice(*interval) for interval in slot.placement.box)])
        if unit.sharded:
            unit.free()
        return unit

    # -- one step -----------------------------------------------------------------------------------------------

    @property
    def loss_scale(self) -> float:
        """The factor on the loss before backward."""
        self._read_ok()
        return self.scaler.scale

    def begin_step(self, num_micro_batches: int, chunks: Sequence[Collection[str]] | None = None) -> None:
        """Announces how many micro batches make the step, so that the last one is known by counting.

        Args:
            chunks: the modules of each part, for a backward in several parts; a unit that modules of two chunks use
                gets its gradients in two passes.
        """
        self._read_ok()
        for unit in self.units:
            passes = sum(not unit.modules.isdisjoint(modules) for modules in chunks) if chunks else 1
            unit.num_passes = num_micro_batches * passes
            unit.num_complete = unit.num_ended = 0
            self._expect_gradients(unit)

    def end_backward(self, modules: Collection[str] | None = None) -> None:
        """To be called after the backward of each micro batch: of the whole model, or of some `modules` (a chunk)."""
        for unit in reversed(self.units):
            if modules is not None and unit.modules.isdisjoint(modules):
                continue
            unit.num_ended += 1
            if unit.layout.trainable and unit.num_complete < unit.num_ended:  # parameters without a gradient this time
                unit.clear_missing()
                self._on_unit_complete(unit)
            self.presence.drop(unit)

    def step(self, lr: float, beta2: float) -> StepResult:
        """Reduce, update, gather. Nothing changes when the gradient norm is not finite."""
        assert all(unit.num_ended == unit.num_passes for unit in self.units)
        norm = self._reduce()
        ok = norm.isfinite()
        self._update_and_gather(norm, ok, lr, beta2)
        self._unread_ok = ok
        return StepResult(norm, ok)

    def _reduce(self) -> Tensor:
        """Waits for reductions that backward didn't hide. Returns the global norm of the unscaled gradients."""
        while self._in_flight:
            self._in_flight.popleft()()
        self.wait()
        for unit in self.units:
            unit.add_other_end()
        counted = (unit.owned_grad for unit in self.trained if unit.counts)
        return global_norm(counted, self.mesh) / self.scaler.scale

    def _update_and_gather(self, norm: Tensor, ok: Tensor, lr: float, beta2: float) -> None:
        scalars = adam_scalars(
            lr=lr,
            betas=(self.adam.adam_beta1, beta2),
            eps=self.adam.adam_eps,
            weight_decay=self.adam.weight_decay,
            update=self.num_updates + 1,
            grad_factor=clip_factor(norm, self.clip_grad_norm) / self.scaler.scale,
            ok=ok,
        )
        for unit in self.trained:
            adamw_(
                unit.owned,
                unit.owned_grad,
                unit.exp_avg,
                unit.exp_avg_sq,
                scalars,
                decay_stop=unit.layout.decay_stop - unit.owned_start,
                remainder=unit.remainder,
                master=unit.master,
            )
            self._gather_updates(unit)
        self.presence.fetch_ahead(0)  # the next forward's first

    def _gather_updates(self, unit: Unit) -> None:
        if unit.sharded:  # together with the parameters, when they are fetched
            unit.stale = True
        else:
            unit.pending.append(self.gather_lane.submit(traced(self.trace, "gather", unit, unit.gather_updates)))

    def _read_ok(self) -> None:
        """Takes note of the last step's outcome. The trainer has read it by then, so this waits for nothing."""
        if self._unread_ok is not None:
            ok, self._unread_ok = bool(self._unread_ok), None
            self.num_updates += ok
            self.scaler.update(ok)

    # -- backward -----------------------------------------------------------------------------------------------

    def _watch_gradients(self) -> None:
        for index, unit in enumerate(self.units):
            for slot in unit.layout.slots if unit.layout.trainable else ():
                hook = partial(_weakly_on_grad, weakref.ref(self), index, slot)
                unit.parameters[slot.name].register_post_accumulate_grad_hook(hook)

    @staticmethod
    def _expect_gradients(unit: Unit) -> None:
        unit.missing = {name for name, parameter in unit.parameters.items() if parameter.requires_grad}

    def _on_grad(self, unit: Unit, slot: Slot, parameter: Tensor) -> None:
        assert parameter.grad is not None
        unit.accumulate(slot, parameter.grad)
        parameter.grad = None
        unit.missing.discard(slot.name)
        if not unit.missing:
            self._on_unit_complete(unit)

    def _on_unit_complete(self, unit: Unit) -> None:
        """All gradients of a unit's micro batch are in: send them, if it is time."""
        self.trace("backward", unit.layout.name)
        self.presence.drop(unit)
        first, last = unit.first, unit.num_complete + 1 == unit.num_passes
        unit.num_complete += 1
        self._expect_gradients(unit)
        if not (last or unit.grads_sharded):
            return
        assert unit.incoming is not None
        if unit.grads_sharded and len(self._in_flight) >= MAX_IN_FLIGHT:
            self._in_flight.popleft()()
        # the work holds the whole buffer, which is freed with it
        work = partial(unit.reduce, unit.incoming, first, last)
        if unit.grads_sharded:
            unit.incoming = None
        self._in_flight.append(self.reduce_lane.submit(traced(self.trace, "reduce", unit, work)))

    # -- parameters ---------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Until all parameters that this rank keeps are up to date."""
        for unit in self.units:
            while unit.pending:
                unit.pending.pop(0)()
            self.presence.drop(unit)

    def fetch(self, modules: Collection[str]) -> None:
        """Keeps the parameters of modules present until `drop`, for computation outside the modules' own calls."""
        for unit in self.presence.units_of(modules):
            self.presence.use(unit)

    def drop(self, modules: Collection[str]) -> None:
        """Frees the parameters of modules until their next use, where ranks share them."""
        for unit in self.presence.units_of(modules):
            self.presence.drop(unit)

    def full_parameter(self, name: str) -> Tensor:
        """A copy of one global parameter. Collective: every rank that holds a part of it calls it, with the same names
        in the same order."""
        for unit in self.units:
            for slot in unit.layout.slots:
                if slot.name == name:
                    self.presence.use(unit)
                    value = unit.view(unit.full, slot).clone()
                    self.presence.drop(unit)
                    return joined(slot.placement, value, self.mesh)
        raise KeyError(name)

    def parameter_names(self) -> list[str]:
        """Names of the parameters of which this rank holds a part, in the order of the forward pass."""
        return [slot.name for unit in self.units for slot in unit.layout.slots]

    # -- state --------------------------------------------------------------------------------------------------

    def pieces(self) -> list[Piece]:
        """What this rank updates, and the model's buffers, as boxes of global tensors."""
        self.wait()
        updated = [piece for unit in self.units for slot in unit.layout.slots for piece in pieces_of(unit, slot)]
        return [*updated, *pieces_of_buffers(self.buffers, self.mesh)]

    def loaded(self, kinds: Collection[str]) -> None:
        """To be called after pieces were written: makes masters and parameters of all ranks agree. Collective."""
        for unit in self.units:
            if "master" not in kinds:
                unit.reset_master()
            self._gather_updates(unit)
        self.wait()
        for unit in self.units:
            self.gather_lane.submit(unit.pack)()

    def state_dict(self) -> dict[str, Any]:
        """The scalars of the optimizer, as JSON can hold them."""
        self._read_ok()
        return {"num_updates": self.num_updates, "grad_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._unread_ok = None
        self.num_updates = int(state["num_updates"])
        self.scaler.load_state_dict(state["grad_scaler"])

    def memory(self) -> dict[str, int]:
        """Bytes held on this rank, by class."""
        total: dict[str, int] = {}
        for unit in self.units:
            for kind, size in unit.memory().items():
                total[kind] = total.get(kind, 0) + size
        return total


def _weakly_on_grad(engine: "weakref.ref[HybridZero]", index: int, slot: Slot, parameter: Tensor) -> None:
    # A hook on a tensor is held where the garbage collector can't see it: with a strong reference here, neither the
    # engine's memory nor its process groups would ever be freed.
    alive = engine()
    if alive is not None:
        alive._on_grad(alive.units[index], slot, parameter)


def _no_trace(event: str, unit: str) -> None:
    pass


def _in_gib(memory: dict[str, int]) -> str:
    return ", ".join(f"{kind} {size / 2**30:.3f} GiB" for kind, size in memory.items())
