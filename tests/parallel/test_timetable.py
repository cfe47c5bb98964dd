"""The lists of actions: complete, free of deadlock, and with the bubbles that the papers give."""

import re
from collections import Counter
from fractions import Fraction
from itertools import product

import pytest

from internlm.parallel.pipeline_layout import PipelineLayout, balanced_split, build_layout, even_split, pipeline_layout
from internlm.parallel.timetable import compute_table, forward_table, with_transfers
from tests.parallel.oracle import make_config
from tools.draw_schedules import idle_share, picture, spans

CASES = [
    *product(["1f1b", "zbv"], [2, 3, 4], [4, 7, 8]),
    *product(["interleaved"], [2, 4], [4, 8]),
    ("interleaved", 4, 10),
    *product(["dualpipev"], [2, 4], [8, 9]),
]


def layout_of(schedule: str, stages: int, per_stage: int = 2) -> PipelineLayout:
    return build_layout(schedule, stages, [1] * stages * (1 if schedule == "1f1b" else per_stage))


@pytest.mark.parametrize(("schedule", "stages", "count"), CASES)
def test_every_chunk_does_every_micro_batch_once(schedule: str, stages: int, count: int) -> None:
    check_complete(layout_of(schedule, stages), count)


def check_complete(layout: PipelineLayout, count: int) -> None:
    for stage, actions in enumerate(compute_table(layout, count)):
        for chunk, micro_batch in product(layout.chunks_of(stage), range(count)):
            kinds = [action.kind for action in actions if action[1:] == (chunk, micro_batch)]
            assert kinds in (["F", "B"], ["F", "I", "W"])
        assert len({action[1:] for action in actions}) == count * len(layout.chunks_of(stage))


@pytest.mark.parametrize(("schedule", "stages", "count"), [*CASES, ("interleaved", 2, 0), ("zbv", 4, 0)])
def test_two_stages_list_their_transfers_in_one_order(schedule: str, stages: int, count: int) -> None:
    check_transfers(layout_of(schedule, stages), count)


def check_transfers(layout: PipelineLayout, count: int) -> None:
    """A stage does one transfer after the other with each neighbour, so both must mean the same one."""
    plan = with_transfers(compute_table(layout, count) if count else forward_table(layout), layout)
    between: dict[tuple[int, int], dict[int, list[tuple[str, int, int]]]] = {}
    for stage, actions in enumerate(plan):
        for action in actions:
            way, _, what = action.kind.partition(" ")
            if what:
                step = (1 if what == "activation" else -1) * (1 if way == "send" else -1)
                other = layout.stage_of[action.chunk + step]
                assert other != stage
                data = (what, action.chunk if way == "send" else action.chunk + step, action.micro_batch)
                between.setdefault((min(stage, other), max(stage, other)), {}).setdefault(stage, []).append(data)
    assert between
    for pair, lists in between.items():
        assert lists[pair[0]] == lists[pair[1]]


def test_1f1b_keeps_no_more_micro_batches_than_there_are_stages_behind() -> None:
    for stage, actions in enumerate(compute_table(layout_of("1f1b", 4), 12)):
        kept = [sum(1 if action.kind == "F" else -1 for action in actions[: end + 1]) for end in range(len(actions))]
        assert max(kept) == 4 - stage


def test_bubbles_are_those_of_the_papers() -> None:
    """1F1B idles (p - 1) / (m + p - 1) of the time, v chunks divide it by v; with split backward less is left."""

    def idle(schedule: str, stages: int, count: int, per_stage: int = 2) -> float:
        layout = layout_of(schedule, stages, per_stage)
        return idle_share(spans(layout, count), stages)

    for stages, count in ((2, 4), (4, 8), (4, 16), (8, 16)):
        assert idle("1f1b", stages, count) == pytest.approx(Fraction(stages - 1, count + stages - 1))
        for v in (2, 3):
            expected = Fraction(stages - 1, v * count + stages - 1)
            assert idle("interleaved", stages, count, v) == pytest.approx(expected)
            for schedule in ("zbv", "dualpipev"):
                assert idle(schedule, stages, count) < idle("interleaved", stages, count) / 2


def test_backward_is_split_where_somebody_waits() -> None:
    for schedule in ("zbv", "dualpipev"):
        actions = [action for stage in compute_table(layout_of(schedule, 4), 8) for action in stage]
        kinds = Counter(action.kind for action in actions)
        assert kinds["I"] == kinds["W"] > 0
        assert all(action.chunk > 0 for action in actions if action.kind == "W") or schedule == "dualpipev"


def test_even_split_is_that_of_2023() -> None:
    assert even_split(32, 4) == [8, 8, 8, 8]
    assert even_split(32, 3) == [10, 11, 11]
    assert even_split(60, 8, rounds=2) == [7, 7, 8, 8, 7, 7, 8, 8]


@pytest.mark.parametrize("head", [0.0, 0.4, 1.0, 2.7])
def test_balanced_split_has_the_fastest_slowest_chunk(head: float) -> None:
    for num_layers, num_chunks in ((4, 2), (7, 3), (10, 4), (9, 4)):
        split = balanced_split(num_layers, num_chunks, head)
        assert sum(split) == num_layers and min(split) > 0
        all_splits = product(range(1, num_layers), repeat=num_chunks)
        best = min(max(*s[:-1], s[-1] + head) for s in all_splits if sum(s) == num_layers)
        assert max(*split[:-1], split[-1] + head) == pytest.approx(best)


@pytest.mark.parametrize(
    ("vocab_size", "checkpoint", "blocks"), [(64, False, [4, 4]), (1792, False, [7, 1]), (1792, True, [6, 2])]
)
def test_a_split_by_flops_counts_the_head(vocab_size: int, checkpoint: bool, blocks: list[int]) -> None:
    """A block has 8,704 weights and attention over 32 tokens, the head 57,344 weights: about six blocks, but not five
    where each block has its forward twice."""
    model = {"num_layers": 8, "vocab_size": vocab_size, "checkpoint": checkpoint}
    config = make_config({"pipeline": {"size": 2, "split": "flops"}}, model=model)
    assert [len(layers) for layers in pipeline_layout(config).layers] == blocks


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv", "dualpipev"])
def test_pictures_are_up_to_date(schedule: str, repo_root) -> None:
    drawn = (repo_root / "doc" / "schedules" / f"{schedule}.svg").read_text(encoding="utf-8")
    assert drawn == picture(schedule, 4, 8), "run: python tools/draw_schedules.py"


def test_the_page_tells_how_long_stages_idle(repo_root) -> None:
    """The table of doc/parallelism.md, for 4 stages and 8 micro batches."""
    page = (repo_root / "doc" / "parallelism.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(\w+)` \| [^|]+ \| (\d+) %", page, re.MULTILINE)
    assert told == [
        (schedule, f"{100 * idle_share(spans(layout_of(schedule, 4), 8), 4):.0f}")
        for schedule in ("1f1b", "interleaved", "zbv", "dualpipev")
    ]
