"""Contradictions between keys, with the arithmetic."""

import pytest

from internlm.config.checks import ConfigError, check, find_problems
from internlm.config.loader import load_config
from internlm.config.schema import Config


def parallel(small, weight: int, gradient: int, zero1: int) -> Config:
    sizes = {"weight": {"size": weight}, "gradient": {"size": gradient}, "zero1": {"size": zero1}}
    return Config.model_validate({**small, "parallel": sizes})


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 8), (1, 4, 8), (2, 4, 8), (2, 2, -1), (-1, -1, -1), (1, -1, -1)])
def test_divisor_chains_pass(small, sizes):
    check(parallel(small, *sizes), world_size=8)
    check(parallel(small, *sizes))


@pytest.mark.parametrize(
    ("sizes", "world_size", "expected"),
    [
        ((1, 1, 3), 8, "parallel.zero1.size = 3 does not divide the data-parallel size"),
        ((1, 1, 3), 8, "(world 8 / tensor 1 / pipeline 1) = 8 (8 = 2 * 3 + 2)"),
        ((1, 1, 16), 8, "parallel.zero1.size = 16 does not divide"),
        ((1, 1, 3), 8, "Set parallel.zero1.size to one of 1, 2, 4, 8"),
        ((4, 6, 12), 12, "parallel.weight.size = 4 does not divide parallel.gradient.size = 6 (6 = 1 * 4 + 2)"),
        ((4, 2, 8), None, "parallel.weight.size = 4 does not divide parallel.gradient.size = 2"),
        ((-1, -1, 4), None, "parallel.zero1.size = 4; set that to -1"),
        ((-1, -1, 4), 8, "parallel.gradient.size = 8 does not divide parallel.zero1.size = 4"),
        ((1, 1, 0), None, "parallel.zero1.size = 0: expected a number of ranks"),
        ((-2, 1, 1), None, "parallel.weight.size = -2: expected"),
    ],
)
def test_broken_chains_show_the_arithmetic(small, sizes, world_size, expected):
    problems = find_problems(parallel(small, *sizes), world_size)
    assert any(expected in problem for problem in problems), problems
    with pytest.raises(ConfigError):
        check(parallel(small, *sizes), world_size)


def test_the_loader_reports_the_ranks_together_with_the_rest(small):
    with pytest.raises(ConfigError) as caught:
        load_config(small, ["model.num_layer=1", "parallel.zero1.size=3"], world_size=8)
    assert len(caught.value.problems) == 2
    assert "8 = 2 * 3 + 2" in str(caught.value) and "model.num_layers" in str(caught.value)


def problems_with(small, **keys) -> list[str]:
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in keys.items()]
    with pytest.raises(ConfigError) as caught:
        load_config(small, overrides)
    return caught.value.problems


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"model__hidden_size": 66}, "66 = 16 * 4 + 2"),
        ({"model__checkpoint": "offload", "model__num_experts": 4}, "model.num_experts = 4: how many rows an expert"),
        ({"monitor__alert__enable_feishu_alert": True}, "feishu_alert_address = None is no http(s) URL"),
        ({"model__hidden_size": 60}, "hidden_size / model.num_attention_heads = 60/4 = 15"),
        ({"model__head_dim": 7}, "model.head_dim = 7"),
        ({"model__num_kv_attention_heads": 3}, "4 = 1 * 3 + 1"),
        (
            {"model__rope_scaling": {"type": "dynamic", "factor": 2.0}, "model__max_position_embeddings": 8},
            "model.max_position_embeddings = 8 in inference",
        ),
        ({"model__dtype": "torch.float16", "hybrid_zero_optimizer__master": "split"}, 'set master="fp32"'),
        ({"data__rampup_batch_size": "2 2"}, '"START INCR EVERY"'),
        ({"data__rampup_batch_size": "a b c"}, '"START INCR EVERY"'),
        ({"data__rampup_batch_size": "8 1 10", "data__micro_num": 4}, "starts with 8 micro batches, above"),
        ({"data__rampup_batch_size": "2 0 10", "data__micro_num": 4}, "at least 1"),
        ({"data__rampup_batch_size": "4 0 5", "data__micro_num": 4}, "START, INCR and EVERY are at least 1"),
        ({"data__seed": -1}, "data.seed = -1: int; expected int in [0, 4294967295]"),
        ({"data__seed": 99999999999}, "data.seed = 99999999999"),
        ({"adam__lr": "1e999"}, "adam.lr = inf: float; expected"),
        ({"data__rampup_batch_size": "1 1 0", "data__micro_num": 4}, "at least 1"),
        ({"data__skip_batches": "3,x"}, "'x' is neither"),
        ({"data__skip_batches": "5-3"}, "ends before it begins"),
        ({"data__skip_batches": "3-6,5-9"}, "5-9 comes after 6"),
        ({"data__skip_batches": "9,3"}, "3 comes after 9"),
        ({"data__type": "text"}, "data.tokenizer_path"),
        ({"data__type": "megatron"}, "needs data.train_folder"),
        ({"data__tokenizer_path": "/no/such.model"}, "no such file"),
        ({"data__type": "tokenized", "data__train_folder": "/no/such"}, "(/ is the last part that exists)"),
        ({"data__type": "tokenized", "data__train_folder": __file__}, "is a file; name the folder"),
        ({"lr_scheduler__init_steps": 8, "lr_scheduler__warmup_ratio": 0.5}, "= 13 steps, more than data.total_steps"),
        (
            {"lr_scheduler__type": "wsd", "lr_scheduler__warmup_ratio": 0.9, "lr_scheduler__init_steps": 1},
            "decay 1 (decay_ratio 0.1) = 11 steps, more than data.total_steps = 10",
        ),
        ({"lr_scheduler__eta_min": 1.0}, "above the peak adam.lr = 0.0001"),
        ({"adam__adam_beta1": 1.0}, "must be below 1"),
        ({"ckpt__stop_file_path": "stop", "ckpt__enable_save_ckpt": False}, "set it True"),
        ({"run_dir": __file__}, "run_dir"),
    ],
)
def test_contradictions(small, keys, expected):
    problems = problems_with(small, **keys)
    assert any(expected in problem for problem in problems), problems


