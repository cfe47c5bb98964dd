"""Exports load in transformers without remote code and compute the same; files are as they should be."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from internlm.checkpoint.hf import export_hf, parse_size
from internlm.checkpoint.hf_names import default_layout, entries, native_shapes, to_half_split, to_interleaved
from internlm.checkpoint.hf_target import ADAPTER_FILES
from internlm.data.chat_template import BUILT_IN
from internlm.utils.errors import UserError
from tests.checkpoint.hf_models import CASES, named, tiny_run
from tests.model.tiny import random_batch

LAYOUT_OF = {
    "INTERNLM": "llama",
    "INTERNLM2_PUBLIC": "llama",
    "LLAMA2": "llama",
    "QWEN2": "qwen2",
    "QWEN3": "qwen3",
    "MIXTRAL": "mixtral",
    "QWEN3_MOE": "qwen3_moe",
    "INTERNLM_MoE": "granitemoe",
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_transformers_computes_the_same_logits(case: str, tmp_path: Path) -> None:
    config, model = tiny_run(case)
    assert default_layout(config.model) == LAYOUT_OF[config.model_type]
    export_hf(named(model), config, tmp_path, max_shard="40KB")
    theirs, about = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"] and not about["mismatched_keys"]
    batch = random_batch((41,), config.model.vocab_size)
    torch.testing.assert_close(model(batch), theirs(batch.tokens[None]).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_config_json_says_what_transformers_reads(case: str, tmp_path: Path) -> None:
    config, model = tiny_run(case)
    export_hf(named(model), config, tmp_path)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == config.model.rope_base
    scaling = config.model.rope_scaling
    assert theirs.rope_parameters["rope_type"] == ("default" if scaling is None else scaling.type)
    assert theirs.rms_norm_eps == config.model.layer_norm_epsilon
    assert theirs.max_position_embeddings == config.model.max_position_embeddings
    assert theirs.head_dim == config.model.head_size
    assert theirs.dtype == torch.float32
    assert theirs.num_key_value_heads == config.model.num_kv_heads
    plain = json.loads((tmp_path / "config.json").read_text())
    assert plain["rope_theta"] == config.model.rope_base and plain["torch_dtype"] == "float32"  # for other engines
    GenerationConfig.from_pretrained(tmp_path)


def test_internlm_2023_names(tmp_path: Path) -> None:
    config, model = tiny_run("internlm")
    export_hf(named(model), config, tmp_path, arch="internlm", dtype="float16")
    assert (tmp_path / "modeling_internlm.py").exists() and (tmp_path / "configuration_internlm.py").exists()
    tensors = load_file(tmp_path / "model.safetensors")
    layer = {name.removeprefix("model.layers.1.") for name in tensors if name.startswith("model.layers.1.")}
    assert layer == {
        *(f"self_attn.{part}_proj.{kind}" for part in "qkvo" for kind in ("weight", "bias")),
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} < tensors.keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["model_type"] == "internlm" and about["bias"] is True
    assert about["rotary"] == {"base": 10000.0, "type": "origin"}
    assert about["auto_map"]["AutoModelForCausalLM"] == "modeling_internlm.InternLMForCausalLM"


def test_internlm2_names_keep_the_fused_projection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, model = tiny_run("internlm2")
    with caplog.at_level("WARNING", "internlm"):
        export_hf(named(model), config, tmp_path, arch="internlm2")
    assert "needs the published modeling_internlm2.py" in caplog.text
    tensors = load_file(tmp_path / "model.safetensors")
    attention = model.layers[1].attention
    head_dim, rows = 12, 2 * (2 + 2) * 12  # two key/value heads, each with two queries, a key and a value
    fused = tensors["model.layers.1.attention.wqkv.weight"]
    assert fused.shape == (rows, 48)
    assert torch.equal(fused[2 * head_dim : 3 * head_dim], attention.wqkv.weight[0, 2])  # key of the first group
    w13 = model.layers[0].feed_forward.w13.weight
    assert torch.equal(tensors["model.layers.0.feed_forward.w1.weight"], w13[0])
    assert torch.equal(tensors["model.layers.0.feed_forward.w3.weight"], w13[1])
    assert {"model.tok_embeddings.weight", "model.norm.weight", "output.weight"} < tensors.keys()


def test_interleaved_heads_become_even_then_odd() -> None:
    heads = torch.arange(8.0).repeat(2, 4, 1)[..., None].expand(2, 4, 8, 3)  # [kv_heads, G + 2, head_dim, hidden]
    moved = to_half_split("layers.0.attention.wqkv.weight", heads)
    assert moved[1, 0, :, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert moved[1, 2, :, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]  # the key
    assert moved[1, 3, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]  # the value
    assert torch.equal(to_interleaved("layers.0.attention.wqkv.weight", moved), heads)
    assert torch.equal(to_half_split("layers.0.attention.wo.weight", heads), heads)


def test_norm_head_is_exported_normalised(tmp_path: Path) -> None:
    config, model = tiny_run("norm_head_tied")
    export_hf(named(model), config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(tensors["lm_head.weight"].norm(dim=1), torch.ones(67))
    assert torch.equal(tensors["model.embed_tokens.weight"], model.embedding.weight)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False


def test_shards_stay_below_the_limit_and_the_index_finds_all(tmp_path: Path) -> None:
    config, model = tiny_run("llama2")
    export_hf(named(model), config, tmp_path, max_shard="30KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    found = {}
    for file in files:
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 30_000
        found.update(dict.fromkeys(tensors, file.name))
    assert found == index["weight_map"]
    assert index["metadata"]["total_size"] == 4 * sum(parameter.numel() for parameter in model.parameters())


def test_an_export_reads_each_parameter_once(tmp_path: Path) -> None:
    config, model = tiny_run("llama2")
    asked: list[str] = []

    def counted(name: str) -> torch.Tensor:
        asked.append(name)
        return named(model)(name)

    export_hf(counted, config, tmp_path, max_shard="30KB")  # q, k and v may land in different shards
    assert sorted(asked) == sorted(name for name, _ in model.named_parameters())


def test_every_parameter_has_an_entry() -> None:
    for case in CASES:
        config, model = tiny_run(case)
        shapes = native_shapes(config.model)
        parts = entries(default_layout(config.model), shapes)
        assert {part.native for part in parts} == set(shapes)
        numel = sum(torch.empty(part.shape, device="meta").numel() for part in parts)
        assert numel == sum(parameter.numel() for parameter in model.parameters())
        assert len({part.name for part in parts}) == len(parts)


@pytest.mark.parametrize(
    ("case", "layout", "message"),
    [
        ("qwen2", "llama", "qkv_bias=True, out_bias=False.*use the layout qwen2"),
        ("internlm", "qwen2", "out_bias=True.*use the layout llama"),
        ("qwen3", "llama", "qk_norm=True.*use the layout qwen3"),
        ("llama2", "qwen3", "qk_norm=False"),
        ("internlm2", "internlm", "num_kv_attention_heads=2"),
        ("llama2", "gpt2", "not known"),
    ],
)
def test_a_layout_without_room_for_the_model_is_refused(case: str, layout: str, message: str, tmp_path: Path) -> None:
    config, model = tiny_run(case)
    with pytest.raises(UserError, match=message):
        export_hf(named(model), config, tmp_path / "out", arch=layout)
    assert not (tmp_path / "out").exists()


def test_a_filled_target_is_kept_unless_forced(tmp_path: Path) -> None:
    config, model = tiny_run("llama2")
    export_hf(named(model), config, tmp_path, max_shard="30KB")
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match="not empty"):
        export_hf(named(model), config, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    export_hf(named(model), config, tmp_path, force=True)
    weights = {file.name for file in tmp_path.iterdir() if file.name.startswith("model")}
    assert weights == {"model.safetensors"}  # no shard of the earlier export is left
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_force_removes_all_that_an_export_writes_and_nothing_else(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """A tokenizer, remote code or an adapter of an earlier export would be loaded with the new one."""
    config, model = tiny_run("internlm", vocab_size=512)
    template = BUILT_IN["internlm2"]
    export_hf(named(model), config, tmp_path, "internlm", max_shard="30KB", tokenizer=tiny_tokenizer, template=template)
    for name in ADAPTER_FILES:
        (tmp_path / name).write_text("")
    assert len(list(tmp_path.iterdir())) > 10
    mine = {"notes.txt", "model-best.safetensors", "modeling_mine.py", "my_config.json"}
    for name in mine:
        (tmp_path / name).write_text("mine")
    export_hf(named(model), config, tmp_path, force=True)
    written = {"config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == mine | written


@pytest.mark.parametrize("missing", ["tokenizers", "sentencepiece.sentencepiece_model_pb2"])
def test_missing_packages_are_named_before_anything_is_written(
    missing: str, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model = tiny_run("internlm", vocab_size=512)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf'missing \({missing}\): pip install "internlm\[export\]"'):
        export_hf(named(model), config, tmp_path / "out", tokenizer=tiny_tokenizer)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_force_would_remove_is_refused(tiny_tokenizer: Path, tmp_path: Path) -> None:
    config, model = tiny_run("internlm", vocab_size=512)
    export_hf(named(model), config, tmp_path, tokenizer=tiny_tokenizer)
    for tokenizer in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(UserError, match="lies in the target folder"):
            export_hf(named(model), config, tmp_path, tokenizer=tokenizer, force=True)
        assert (tmp_path / "tokenizer.model").exists() and (tmp_path / "config.json").exists()


def test_a_value_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    config, model = tiny_run("llama2")
    with torch.no_grad():
        model.head.weight[3, 5] = 1e5
    with pytest.raises(UserError, match=r"lm_head\.weight holds 100000.*--dtype bfloat16"):
        export_hf(named(model), config, tmp_path, dtype="float16")
    assert not (tmp_path / "config.json").exists()  # nothing takes it for a whole export


def test_sizes() -> None:
    assert parse_size("10GB") == 10**10
    assert parse_size("1.5 MiB") == 3 * 2**19
    assert parse_size("123") == 123
    for wrong in ("10 apples", "GB", "", "-1GB", "0GB"):
        with pytest.raises(UserError, match="10GB"):
            parse_size(wrong)
