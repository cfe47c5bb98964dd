"""Who computes what when: the action lists of every pipeline schedule, and where data travels between them.

The orders of `interleaved` (Narayanan et al., 2021), `zbv` (zero bubble, Qi et al., 2023) and `dualpipev` (DeepSeek-AI,
2024, cut in half) are those of `torch.distributed.pipelining`. Only its lists are used, not its runtime, which

* gives weight gradients to a chunk in bulk, past the parameters' hooks: nothing could be reduced during backward;
* keeps a receive buffer per micro batch of the step, and all that was sent until the step's end;
* runs the model once more to learn shapes, although the row gives them.

Its own list for `1f1b` (torch 2.13) leaves out micro batch 0 on the last stage, so that one is made here.
"""

from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from internlm.parallel.pipeline_layout import PipelineLayout

BACKWARD = ("B", "I")


class Action(NamedTuple):
    """One step of a stage.

    kind: F forward; B backward; or backward in two parts, I of the input and W of the weights; "send activation" of
    `chunk` to the next one, "send gradient" to the one before; "receive activation" and "receive gradient" for `chunk`.
    """

    kind: str
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind} chunk {self.chunk} micro batch {self.micro_batch}"


Table = list[list[Action]]  # by stage


def compute_table(layout: PipelineLayout, num_micro_batches: int) -> Table:
    """What each stage computes, in order, in a step of `num_micro_batches`."""
    if layout.schedule == "1f1b":
        return [_one_forward_one_backward(layout, stage, num_micro_batches) for stage in range(layout.num_stages)]
    order = _torch_schedule(layout, num_micro_batches).pipeline_order
    return [_merged([a for slot in order[stage] for a in _parsed(slot)]) for stage in range(layout.num_stages)]


def forward_table(layout: PipelineLayout) -> Table:
    """One row through all chunks, forward only."""
    return [[Action("F", chunk, 0) for chunk in layout.chunks_of(stage)] for stage in range(layout.num_stages)]


def _one_forward_one_backward(layout: PipelineLayout, stage: int, count: int) -> list[Action]:
    """As many forwards as there are stages behind, then one forward, one backward in turns (PipeDream-Flush)."""
    ahead = min(layout.num_stages - 1 - stage, count)
    forwards = [Action("F", stage, index) for index in range(count)]
    backwards = [Action("B", stage, index) for index in range(count)]
    turns = [action for pair in zip(forwards[ahead:], backwards, strict=False) for action in pair]
    return forwards[:ahead] + turns + backwards[count - ahead :]


def _torch_schedule(layout: PipelineLayout, num_micro_batches: int) -> Any:
    """torch's schedule, made for the sake of its `pipeline_order`; the stages are no more than their numbers."""
    # Here, as it takes as long to import as torch itself, and few runs have a pipeline.
    from torch.distributed.pipelining import ScheduleDualPipeV, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

    kinds: dict[str, Any] = {
        "interleaved": ScheduleInterleaved1F1B,
        "zbv": ScheduleZBVZeroBubble,
        "dualpipev": ScheduleDualPipeV,
    }
    stages = [
        SimpleNamespace(
            stage_index=chunk,
            num_stages=layout.num_chunks,
            group_size=layout.num_stages,
            group_rank=0,
            has_backward=False,
            submod=None,
        )
        for chunk in layout.chunks_of(0)
    ]
    return kinds[layout.schedule](stages, num_micro_batches)


def _parsed(slot: Any) -> list[Action]:
    """torch's action as ours. A forward and a backward that overlap on a device come one after the other."""
    if slot is None:
        return []
    if slot.sub_actions is not None:
        return [action for inner in slot.sub_actions for action in _parsed(inner)]
    return [Action(slot.computation_type.value, slot.stage_index, slot.microbatch_index)]


def _merged(actions: Sequence[Action]) -> list[Action]:
    """On the first chunk no stage waits for the input's gradient, and one backward is cheaper than two."""
    merged: list[Action] = []
    for action in actions:
        if action.kind == "W" and action.chunk == 0 and merged and merged[-1] == action._replace(kind="I"):
            merged[-1] = action._replace(kind="B")
        else:
            merged.append(action)
    return merged


def with_transfers(table: Table, layout: PipelineLayout) -> Table:
    """Adds sends and receives between stages.

    The stages run in lockstep here, and both ends of a transfer are noted when its data is made. So any two stages list
    their transfers in the same order, as NCCL needs them, and no two sends wait for each other.
    """
    plan: Table = [[] for _ in table]
    queues = [deque(actions) for actions in table]
    arrived: list[set[Action | None]] = [{None} for _ in table]
    while any(queues):
        progress = False
        for stage, queue in enumerate(queues):
            if not queue or input_of(queue[0], layout) not in arrived[stage]:
                continue
            action = queue.popleft()
            plan[stage].append(action)
            progress = True
            receive = output_of(action, layout)
            if receive is not None:
                target = layout.stage_of[receive.chunk]
                arrived[target].add(receive)
                if target != stage:
                    plan[stage].append(Action("send" + receive.kind.removeprefix("receive"), *action[1:]))
                    plan[target].append(receive)
        assert progress, f"the stages wait for one another: {[queue[0] for queue in queues if queue]}"
    return plan


def input_of(action: Action, layout: PipelineLayout) -> Action | None:
    """The receive that must come before an action."""
    if action.kind == "F" and action.chunk > 0:
        return action._replace(kind="receive activation")
    if action.kind in BACKWARD and action.chunk < layout.num_chunks - 1:
        return action._replace(kind="receive gradient")
    return None


def output_of(action: Action, layout: PipelineLayout) -> Action | None:
    """The receive, on the stage of a neighbouring chunk, of what an action makes or sends."""
    _, chunk, micro_batch = action
    if action.kind in ("F", "send activation") and chunk < layout.num_chunks - 1:
        return Action("receive activation", chunk + 1, micro_batch)
    if action.kind in (*BACKWARD, "send gradient") and chunk > 0:
        return Action("receive gradient", chunk - 1, micro_batch)
    return None
