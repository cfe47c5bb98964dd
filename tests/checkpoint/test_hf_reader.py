"""Hugging Face folders as native parameters: bit for bit there and back, and clear words where that can't be."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from internlm.checkpoint.hf import HFReader, export_hf
from internlm.checkpoint.hf_config import model_section
from internlm.config.rope_section import RopeScaling
from internlm.config.schema import ModelConfig
from internlm.model.transformer import Transformer
from internlm.utils.errors import UserError
from tests.checkpoint.hf_models import CASES, SMALL, named, tiny_run
from tests.checkpoint.test_pickles import Call
from tests.model.tiny import random_batch

PICKLE = "pytorch_model.bin"


@pytest.mark.parametrize("arch", [None, "own"])
@pytest.mark.parametrize("case", [case for case in CASES if "norm_head" not in case])
def test_export_then_import_is_bit_equal(case: str, arch: str | None, tmp_path: Path) -> None:
    config, model = tiny_run(case, dtype="torch.bfloat16")
    if arch == "own":
        arch = {
            "INTERNLM": "internlm",
            "INTERNLM2_PUBLIC": "internlm2",
            "LLAMA2": "internlm2" if config.model.rope_scaling is None else "internlm3",
            "QWEN2": "internlm3",
        }.get(config.model_type)
    export_hf(named(model), config, tmp_path, arch=arch, max_shard="20KB")
    reader = HFReader(tmp_path, config.model)
    for name, parameter in model.named_parameters():
        value = reader.read(name)
        assert value.dtype == torch.bfloat16
        exported = parameter.bfloat16()  # routers are fp32 here
        assert torch.equal(value.view(torch.int16), exported.view(torch.int16)), name
    assert reader.config_model()["dtype"] == "torch.bfloat16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("config_class", "model_class", "options", "model_type"),
    [
        (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}, "INTERNLM"),
        (
            LlamaConfig,
            LlamaForCausalLM,
            {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "LLAMA2",
        ),
        (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}, "QWEN2"),
        (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}, "QWEN3"),
        (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}, "MIXTRAL"),
        (
            GraniteMoeConfig,
            GraniteMoeForCausalLM,
            {"num_local_experts": 4, "attention_bias": True, "attention_multiplier": 12**-0.5},
            "INTERNLM_MoE",
        ),
        (
            Qwen3MoeConfig,
            Qwen3MoeForCausalLM,
            {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
            "QWEN3_MOE",
        ),
    ],
)
@torch.no_grad()
def test_import_of_what_transformers_saved_then_export_is_bit_equal(
    config_class: Any, model_class: Any, options: Any, model_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    theirs = model_class(config_class(**SMALL, **options)).to(dtype)
    for parameter in theirs.parameters():
        parameter.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "in")
    reader = HFReader(tmp_path / "in")
    assert reader.model_type == model_type
    section = reader.config_model()
    assert section["dtype"] == str(dtype)
    model = Transformer(ModelConfig(**section))
    for name, parameter in model.named_parameters():
        parameter.copy_(reader.read(name))
    if dtype == torch.float32:
        batch = random_batch((23,), 67)
        torch.testing.assert_close(model(batch), theirs(batch.tokens[None]).logits[0], atol=1e-5, rtol=1e-5)

    config, _ = tiny_run("llama2")
    config = config.model_copy(update={"model": ModelConfig(**section)})
    export_hf(named(model), config, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    config, model = tiny_run("internlm2")
    export_hf(named(model), config, tmp_path / "hf", max_shard="20KB")
    return tmp_path / "hf"


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    about = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in about.items() if value is not None}))


def test_another_model_is_refused_with_both_numbers(export: Path) -> None:
    config, _ = tiny_run("internlm2", num_layers=3, vocab_size=128)
    with pytest.raises(UserError) as error:
        HFReader(export, config.model)
    assert "model.num_layers is 3, the folder has 2" in str(error.value)
    assert "model.vocab_size is 128, the folder has 67" in str(error.value)


def test_a_longer_context_is_only_a_warning(export: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, _ = tiny_run("internlm2", rope_base=5e6, max_position_embeddings=4096)
    with caplog.at_level("WARNING", "internlm"):
        HFReader(export, config.model)
    assert "model.rope_base is 5000000.0" in caplog.text and "model.max_position_embeddings is 4096" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported; supported are llama"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"residual_multiplier": 0.5}, "residual_multiplier=0.5"),
        ({"model_type": "granitemoe"}, "attention_multiplier=missing"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"per_layer_config": {"1": {"intermediate_size": 40}}}, "per_layer_config="),
        ({"is_causal": False}, "is_causal=False"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters={'full_attention'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "much"}}, "rope_base = 'much'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling says .*2.0.* keep the right one"),
        ({"rotary": {"base": 10000, "type": "linear"}}, "rotary={'base': 10000, 'type': 'linear'}"),
        ({"model_type": "granitemoe", "attention_multiplier": 12**-0.5, "head_dim": 16}, "attention_multiplier=0.28"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 8.0, "short_factor": [1.0]}},
            "of type 'longrope' is not",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "mrope"}}, "of type 'mrope' is not supported"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2, "finetuned": True}}, "finetuned"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 0.5}}, "factor Input should be"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"vocab_size": None}, "vocab_size missing"),
        ({"vocab_size": "67"}, "vocab_size='67'; these are positive whole numbers"),
        ({"num_attention_heads": 0}, "num_attention_heads=0; these are positive"),
        ({"head_dim": "12"}, "head_dim = '12': Input should be a valid integer"),
        ({"rope_parameters": "llama3"}, "rope_parameters='llama3' is no object"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 is not divisible by num_key_value_heads=2"),
        ({"attention_bias": True}, "lacks model.layers.0.self_attn.k_proj.bias"),
        ({"num_hidden_layers": 1}, "does not explain: model.layers.1"),
        ({"hidden_size": 32}, r"is \[67, 48\], by config.json it should be \[67, 32\]"),
    ],
)
def test_what_we_cannot_compute_is_refused(export: Path, changes: dict[str, Any], message: str) -> None:
    edit(export / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        HFReader(export).read("embedding.weight")


FAMILIES = (LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig, MixtralConfig, GraniteMoeConfig)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_left_out_means_what_it_means_to_transformers(family: Any) -> None:
    least = {"vocab_size": 67, "hidden_size": 256, "intermediate_size": 80, "num_hidden_layers": 2}
    least |= {"num_attention_heads": 64, **({"attention_multiplier": 0.5} if family is GraniteMoeConfig else {})}
    whole = json.loads(family(**least).to_json_string(use_diff=False))
    assert model_section({**least, "model_type": family.model_type}, "config.json") == model_section(
        whole, "config.json"
    )


@pytest.mark.parametrize(
    ("old", "base"),
    [
        ({"rope_parameters": None, "rope_theta": 3e4}, 3e4),  # transformers 4
        ({"rope_parameters": None, "rope_theta": 3e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 3e4),
        ({"rope_parameters": None, "rope_theta": None, "rotary": {"base": 2e4, "type": "dynamic"}}, 2e4),  # 2023
        ({"rope_parameters": None, "rope_theta": None}, 1e4),
    ],
)
def test_rotary_base_is_found_wherever_it_was_kept(export: Path, old: dict[str, Any], base: float) -> None:
    edit(export / "config.json", **old)
    assert HFReader(export).config_model()["rope_base"] == base


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, {"type": "dynamic", "factor": 2.0}),
        ({"rotary": {"base": 2e4, "type": "dynamic"}}, {"type": "dynamic", "factor": 1.0}),  # InternLM, 2023
        ({"rotary": {"base": 2e4, "type": "origin"}}, None),
        ({"model_type": "internlm", "rotary": {"base": 2e4}}, {"type": "dynamic", "factor": 1.0}),
        ({"model_type": "internlm"}, {"type": "dynamic", "factor": 1.0}),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 64},
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 32}},
            {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rotary_scaling_is_read(export: Path, old: dict[str, Any], expected: dict[str, Any] | None) -> None:
    edit(export / "config.json", rope_parameters=None, **old)
    file = export / "config.json"
    scaling = model_section(json.loads(file.read_text()), str(file))["rope_scaling"]
    assert scaling == (expected and RopeScaling.model_validate(expected).model_dump())


@pytest.mark.parametrize("is_sharded", [False, True])
def test_pickles_of_2023_are_read_and_not_run(export: Path, is_sharded: bool, tmp_path: Path) -> None:
    before = HFReader(export)
    expected = {name: before.read(name) for name in ("head.weight", "layers.1.attention.wqkv.weight")}
    weight_map = json.loads((export / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {key: load_file(export / file)[key] for key, file in weight_map.items()}
    for file in export.glob("model*"):
        file.unlink()
    weight_map = {key: f"pytorch_{file}.bin" if is_sharded else PICKLE for key, file in weight_map.items()}
    for name in set(weight_map.values()):
        torch.save({key: value for key, value in tensors.items() if weight_map[key] == name}, export / name)
    if is_sharded:
        (export / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    reader = HFReader(export)
    assert all(torch.equal(reader.read(name), value) for name, value in expected.items())

    file = export / weight_map["lm_head.weight"]
    for content, message in (
        ({"x": Call(os.system, f"touch {tmp_path / 'mark'}")}, "nothing of it was run"),
        ([torch.ones(1)], "holds a list"),
        ({"lm_head.weight": 3}, "holds 'lm_head.weight': a int"),
    ):
        torch.save(content, file)
        with pytest.raises(UserError, match=f"{file.name}.*{message}"):
            HFReader(export).read("head.weight")
    assert not (tmp_path / "mark").exists()
    file.unlink()
    (export / "consolidated.00.pth").touch()
    with pytest.raises(UserError, match=f"{file.name} is missing" if is_sharded else "convert them with it"):
        HFReader(export)


def test_a_missing_shard_and_a_missing_tensor_are_named(export: Path) -> None:
    weight_map = json.loads((export / "model.safetensors.index.json").read_text())["weight_map"]
    last = export / weight_map["lm_head.weight"]
    save_file({"something": torch.zeros(1)}, last)
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        HFReader(export).read("head.weight")
    last.unlink()
    with pytest.raises(UserError, match=f"{last.name} is missing"):
        HFReader(export).read("head.weight")


def test_a_truncated_shard_is_named(export: Path) -> None:
    weight_map = json.loads((export / "model.safetensors.index.json").read_text())["weight_map"]
    last = export / weight_map["lm_head.weight"]
    data = last.read_bytes()
    last.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"{last.name}.*lm_head"):
        HFReader(export).read("head.weight")
    last.write_bytes(data[:20])
    with pytest.raises(UserError, match=f"{last.name} is damaged"):
        HFReader(export).read("head.weight")


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    config, model = tiny_run("internlm_tied")
    export_hf(named(model), config, tmp_path / "hf")
    return tmp_path / "hf"


def add_tensors(file: Path, **tensors: torch.Tensor) -> None:
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})


def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(tied: Path) -> None:
    """transformers computes with such a head, whatever config.json says."""
    file = tied / "model.safetensors"
    embedding = load_file(file)["model.embed_tokens.weight"]
    add_tensors(file, **{"lm_head.weight": embedding.clone()})
    assert torch.equal(HFReader(tied).read("embedding.weight"), embedding)
    head = embedding.clone()
    head[66, 47] += 1
    add_tensors(file, **{"lm_head.weight": head})
    theirs = LlamaForCausalLM.from_pretrained(tied)
    assert torch.equal(theirs.lm_head.weight, head) and torch.equal(theirs.model.embed_tokens.weight, embedding)
    with pytest.raises(UserError, match=r"lm_head\.weight is not the embedding.*set tie_word_embeddings to false"):
        HFReader(tied).read("embedding.weight")


@pytest.mark.parametrize("extra", ["model.layers.0.self_attn.output.weight", "output.weight", "v_head.lm_head.weight"])
def test_an_extra_tensor_is_named(tied: Path, extra: str) -> None:
    add_tensors(tied / "model.safetensors", **{extra: torch.ones(2)})
    with pytest.raises(UserError, match=f"config.json does not explain: {extra}"):
        HFReader(tied)


def test_what_only_training_would_do_is_a_warning(export: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(export / "config.json", attention_dropout=0.1, router_jitter_noise=0.0)
    with caplog.at_level("WARNING", "internlm"):
        HFReader(export)
    assert "attention_dropout=0.1: training here goes without" in caplog.text


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "has no weight_map"),
        ("[]", "holds no JSON object"),
        ('{"weight_map": {"lm_head.weight": "../model.safetensors"}}', "which is not in the folder"),
    ],
)
def test_a_wrong_index_is_named(export: Path, index: str, message: str) -> None:
    (export / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message):
        HFReader(export)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        HFReader(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        HFReader(tmp_path)
