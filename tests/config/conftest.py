from typing import Any

import pytest


@pytest.fixture
def small() -> dict[str, Any]:
    """The least that a config must say."""
    return {
        "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128},
        "data": {"type": "synthetic", "seq_len": 32, "total_steps": 10},
    }