def test_sound_values_pass(small):
    config = load_config(
        small,
        [
            "data.rampup_batch_size=1 2 5",
            "data.micro_num=4",
            "data.skip_batches=0,3-5, 7",
            "lr_scheduler.warmup_ratio=1.0",
            "model.num_kv_attention_heads=2",
            "model.head_dim=32",
            "model.hidden_size=62",
        ],
    )
    assert find_problems(config, 4) == []


def test_float16_has_a_copied_master_unless_told(small):
    assert load_config(small, ["model.dtype=torch.float16"]).hybrid_zero_optimizer.master == "fp32"
    assert load_config(small).hybrid_zero_optimizer.master == "split"


def test_hugging_face_start(small, tmp_path):
    start = {"ckpt__load_ckpt_info": {"path": str(tmp_path), "ckpt_type": "hf", "content": ("model", "optimizer")}}
    problems = problems_with(small, **start)
    assert any("holds a model alone" in problem for problem in problems)
    assert any("no config.json" in problem for problem in problems)
    (tmp_path / "config.json").write_text("{}")
    config = load_config({**small, "ckpt": {"load_ckpt_info": {"path": str(tmp_path), "ckpt_type": "hf"}}})
    assert config.ckpt.load_ckpt_info is not None


def test_mixture_names_entries_of_the_folder(small, tmp_path):
    (tmp_path / "en").mkdir()
    (tmp_path / "code.jsonl").write_text("")
    small["data"] |= {"type": "tokenized", "train_folder": str(tmp_path)}
    assert load_config(small, ["data.mixture={'en': 1, 'code': 0.5}"]).data.mixture == {"en": 1, "code": 0.5}
    assert "which has code.jsonl, en" in problems_with(small, data__mixture={"fr": 1.0})[0]
    assert "all weights are 0" in problems_with(small, data__mixture={"en": 0.0})[0]


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({"context": {"ring": 3}}, "= 16 does not divide by 2 * parallel.context.ring = 6 (16 = 2 * 6 + 4)"),
        ({"context": {"ring": 3}}, "Set data.seq_len to 18"),
        (
            {"context": {"ulysses": 8}},
            "heads of a tensor rank = 4 does not divide by parallel.context.ulysses = 8",
        ),
        ({"context": {"ulysses": 8}}, "Set it to one of 1, 2, 4, and cut rows further by parallel.context.ring"),
        ({"tensor": {"size": 3, "mode": "isp"}}, "a ring rank = 16 does not divide by parallel.tensor.size (isp) = 3"),
        ({"tensor": {"size": 3, "mode": "isp"}}, "Set data.seq_len to 18"),
        ({"context": {"ring": 4, "ulysses": 8}}, "a ring rank = 4 does not divide by parallel.context.ulysses = 8"),
        ({"context": {"ring": 4, "ulysses": 8}}, "Set data.seq_len to 64"),
        ({"context": {"ring": 2}, "tensor": {"size": 0}}, "parallel.tensor.size = 0"),
    ],
)
def test_rows_that_cannot_be_cut(small, parallel, expected):
    data = {**small["data"], "seq_len": 16, "micro_bsz": 1}
    problems = find_problems(Config.model_validate({**small, "data": data, "parallel": parallel}))
    assert any(expected in problem for problem in problems), problems
