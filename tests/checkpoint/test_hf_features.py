"""Whatever a config.json says, an import computes what transformers computes, or is refused; nothing is passed over."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from internlm.checkpoint.hf import HFReader
from internlm.config.schema import ModelConfig
from internlm.model.transformer import Transformer
from internlm.utils.errors import UserError
from tests.checkpoint.hf_models import SMALL
from tests.model.tiny import random_batch

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
    "granitemoe": {"num_local_experts": 4, "attention_multiplier": 12**-0.5},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 4}
FEATURES: list[dict[str, Any]] = [
    {},
    *({key: True} for key in ("attention_bias", "mlp_bias", "bias", "qkv_bias", "tie_word_embeddings", "qk_layernorm")),
    *({"head_dim": 16, **more} for more in ({}, {"attention_multiplier": 12**-0.5}, {"attention_multiplier": 0.25})),
    *({"num_key_value_heads": heads} for heads in (1, 4)),
    *({"hidden_act": "gelu"}, {"rms_norm_eps": 1e-2}, {"is_causal": False}, {"partial_rotary_factor": 0.5}),
    *(SLIDING, {**SLIDING, "max_window_layers": 1}, {"sliding_window": 4}),
    {"layer_types": ["full_attention", "sliding_attention"], **SLIDING},
    *({"rope_parameters": {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}} for kind in ("linear", "dynamic")),
    *({"rope_parameters": {**YARN, **more}} for more in ({}, {"truncate": False}, {"attention_factor": 1.7})),
    *({"rope_parameters": {**YARN, **more}} for more in ({"mscale": 0.7, "mscale_all_dim": 1.3}, {"beta_fast": 16})),
    *({"rope_parameters": LLAMA3}, {"rope_theta": 500.0}),
    {"rope_parameters": {"rope_type": "longrope", "factor": 8.0, "short_factor": [1.5] * 6, "long_factor": [2.0] * 6}},
    {"rope_parameters": {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5}},
    *({"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}, {"norm_topk_prob": True}, {"num_experts_per_tok": 1}),
    *({"num_local_experts": 6}, {"num_experts": 8}, {"moe_intermediate_size": 24}),
    *({key: 0.5} for key in ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")),
]
# Keys that are put into config.json as people do it, beside what transformers wrote.
EDITS: list[dict[str, Any]] = [
    {"rope_scaling": {"type": "linear", "factor": 3.0}},
    {"rope_theta": 99.0},  # passed over by transformers, too
    {"rope_parameters": {"rope_theta": 99.0, "type": "linear", "factor": 2.0}},
    {"original_max_position_embeddings": 8, "rope_parameters": YARN},
]
BATCH = random_batch((41,), 67)


def imported(folder: Path) -> torch.Tensor | None:
    """Our logits; None: refused."""
    try:
        reader = HFReader(folder)
        model = Transformer(ModelConfig(**reader.config_model()))
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name))
    except UserError:
        return None
    return model(BATCH)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_feature_is_computed_or_refused(family: str, tmp_path: Path) -> None:
    verdicts = []
    for number, (feature, edit) in enumerate([*((one, {}) for one in FEATURES), *(({}, one) for one in EDITS)]):
        folder = tmp_path / str(number)
        torch.manual_seed(1)
        try:
            config = AutoConfig.for_model(
                family, **copy.deepcopy({**SMALL, "max_position_embeddings": 16, **FAMILIES[family], **feature})
            )
            theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            for parameter in theirs.parameters():
                parameter.normal_(0, 0.2)
            theirs.save_pretrained(folder)
            if edit:
                file = folder / "config.json"
                file.write_text(json.dumps({**json.loads(file.read_text()), **edit}))
                theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
            expected = theirs(BATCH.tokens[None]).logits[0]
        except (
            StrictDataclassError,
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            RuntimeError,
        ):  # nothing that this family could be
            continue
        found = imported(folder)
        verdicts.append(found is None)
        if found is not None:
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=f"{family} with {feature or edit}")
    assert verdicts[0] is False and verdicts.count(False) > 15 and verdicts.count(True) > 8
