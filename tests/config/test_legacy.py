"""Config files of 2023 and 2024 load unchanged; what cannot be honoured is refused."""

import copy
import logging
from pathlib import Path

import pytest

from internlm.config.checks import ConfigError
from internlm.config.legacy import TABLE
from internlm.config.loader import load_config

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = Path(__file__).parent / "files" / "published_2023.py"


@pytest.fixture
def paths(tmp_path) -> list[str]:
    return [f"data.train_folder={tmp_path}", f"data.valid_folder={tmp_path}"]


def test_the_published_7b_file_loads_with_data_paths_overridden(paths, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = load_config(PUBLISHED, paths)
    new = load_config(ROOT / "configs" / "7B_sft.py", paths)
    for section in ("model", "adam", "beta2_scheduler", "grad_scaler", "loss", "parallel", "hybrid_zero_optimizer"):
        expected = getattr(new, section).model_dump()
        found = getattr(old, section).model_dump()
        if section == "beta2_scheduler":
            expected["init_beta2"] = 0.95
        assert found == expected, section
    assert old.model.ffn_size == 11008
    assert old.model.qkv_bias and old.model.out_bias and old.model.init == "internlm"
    assert old.parallel.zero1.size == 8
    assert old.ckpt.save_ckpt_folder == "llm_ckpts"
    assert old.ckpt.load_ckpt_info is None
    assert old.lr_scheduler.eta_min == 1e-5


def test_sizes_of_the_published_file_can_be_overridden(paths):
    sizes = ["model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4", "parallel.zero1=1"]
    config = load_config(PUBLISHED, [*paths, *sizes, "data.total_steps=20", "parallel.pipeline=1"])
    assert (config.model.num_layers, config.parallel.zero1.size, config.data.total_steps) == (2, 1, 20)


def test_each_old_key_is_logged_once(paths, caplog):
    with caplog.at_level(logging.INFO, logger="internlm"):
        load_config(PUBLISHED, [*paths, "JOB_NAME=logged"])
        load_config(PUBLISHED, [*paths, "JOB_NAME=logged"])
    lines = [line for line in caplog.messages if "reduce_bucket_size" in line]
    assert len(lines) <= 1  # 0 when another test of this process has logged it
    assert len(caplog.messages) == len(set(caplog.messages))


def change(config: dict, key: str, value) -> dict:
    config = copy.deepcopy(config)
    section = config
    *parents, last = key.split(".")
    for name in parents:
        section = section.setdefault(name, {})
    section[last] = value
    return config


HERE = str(Path(__file__).parent)


@pytest.mark.parametrize(
    ("key", "value", "new_key", "expected"),
    [
        ("parallel.zero1", 8, "parallel.zero1.size", 8),
        ("parallel.zero1", -3, "parallel.zero1.size", -1),
        ("parallel.zero1", {"size": 4, "fsdp": False}, "parallel.weight.size", 1),
        ("parallel.zero1", {"size": 4, "fsdp": True}, "parallel.weight.size", 4),
        ("parallel.zero1", {"size": 4, "fsdp": True}, "parallel.gradient.size", 4),
        ("parallel.zero1", {"size": 4, "fsdp": True}, "parallel.zero1.size", 4),
        ("parallel", {"zero1": {"size": 4, "fsdp": True}, "weight": {"size": 1}}, "parallel.weight.size", 4),
        ("beta2_scheduler", {"init_beta2": 0.9, "cur_iter": -1}, "beta2_scheduler.c", 0.8),
        ("beta2_scheduler", {"init_beta2": 0.9}, "beta2_scheduler.c", 0.0),
        ("parallel.weight", {"size": 2, "overlap": True, "memory_pool": True}, "parallel.gradient.size", 2),
        ("model.no_bias", True, "model.qkv_bias", False),
        ("model.no_bias", False, "model.out_bias", True),
        ("model.adapt_hf", False, "model.qk_interleaved", True),
        ("model.use_dynamic_ntk_rope", True, "model.rope_scaling.type", "dynamic"),
        ("model.use_dynamic_ntk_rope", False, "model.rope_scaling", None),
        ("model.dtype", "torch.half", "model.dtype", "torch.float16"),
        ("model.dtype", "torch.half", "hybrid_zero_optimizer.master", "fp32"),
        ("model.checkpoint", 1, "model.checkpoint", 1.0),
        ("model_type", "INTERNLM2", "model_type", "INTERNLM2_PUBLIC"),
        ("model.moe_gate_k", 1, "model.moe.top_k", 1),
        ("model.moe_drop_tokens", False, "model.moe.capacity_factor", None),
        ("model.moe_type", "MegaBlock-D", "model.moe.capacity_factor", None),
        ("model.moe_use_residual", True, "model.moe.num_shared_experts", 1),
        ("model.moe_use_residual", False, "model.moe.mix_shared", False),
        ("model.moe_use_rts", True, "loss.moe_loss_coeff", 1.0),
        ("moe", {"top_k": 1, "capacity_factor": 1.5, "min_capacity": 8, "use_rts": True}, "model.moe.min_capacity", 8),
        ("moe", {"top_k": 1, "capacity_factor": 1.5, "drop_tokens": False}, "model.moe.capacity_factor", None),
        ("enable_tb", False, "monitor.enable_tb", False),
        ("hybrid_zero_optimizer.zero_overlap_communication", False, "hybrid_zero_optimizer.overlap_sync_grad", False),
        ("hybrid_zero_optimizer.clip_grad_norm", -1, "hybrid_zero_optimizer.clip_grad_norm", 0.0),
        ("data.rampup_batch_size", None, "data.rampup_batch_size", ""),
        ("data.gradient_accumulation", 3, "data.micro_num", 3),
        ("ckpt.checkpoint_every", float("inf"), "ckpt.checkpoint_every", None),
        ("ckpt.oss_snapshot_freq", 1, "ckpt.oss_snapshot_freq", None),
        ("ckpt.load_given_ckpt", True, "ckpt.auto_resume", False),
        ("ckpt.load_model_only_folder", f"local:{HERE}", "ckpt.load_ckpt_info.path", HERE),
        ("ckpt.load_ckpt_folder", f"local:{HERE}", "ckpt.load_ckpt_info.content", ("model", "sampler", "optimizer")),
        ("ckpt.load_ckpt_info", {"path": None, "content": ("model",), "ckpt_type": "x"}, "ckpt.load_ckpt_info", None),
        ("ckpt.load_ckpt_info", {"path": HERE, "ckpt_type": "internevo"}, "ckpt.load_ckpt_info.ckpt_type", "internlm"),
        ("ckpt.load_ckpt_info", {"path": HERE, "content": "ALL"}, "ckpt.load_ckpt_info.content", ("all",)),
    ],
)
def test_conversions(small, key, value, new_key, expected):
    found = load_config(change(small, key, value))
    for name in new_key.split("."):
        found = getattr(found, name)
    assert found == expected


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("parallel.zero1", 0, "write -1 for all data ranks or 1"),
        ("parallel", {"zero1": {"size": 4, "fsdp": True}, "weight": {"size": 2}}, "keep one"),
        ("parallel.zero1", {"size": 0}, "write -1 for all data ranks or 1"),
        ("parallel.pipeline", {"size": 16, "interleaved_overlap": True}, "needs 16; set 16 or more"),
        ("model.drop_rate", 0.1, "no dropout"),
        ("model.attn_drop_rate", 0.1, "no dropout"),
        ("model.use_swiglu", False, "only SwiGLU"),
        ("model.norm_type", "layernorm", "only RMSNorm"),
        ("model.is_reward", True, "reward heads"),
        ("model.deepnorm", True, "set False"),
        ("model.apply_post_layer_norm", True, "pre-norm"),
        ("model.moe_noisy_gate_policy", "RSample", "remove the key"),
        ("moe", {"top_k": 2, "noisy_gate_policy": "Jitter"}, "remove the key"),
        ("moe", {"topk": 2}, "see model.moe.*"),
        ("model.num_chunks", 2, "needs parallel.pipeline.size > 1"),
        ("model_type", "LLAVA", "image input"),
        ("lr_scheduler.last_epoch", 5, "remove the key"),
        ("grad_profiling", {"grad_norm_profiling": True}, "not available yet"),
        ("ckpt.save_ckpt_folder", "boto3:s3://bucket.10.0.0.1/a/b", '"s3://bucket/a/b"'),
        ("ckpt.save_ckpt_folder", "s3://bucket.10.0.0.1/a/b", "AWS_ENDPOINT_URL=http://10.0.0.1"),
        ("ckpt.save_ckpt_folder", "oss2:ali://bucket.oss-cn.example.com/a", '"oss://bucket/a"'),
        ("ckpt.load_ckpt_info", {"path": HERE, "ckpt_type": "llama"}, "convert them to Hugging Face"),
        ("ckpt.load_model_only_folder", "local:/no/such/place", "no such folder"),
    ],
)
def test_refusals(small, key, value, reason):
    with pytest.raises(ConfigError) as caught:
        load_config(change(small, key, value))
    assert any(reason in problem for problem in caught.value.problems), caught.value.problems


