"""Every example config loads, and has the size its name promises."""

from pathlib import Path

import pytest
from transformers import Qwen2Config, Qwen3Config

from internlm.config.checks import find_problems
from internlm.config.loader import load_config
from internlm.config.presets import PRESETS
from internlm.config.schema import Config
from internlm.model.flops import num_parameters

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
MODELS = sorted((ROOT / "configs" / "_base_" / "models").glob("*.py"))
NO_DATA = ["data.type=tokenized", "data.train_folder=None", "data.valid_folder=None", "dpo=None", "lora=None"]

# Parameters in 10^9: InternLM-7B as the 2023 framework counted it; the others as their model cards say.
SIZES = {
    "0.6B_qwen3": 0.596,
    "1.8B_internlm2": 1.889,
    "20B_sft": 20.09,
    "30B_qwen3_moe": 30.53,
    "7B_internlm2": 7.738,
    "7B_isp_256k": 7.738,
    "7B_llama2": 6.738,
    "70B_llama2": 68.98,
    "7B_sft": 7.321948160,
    "7B_dpo": 7.738,
    "7B_lora": 7.738,
    "demo": 0.010,
    "demo_sft": 0.002607,
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_configs(path):
    config = load_config(path, NO_DATA)
    assert find_problems(config, world_size=1 if path.stem in ("demo", "demo_sft", "0.6B_qwen3") else 64) == []
    assert num_parameters(config.model) / 1e9 == pytest.approx(SIZES[path.stem], rel=5e-3)


def test_every_example_is_sized():
    assert {path.stem for path in CONFIGS} == set(SIZES)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_bases_complete_a_config(path):
    config = load_config({"_base_": str(path), "data": {"seq_len": 16, "total_steps": 1}})
    assert config.model.num_layers > 1


def test_demo_runs_on_a_cpu_where_make_demo_puts_its_data():
    config = load_config(ROOT / "configs" / "demo.py", NO_DATA)
    assert config.model.dtype == "torch.float32"
    text = (ROOT / "configs" / "demo.py").read_text()
    assert '"runs/demo/data/train"' in text and '"runs/demo/data/valid"' in text


@pytest.mark.parametrize("family", PRESETS)
def test_presets_are_valid_and_a_file_wins_over_them(family, small):
    config = load_config({**small, "model_type": family})
    for key, value in PRESETS[family].items():
        found = getattr(config.model, key)
        assert ({name: getattr(found, name) for name in value} if isinstance(value, dict) else found) == value
    changed = {key: not value for key, value in PRESETS[family].items() if isinstance(value, bool)}
    small["model"] |= changed
    config = load_config({**small, "model_type": family})
    assert all(getattr(config.model, key) == value for key, value in changed.items())


def test_the_default_family_is_internlm(small):
    assert Config.model_fields["model_type"].default == "INTERNLM"
    assert load_config(small).model.init == "internlm"


def test_qwen3_switches_equal_transformers(small):
    ours = load_config({**small, "model_type": "QWEN3"}).model
    theirs = Qwen3Config()
    assert ours.head_dim == theirs.head_dim
    assert ours.layer_norm_epsilon == theirs.rms_norm_eps
    assert ours.qkv_bias == theirs.attention_bias
    assert Qwen2Config().rms_norm_eps == load_config({**small, "model_type": "QWEN2"}).model.layer_norm_epsilon
