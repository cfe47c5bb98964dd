"""Draws the pipeline schedules, from the lists of actions that the stages carry out, into doc/schedules/*.svg.

    python tools/draw_schedules.py [--stages 4] [--micro_batches 8] [--output doc/schedules]

Time runs to the right; a row is a stage. A forward takes one unit of time per chunk of a model that has one chunk per
stage, a backward two, its two parts one each; a transfer takes none. Numbers are micro batches; the darker colour is a
stage's second chunk.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout, not installed

from internlm.parallel.pipeline_layout import PipelineLayout, build_layout
from internlm.parallel.timetable import Action, compute_table, input_of, output_of

SCHEDULES = ("1f1b", "interleaved", "zbv", "dualpipev")
COST = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
COLOURS = {  # first chunk, second chunk
    "F": ("#a9c8f0", "#5b8fd0"),
    "B": ("#b5dfae", "#6ab35f"),
    "I": ("#ffe08a", "#e5b52e"),
    "W": ("#f3b8a8", "#dc7d63"),
}
UNIT, ROW, LEFT, TOP = 22, 26, 58, 8  # pixels


class Span(NamedTuple):
    """An action, and when its stage is busy with it."""

    stage: int
    action: Action
    start: float
    stop: float


def spans(layout: PipelineLayout, num_micro_batches: int) -> list[Span]:
    """When everything happens if each action starts as soon as its stage is free and its input is there."""
    queues = [list(actions) for actions in compute_table(layout, num_micro_batches)]
    share = layout.num_stages / layout.num_chunks
    free, ready, found = [0.0] * layout.num_stages, {None: 0.0}, list[Span]()
    while any(queues):
        for stage, queue in enumerate(queues):
            while queue and input_of(queue[0], layout) in ready:
                action = queue.pop(0)
                start = max(free[stage], ready[input_of(action, layout)])
                free[stage] = start + COST[action.kind] * share
                found.append(Span(stage, action, start, free[stage]))
                output = output_of(action, layout)
                if output is not None:
                    ready[output] = free[stage]
    return found


def idle_share(found: Sequence[Span], num_stages: int) -> float:
    """Share of the stages' time from the first start to the last end in which they do nothing: the bubble."""
    total = num_stages * max(span.stop for span in found)
    return 1 - sum(span.stop - span.start for span in found) / total


def draw(layout: PipelineLayout, num_micro_batches: int) -> str:
    """The picture as SVG text."""
    found = spans(layout, num_micro_batches)
    end = max(span.stop for span in found)
    width, height = LEFT + end * UNIT + 8, TOP + ROW * layout.num_stages + 24
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height}" font-family="sans-serif" '
        'font-size="11" text-anchor="middle">',
        f'<rect width="{width:g}" height="{height}" fill="white"/>',
    ]
    for stage in range(layout.num_stages):
        lines.append(f'<text x="{LEFT / 2}" y="{TOP + ROW * stage + 17}">stage {stage}</text>')
    for stage, (kind, chunk, micro_batch), start, stop in found:
        x, y = LEFT + start * UNIT, TOP + ROW * stage
        colour = COLOURS[kind][layout.chunks_of(stage).index(chunk)]
        lines.append(
            f'<rect x="{x:g}" y="{y}" width="{(stop - start) * UNIT:g}" height="{ROW - 4}" fill="{colour}" '
            'stroke="white"/>'
        )
        lines.append(f'<text x="{x + (stop - start) * UNIT / 2:g}" y="{y + 15}">{micro_batch}</text>')
    kinds = {span.action.kind for span in found}
    names = {"F": "forward", "B": "backward", "I": "backward of the input", "W": "backward of the weights"}
    legend = ", ".join(f"{colour_name(kind)}: {names[kind]}" for kind in COST if kind in kinds)
    text = f"{layout.schedule}, {num_micro_batches} micro batches. {legend}. "
    text += f"Idle: {idle_share(found, layout.num_stages):.0%}"
    lines.append(f'<text x="8" y="{height - 8}" text-anchor="start">{text}</text>')
    return "\n".join([*lines, "</svg>", ""])


def colour_name(kind: str) -> str:
    return {"F": "blue", "B": "green", "I": "yellow", "W": "red"}[kind]


def picture(schedule: str, stages: int, num_micro_batches: int) -> str:
    """The picture of a schedule with the chunks per stage that are usual for it."""
    per_stage = 1 if schedule == "1f1b" else 2
    return draw(build_layout(schedule, stages, [1] * (stages * per_stage)), num_micro_batches)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4, help="stages of the pipeline (default %(default)s)")
    parser.add_argument("--micro_batches", type=int, default=8, help="micro batches of a step (default %(default)s)")
    folder = Path(__file__).resolve().parents[1] / "doc" / "schedules"
    parser.add_argument("--output", type=Path, default=folder, help="folder of the pictures (default doc/schedules)")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    for schedule in SCHEDULES:
        path = given.output / f"{schedule}.svg"
        path.write_text(picture(schedule, given.stages, given.micro_batches), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
