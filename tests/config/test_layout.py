"""Layouts that can't be: tensor ranks, the world, and combinations, each refused with key, numbers and fix.

Rows of a packed row's parts are in test_checks.py, those of pipelines in test_pipeline_checks.py, those of experts
alone in tests/parallel/test_expert.py.
"""

from typing import Any

import pytest

from internlm.config.checks import ConfigError, find_problems
from internlm.config.loader import load_config
from internlm.config.schema import Config
from tests.config.told import Told, assert_told

Sections = dict[str, Any]
MOE: Sections = {"num_experts": 6, "moe": {"top_k": 2}}


@pytest.mark.parametrize(
    ("parallel", "model", "ranks", "told"),
    [
        (
            {"tensor": {"size": 3}},
            {},
            6,
            ("model.num_kv_attention_heads = 4", "(4 = 1 * 3 + 1)", "Set parallel.tensor.size to one of 1, 2, 4"),
        ),
        (
            {"tensor": {"size": 8}},
            {},
            8,
            ("model.num_kv_attention_heads = 4", "(4 = 0 * 8 + 4)", "Set parallel.tensor.size to one of 1, 2, 4"),
        ),
        (
            {"tensor": {"size": 4}},
            {"num_kv_attention_heads": 2},
            4,
            ("model.num_kv_attention_heads = 2", "(2 = 0 * 4 + 2)", "Set parallel.tensor.size to one of 1, 2"),
        ),
        (
            {"tensor": {"size": 4}},
            {"intermediate_size": 90},
            4,
            ("model.intermediate_size = 90", "(90 = 22 * 4 + 2)", "to one of 1, 2, 3, 5, 6, 9, 10, 15, 18, 30, 45, 90"),
        ),
        (
            {"tensor": {"size": 4}},
            {"vocab_size": 130},
            4,
            ("model.vocab_size = 130", "(130 = 32 * 4 + 2)", "to one of 1, 2, 5, 10, 13, 26, 65, 130"),
        ),
        (
            {"tensor": {"size": 4, "mode": "msp"}, "context": {"ring": 2, "ulysses": 8}},
            {"num_attention_heads": 32, "num_kv_attention_heads": 4},
            64,
            ("tokens of a row on one rank = 2", "(2 = 0 * 4 + 2)", 'Set data.seq_len to 128, or mode to "mtp"'),
        ),
        (
            {"tensor": {"size": 2}},
            {},
            3,
            ("tensor 2 = 2 of `parallel`", "(3 = 1 * 2 + 1)", "start a multiple of 2 ranks, or lower a size"),
        ),
        (
            {"tensor": {"size": 2}, "context": {"ring": 2, "ulysses": 2}},
            {},
            12,
            ("ring 2 * ulysses 2 * tensor 2 = 8", "(12 = 1 * 8 + 4)", "start a multiple of 8 ranks, or lower a size"),
        ),
        (
            {"tensor": {"size": 2}, "zero1": {"size": 8}},
            {},
            8,
            ("parallel.zero1.size = 8", "(world 8 / tensor 2 / pipeline 1) = 4 (4 = 0 * 8 + 4)", "to one of 1, 2, 4"),
        ),
        (
            {"tensor": {"size": 4, "mode": "isp"}, "weight": {"size": 3}, "zero1": {"size": 3}},
            {},
            8,
            ("parallel.zero1.size = 3", "= 8 (8 = 2 * 3 + 2)", "Set parallel.zero1.size to one of 1, 2, 4, 8"),
        ),
        ({"expert": {"size": 2}}, {}, 4, ("parallel.expert.size = 2", "model.num_experts = 1", "set it to 1")),
        (
            {"expert": {"size": 4}},
            MOE,
            8,
            ("model.num_experts = 6", "(6 = 1 * 4 + 2)", "Set parallel.expert.size to one of 1, 2, 3, 6"),
        ),
        (
            {"expert": {"size": 3}, "tensor": {"size": 2}},
            MOE,
            8,
            ("parallel.expert.size = 3", "(8 / pipeline 1) = 8", "Set it to one of 1, 2"),
        ),
        (
            {"tensor": {"size": 4}, "expert": {"size": 2}},
            {**MOE, "moe": {"top_k": 2, "num_shared_experts": 1, "intermediate_size": 30}},
            4,
            ("width of shared experts = 30", "(30 = 7 * 4 + 2)", "to one of 1, 2, 3, 5, 6, 10, 15, 30"),
        ),
        ({"tensor": {"size": 2}}, {"fp8": True}, 8, ("model.fp8 = True", "parallel.tensor.size = 2", "turn one off")),
        (
            {"tensor": {"size": -1}},
            {},
            8,
            ("parallel.tensor.size", "= -1", "expected a number of ranks, 1 or more"),
        ),
        (
            {"tensor": {"size": 0, "mode": "isp"}},
            MOE,
            8,
            ("parallel.tensor.size", "= 0", "expected a number of ranks, 1 or more"),
        ),
        (
            {"context": {"ring": 2}},
            {"attn_backend": "flash"},
            8,
            ('model.attn_backend = "flash"', "parallel.context.ring = 2", "cut rows by parallel.context.ulysses"),
        ),
    ],
)
def test_refused_with_numbers(small: Sections, parallel: Sections, model: Sections, ranks: int, told: Told) -> None:
    config = Config.model_validate({**small, "model": {**small["model"], **model}, "parallel": parallel})
    problems = find_problems(config, ranks)
    assert_told(problems, told)


def test_all_problems_of_a_layout_come_at_once(small: Sections) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(small, ["parallel.tensor.size=3", "parallel.zero1.size=5", "model.vocab_size=130"], world_size=8)
    assert len(caught.value.problems) == 4, caught.value.problems  # heads, feed-forward, vocabulary, ranks