def test_two_spellings_that_differ_are_refused(small):
    config = change(change(small, "model.no_bias", True), "model.qkv_bias", True)
    with pytest.raises(ConfigError, match="keep one"):
        load_config(config)


def test_an_override_of_the_new_spelling_wins_over_the_old_one(small):
    assert load_config(change(small, "model.no_bias", True), ["model.qkv_bias=True"]).model.qkv_bias


def test_a_plain_s3_url_with_dots_is_left_alone(small):
    config = load_config(change(small, "ckpt.save_ckpt_folder", "s3://my.bucket.name/key"))
    assert config.ckpt.save_ckpt_folder == "s3://my.bucket.name/key"


def test_a_placeholder_of_the_sample_files_is_ignored_only_beside_auto_resume(small):
    load = {"path": "local:llm_ckpts/xxxx", "content": ("model",), "ckpt_type": "internlm"}
    config = change(small, "ckpt.load_ckpt_info", load)
    assert load_config(config).ckpt.load_ckpt_info is None
    with pytest.raises(ConfigError, match="no such folder"):
        load_config(config, ["ckpt.auto_resume=False"])
    with pytest.raises(ConfigError, match="no such folder"):  # a path in today's spelling is meant
        load_config(change(small, "ckpt.load_ckpt_info", {"path": "llm_ckpts/xxxx"}))
    config = change(small, "ckpt.load_ckpt_folder", "local:llm_ckpts/49")  # as in 0.1, where it was meant
    with pytest.raises(ConfigError, match="no such folder"):
        load_config(config)
    assert load_config(change(config, "ckpt.load_given_ckpt", False)).ckpt.load_ckpt_info is None
    with pytest.raises(ConfigError, match="no such folder"):
        load_config(change(config, "ckpt.load_given_ckpt", True))


