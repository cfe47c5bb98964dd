"""What a pipeline needs of model and batch, told in numbers."""

import pytest

from internlm.config.checks import find_problems
from internlm.config.schema import Config


def pipeline(small, size, schedule="auto", split="even", num_layers=8, num_chunks=1, micro_num=8, **data):
    return Config.model_validate(
        {
            **small,
            "model": {**small["model"], "num_layers": num_layers, "num_chunks": num_chunks},
            "data": {**small["data"], "micro_num": micro_num, **data},
            "parallel": {"pipeline": {"size": size, "schedule": schedule, "split": split}},
        }
    )


@pytest.mark.parametrize(
    "keys",
    [
        {"size": 4},
        {"size": 4, "num_chunks": 2},
        {"size": 4, "num_chunks": 2, "micro_num": 10},  # two rounds of five
        {"size": 4, "schedule": "zbv", "num_chunks": 2},
        {"size": 4, "schedule": "dualpipev"},
        {"size": 2, "split": (5, 3)},
        {"size": 2, "split": [5, 3]},
        {"size": 2, "rampup_batch_size": "2 2 10"},
    ],
)
def test_what_fits_passes(small, keys):
    assert find_problems(pipeline(small, **keys), world_size=8) == []


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"size": 0}, "parallel.pipeline.size = 0: expected a number of ranks"),
        ({"size": 3}, "8 ranks do not divide by pipeline 3"),
        ({"size": 1, "num_chunks": 2}, "model.num_chunks = 2 needs parallel.pipeline.size > 1"),
        ({"size": 2, "schedule": "interleaved"}, '"interleaved" needs model.num_chunks > 1, which is 1'),
        ({"size": 2, "schedule": "1f1b", "num_chunks": 2}, "has one chunk per stage, but model.num_chunks = 2"),
        ({"size": 2, "schedule": "zbv", "num_chunks": 4}, "has two chunks per stage, but model.num_chunks = 4"),
        ({"size": 4, "num_layers": 3}, "model.num_layers = 3 is less than a block for each of"),
        ({"size": 4, "schedule": "zbv", "num_layers": 7}, "size 4 * 2 chunks per stage = 8 chunks"),
        ({"size": 2, "num_chunks": 2, "num_layers": 7}, "model.num_chunks = 2 (7 = 3 * 2 + 1)"),
        ({"size": 2, "split": (4, 3)}, "split = 4 + 3 = 7 blocks, but model.num_layers = 8"),
        ({"size": 2, "split": (4, 3, 1)}, "split has 3 numbers of blocks, for parallel.pipeline.size 2 * 1"),
        ({"size": 4, "micro_num": 3}, "data.micro_num = 3 micro batches are fewer than 4"),
        ({"size": 4, "micro_num": 7, "schedule": "dualpipev"}, "data.micro_num = 7 micro batches are fewer than 8"),
        ({"size": 4, "num_chunks": 2, "micro_num": 9}, "9 = 4 * 2 + 1); the next that do: 8, 12"),
        ({"size": 4, "rampup_batch_size": "2 2 10"}, "rampup_batch_size = '2 2 10' has steps of 2 micro batches"),
    ],
)
def test_what_does_not_fit_is_told_in_numbers(small, keys, expected):
    problems = find_problems(pipeline(small, **keys), world_size=8)
    assert any(expected in problem for problem in problems), problems
