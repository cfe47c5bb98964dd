"""Pipeline parallel: each stage has some blocks, and micro batches pass through all stages and back.

Every stage reads the same rows, so tokens, positions, segments and labels are where they are needed, and only hidden
states [tokens here, hidden] and their gradients travel. What a stage does when is a list of actions (timetable.py);
here they are carried out. The loss is computed by the stage that has the last chunk; metrics are summed over all ranks
anyway, and the other stages add nothing.

Every chunk's graph starts at a leaf, the hidden states that it was given. The gradient that arrives in it goes to the
previous chunk, on the first chunk to the embedding.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from internlm.config.schema import Config
from internlm.core.collectives import all_reduce_
from internlm.core.mesh import Mesh
from internlm.model.batch import Batch
from internlm.model.transformer import Transformer
from internlm.parallel.contract import GradientEngine, Objective, OnLoss
from internlm.parallel.pipeline_layout import PipelineLayout, pipeline_layout
from internlm.parallel.recompute import num_with_recomputation
from internlm.parallel.sequence import own_part
from internlm.parallel.split_backward import Join, backward_input, backward_weights
from internlm.parallel.timetable import Action, Table, compute_table, forward_table, input_of, output_of, with_transfers
from internlm.utils.device import torch_dtype
from internlm.utils.logger import get_logger

logger = get_logger(__name__)


@dataclass
class _InFlight:
    """A micro batch in a chunk between its forward and the end of its backward."""

    x: Tensor  # the leaf
    output: Tensor  # hidden states, or the weighted loss
    embedded: Tensor | None  # on the first chunk: what the leaf is detached from
    joins: list[Join] = field(default_factory=list)


@dataclass
class _Arrival:
    """Data for a chunk, and what has to be waited for if it comes from another stage."""

    tensor: Tensor
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


class Pipeline:
    """The schedules with more than one stage."""

    def __init__(
        self,
        model: Transformer,
        engine: GradientEngine,
        config: Config,
        mesh: Mesh,
        objective: Objective,
        measure: Objective,
    ) -> None:
        self.model, self.engine, self.config, self.mesh = model, engine, config, mesh
        self.objective, self.measure = objective, measure
        self.layout = pipeline_layout(config)
        self.stage, self.group = mesh.coordinates["pipeline"], mesh.group("pipeline")
        self.chunks = {chunk: _Chunk(model, config, self.layout, chunk) for chunk in self.layout.chunks_of(self.stage)}
        all_reduce_(torch.zeros(1, device=mesh.device), self.group)  # NCCL: all ranks in a group's first transfer
        self._plans: dict[int, Table] = {}
        self._evaluation = with_transfers(forward_table(self.layout), self.layout)
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        logger.info(
            "pipeline of %d stages, schedule %s, blocks per chunk %s",
            self.layout.num_stages,
            self.layout.schedule,
            [len(layers) for layers in self.layout.layers],
        )

    def train(self, rows: Sequence[Batch], weights: Sequence[float], on_loss: OnLoss) -> None:
        count = len(rows)
        if count not in self._plans:  # it changes while data.rampup_batch_size is at work
            self._plans[count] = with_transfers(compute_table(self.layout, count), self.layout)
        self.engine.begin_step(count, [chunk.modules for chunk in self.chunks.values()])
        self._run(self._plans[count][self.stage], rows, weights, on_loss, self.objective)

    def evaluate(self, row: Batch, on_loss: OnLoss) -> None:
        with torch.no_grad():
            self._run(self._evaluation[self.stage], [row], [1.0], on_loss, self.measure)

    def eval_mode(self, on: bool) -> None:
        self.model.train(not on)

    def _run(
        self,
        plan: Sequence[Action],
        rows: Sequence[Batch],
        weights: Sequence[float],
        on_loss: OnLoss,
        objective: Objective,
    ) -> None:
        parts = [own_part(row, self.mesh).to(self.mesh.device) for row in rows]
        run = _Run(rows, parts, weights, on_loss, objective)
        for action in plan:
            with record_function(str(action)):
                self._do(action, run)
        while self._sent:
            self._sent.popleft()[0].wait()
        assert not run.arrived and not run.in_flight

    def _do(self, action: Action, run: "_Run") -> None:
        if action.kind == "F":
            self._forward(action, run)
        elif action.kind in ("B", "I"):
            self._backward(action, run)
        elif action.kind == "W":
            self._backward_weights(action, run)
        elif action.kind.startswith("receive"):
            self._receive(action, run)
        else:
            self._send(action, run)

    # -- compute ------------------------------------------------------------------------------------------------

    def _forward(self, action: Action, run: "_Run") -> None:
        chunk, part = self.chunks[action.chunk], run.parts[action.micro_batch]
        embedded = self.model.embedding(part.tokens) if chunk.first else None
        x = self._given(action, run) if embedded is None else embedded.detach()
        assert x is not None
        x.requires_grad_(torch.is_grad_enabled())
        output = self.model.run_blocks(chunk.blocks, x, part)
        if chunk.last:
            weight = run.weights[action.micro_batch]
            row = run.rows[action.micro_batch]
            loss = run.objective(partial(self.model.head_loss, output, part), row, weight)
            run.on_loss(loss, part)
            output = loss.loss_sum * weight
        else:
            self._hand_over(action, output.detach(), run)
        if torch.is_grad_enabled():
            run.in_flight[action.chunk, action.micro_batch] = _InFlight(x, output, embedded)

    def _backward(self, action: Action, run: "_Run") -> None:
        chunk, state = self.chunks[action.chunk], run.in_flight[action.chunk, action.micro_batch]
        gradient = self._given(action, run)
        if action.kind == "B":
            torch.autograd.backward(state.output, gradient)
        else:
            state.joins = backward_input(state.output, gradient, state.x, chunk.weights_at_once, chunk.weights_later)
            self.engine.end_backward(chunk.modules_at_once)
            self.engine.drop(chunk.modules)
        if not chunk.first:
            assert state.x.grad is not None
            self._hand_over(action, state.x.grad, run)
        if action.kind == "B":
            self._end_backward(action, chunk.modules, run)

    def _backward_weights(self, action: Action, run: "_Run") -> None:
        chunk, state = self.chunks[action.chunk], run.in_flight[action.chunk, action.micro_batch]
        for module, joins in groupby(state.joins, key=lambda join: chunk.module_of[join.weights[0]]):
            self.engine.fetch([module])
            backward_weights(joins)
        self._end_backward(action, chunk.modules_later, run)

    def _end_backward(self, action: Action, modules: Sequence[str], run: "_Run") -> None:
        state = run.in_flight.pop((action.chunk, action.micro_batch))
        if state.embedded is not None and state.embedded.requires_grad:
            state.embedded.backward(state.x.grad)
        self.engine.end_backward(modules)

    # -- transfers ----------------------------------------------------------------------------------------------

    def _given(self, action: Action, run: "_Run") -> Tensor | None:
        """What another chunk made for an action; the embedding's and the loss's need nothing."""
        receive = input_of(action, self.layout)
        return None if receive is None else run.arrived.pop(receive).wait()

    def _hand_over(self, action: Action, tensor: Tensor, run: "_Run") -> None:
        """Keeps what an action made for another chunk until it is sent, or used on this stage."""
        receive = output_of(action, self.layout)
        assert receive is not None
        run.arrived[receive] = _Arrival(tensor)

    def _send(self, action: Action, run: "_Run") -> None:
        receive = output_of(action, self.layout)
        assert receive is not None
        tensor = run.arrived.pop(receive).tensor.contiguous()
        work = dist.isend(tensor, group=self.group, group_dst=self.layout.stage_of[receive.chunk])
        assert work is not None
        self._sent.append((work, tensor))
        while self._sent and self._sent[0][0].is_completed():  # what it held is free again
            self._sent.popleft()[0].wait()

    def _receive(self, action: Action, run: "_Run") -> None:
        source = action.chunk + (-1 if action.kind == "receive activation" else 1)
        model, tensor_parallel = self.config.model, self.config.parallel.tensor
        tokens = len(run.parts[action.micro_batch].tokens)
        if tensor_parallel.mode in ("msp", "fsp"):  # between blocks, each tensor rank has a part of the tokens
            tokens //= self.mesh.sizes["tensor"]
        dtype = torch.float32 if model.residual_in_fp32 else torch_dtype(model.dtype)
        tensor = torch.empty(tokens, model.hidden_size, dtype=dtype, device=self.mesh.device)
        work = dist.irecv(tensor, group=self.group, group_src=self.layout.stage_of[source])
        run.arrived[action] = _Arrival(tensor, work)


class _Chunk:
    """A run of blocks, with the embedding or the head, as a stage sees it."""

    def __init__(self, model: Transformer, config: Config, layout: PipelineLayout, index: int) -> None:
        layers = layout.layers[index]
        self.blocks = [model.layers[layer] for layer in layers]
        self.first, self.last = index == 0, index == layout.num_chunks - 1
        self.modules = layout.modules(index)
        # A backward in two parts would compute what is recomputed in both, so these blocks have it in one.
        count = num_with_recomputation(len(layers), config.model.checkpoint)
        self.modules_at_once = [f"layers.{layer}" for layer in layers[:count]]
        self.modules_later = [name for name in self.modules if name not in self.modules_at_once]
        at_once = [model.get_submodule(name) for name in self.modules_at_once]
        self.weights_at_once = [weight for module in at_once for weight in _trained(module)]
        # The embedding's part of the backward comes after the chunk's.
        later = {name: model.get_submodule(name) for name in self.modules_later if name != "embedding"}
        self.module_of = {weight: name for name, module in later.items() for weight in _trained(module)}
        if self.last and config.model.tie_word_embeddings:
            self.module_of |= dict.fromkeys(_trained(model.embedding), "head")
        self.weights_later = list(self.module_of)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@dataclass
class _Run:
    """A pass of some rows through the pipeline."""

    rows: Sequence[Batch]
    parts: list[Batch]  # of the rows, this rank's, on the device
    weights: Sequence[float]
    on_loss: OnLoss
    objective: Objective
    arrived: dict[Action, _Arrival] = field(default_factory=dict)  # by the action that receives it, here or elsewhere
    in_flight: dict[tuple[int, int], _InFlight] = field(default_factory=dict)  # by chunk and micro batch