def test_a_resume_without_schedule_is_said(small, caplog, tmp_path):
    load_config(change(small, "ckpt.load_ckpt_folder", f"local:{tmp_path}"))
    assert "steps and learning rate begin anew. To go on where it was, set ckpt.load_ckpt_info.content" in caplog.text


def test_experts_of_2023_are_balanced_as_then(small):
    moe = change({**small, "model_type": "INTERNLM_MoE"}, "model.num_experts", 4)
    assert load_config(moe).loss.moe_loss_coeff == 0.01
    assert load_config(change(moe, "hybrid_zero_optimizer.reduce_bucket_size", 1)).loss.moe_loss_coeff == 1.0


def test_old_llama2_files_have_the_biases_and_rotary_order_they_assumed(small):
    old = load_config(change({**small, "model_type": "LLAMA2"}, "model.use_flash_attn", True))
    assert (old.model.qkv_bias, old.model.out_bias, old.model.qk_interleaved) == (True, True, True)
    explicit = change(change({**small, "model_type": "LLAMA2"}, "model.no_bias", True), "model.adapt_hf", True)
    config = load_config(explicit)
    assert (config.model.qkv_bias, config.model.out_bias, config.model.qk_interleaved) == (False, False, False)
    assert not load_config({**small, "model_type": "LLAMA2"}).model.qkv_bias


def test_the_table_names_each_key_once():
    names = [row.key for row in TABLE]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("zero1", "weight", "expected"), [(1, 4, 4), (2, 4, 8), (-1, 4, -1), (8, 1, 8)])
def test_isp_of_2023(small, zero1, weight, expected):
    """The parallel section of InternEvo's isp examples; there, zero1 was a number of groups of weight ranks."""
    small["parallel"] = {
        "zero1": {"size": zero1, "fsdp": False},
        "tensor": {"size": 2, "mode": "isp"},
        "pipeline": {"size": 1, "interleaved_overlap": True},
        "weight": {"size": weight, "overlap": True, "memory_pool": True},
    }
    parallel = load_config(small, world_size=8).parallel
    assert parallel.axis_sizes == {"pipeline": 1, "ring": 1, "ulysses": 2, "tensor": 1}
    assert (parallel.weight.size, parallel.gradient.size, parallel.zero1.size) == (weight, weight, expected)


def test_zero1_of_today_beside_isp_counts_ranks(small):
    small["parallel"] = {"zero1": {"size": 4}, "tensor": {"size": 2, "mode": "isp"}, "weight": {"size": 2}}
    assert load_config(small, world_size=8).parallel.zero1.size == 4
