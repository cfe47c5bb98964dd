"""What a pipeline needs of model and batch, told in numbers."""

import pytest

from internlm.config.checks import find_problems
from internlm.config.schema import Config
from tests.config.told import assert_told


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
        {"size": 1, "schedule": "1f1b", "split": "flops"},
        {"size": 2, "split": (5, 3)},
        {"size": 2, "split": [5, 3]},
        {"size": 2, "rampup_batch_size": "2 2 10"},
    ],
)
def test_what_fits_passes(small, keys):
    assert find_problems(pipeline(small, **keys), world_size=8) == []


CHUNKS = "chunks per stage"


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"size": 0}, ("parallel.pipeline.size", "= 0", "expected a number of ranks, 1 or more")),
        ({"size": 3}, ("pipeline 3 = 3 of `parallel`", "(8 = 2 * 3 + 2)", "multiple of 3 ranks, or lower a size")),
        (
            {"size": 1, "num_chunks": 2},
            ("model.num_chunks = 2", "size > 1, which is 1", "raise that, or set model.num_chunks = 1"),
        ),
        (
            {"size": 2, "schedule": "interleaved"},
            ('"interleaved" needs model.num_chunks', "> 1, which is 1", 'raise it, or set "1f1b"'),
        ),
        (
            {"size": 2, "schedule": "1f1b", "num_chunks": 2},
            ('parallel.pipeline.schedule = "1f1b"', "num_chunks = 2", 'set "interleaved", or num_chunks = 1'),
        ),
        (
            {"size": 2, "schedule": "zbv", "num_chunks": 4},
            ('parallel.pipeline.schedule = "zbv"', "model.num_chunks = 4", "set 2 or leave it out"),
        ),
        (
            {"size": 4, "num_layers": 3},
            ("model.num_layers = 3", f"size 4 * 1 {CHUNKS} = 4 chunks", "lower one of them"),
        ),
        (
            {"size": 4, "schedule": "zbv", "num_layers": 7},
            ("model.num_layers = 7", f"size 4 * 2 {CHUNKS} = 8 chunks", "lower one of them"),
        ),
        (
            {"size": 2, "num_chunks": 2, "num_layers": 7},
            ("model.num_chunks = 2", "(7 = 3 * 2 + 1)", 'set one of 1, 7, or parallel.pipeline.split = "flops"'),
        ),
        (
            {"size": 2, "split": (4, 3)},
            ("parallel.pipeline.split", "4 + 3 = 7 blocks", 'give numbers that add up to 8, or "even"'),
        ),
        (
            {"size": 2, "split": (4, 3, 1)},
            ("split has 3 numbers of blocks", f"size 2 * 1 {CHUNKS} = 2 chunks", 'give 2 numbers, or "even"'),
        ),
        ({"size": 4, "micro_num": 3}, ("data.micro_num = 3", "size = 4 stages needs 4", "set 4 or more")),
        (
            {"size": 4, "micro_num": 7, "schedule": "dualpipev"},
            ('data.micro_num = 7 micro batches, but "dualpipev"', "size = 4 stages needs 8", "set 8 or more"),
        ),
        (
            {"size": 4, "num_chunks": 2, "micro_num": 9},
            ("data.micro_num = 9", "size = 4 or more, and 9 = 2 * 4 + 1", "set 8 or 12"),
        ),
        (
            {"size": 4, "rampup_batch_size": "2 2 10"},
            ("'2 2 10' has steps of 2 micro batches", "size = 4 stages needs 4", "let it start with 4 or more"),
        ),
        (
            {"size": 4, "rampup_batch_size": "6 3 10", "num_chunks": 2, "micro_num": 12},
            ("'6 3 10' has steps of 9 micro batches", "9 = 2 * 4 + 1", "let START and INCR be multiples of 4"),
        ),
        (
            {"size": 1, "schedule": "zbv"},
            ("parallel.pipeline.schedule = zbv", "size > 1, which is 1", 'raise that, or set "auto"'),
        ),
        (
            {"size": 1, "split": (5, 3)},
            ("parallel.pipeline.split = (5, 3)", "size > 1, which is 1", 'raise that, or set "even"'),
        ),
    ],
)
def test_what_does_not_fit_is_told_in_numbers(small, keys, told):
    assert_told(find_problems(pipeline(small, **keys), world_size=8), told)
