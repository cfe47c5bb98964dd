"""Contradictions between keys, with the arithmetic."""

import ast
from pathlib import Path

import pytest

from internlm.config import checks, layout_checks
from internlm.config.checks import ConfigError, check, find_problems
from internlm.config.loader import load_config
from internlm.config.schema import Config
from tests.config.told import ASKS, assert_told, last_clause


def parallel(small, weight: int, gradient: int, zero1: int) -> Config:
    sizes = {"weight": {"size": weight}, "gradient": {"size": gradient}, "zero1": {"size": zero1}}
    return Config.model_validate({**small, "parallel": sizes})


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 8), (1, 4, 8), (2, 4, 8), (2, 2, -1), (-1, -1, -1), (1, -1, -1)])
def test_divisor_chains_pass(small, sizes):
    check(parallel(small, *sizes), world_size=8)
    check(parallel(small, *sizes))


@pytest.mark.parametrize(
    ("sizes", "world_size", "told"),
    [
        ((1, 1, 3), 8, ("parallel.zero1.size = 3", "= 8 (8 = 2 * 3 + 2)", "parallel.zero1.size to one of 1, 2, 4, 8")),
        ((1, 1, 16), 8, ("parallel.zero1.size = 16", "(8 = 0 * 16 + 8)", "parallel.zero1.size to one of 1, 2, 4, 8")),
        ((4, 6, 12), 12, ("parallel.weight.size = 4", "parallel.gradient.size = 6 (6 = 1 * 4 + 2)", "of 1, 2, 3, 6")),
        ((4, 2, 8), None, ("parallel.weight.size = 4", "gradient.size = 2 (2 = 0 * 4 + 2)", "to one of 1, 2")),
        ((-1, -1, 4), None, ("parallel.gradient.size = -1", "parallel.zero1.size = 4", "set that to -1 too")),
        ((-1, -1, 4), 8, ("parallel.gradient.size = 8", "zero1.size = 4 (4 = 0 * 8 + 4)", "to one of 1, 2, 4")),
        ((1, 1, 0), None, ("parallel.zero1.size", "= 0", "expected a number of ranks, or -1 for all data ranks")),
        ((-2, 1, 1), None, ("parallel.weight.size", "= -2", "expected a number of ranks, or -1 for all data ranks")),
    ],
)
def test_broken_chains_show_the_arithmetic(small, sizes, world_size, told):
    assert_told(find_problems(parallel(small, *sizes), world_size), told)
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
    ("keys", "told"),
    [
        (
            {"model__hidden_size": 66},
            ("model.hidden_size = 66", "(66 = 16 * 4 + 2)", "change one, or set model.head_dim"),
        ),
        (
            {"monitor__alert__enable_feishu_alert": True},
            (
                "monitor.alert.feishu_alert_address",
                "= None is no http(s) URL",
                "give the webhook's, or set enable_feishu_alert=False",
            ),
        ),
        (
            {"model__hidden_size": 60},
            ("model.hidden_size / model.num_attention_heads", "60/4 = 15", "set model.head_dim to an even number"),
        ),
        ({"model__head_dim": 7}, ("model.head_dim", "= 7", "set model.head_dim to an even number")),
        (
            {"model__num_kv_attention_heads": 3},
            ("model.num_kv_attention_heads = 3", "(4 = 1 * 3 + 1)", "Set the latter to one of 1, 2, 4"),
        ),
        (
            {"model__checkpoint": "offload", "model__num_experts": 4},
            (
                "model.checkpoint = 'offload'",
                "model.num_experts = 4: how many rows an expert",
                "set 'feed_forward' or True",
            ),
        ),
        (
            {"model__rope_scaling": {"type": "dynamic", "factor": 2.0}, "model__max_position_embeddings": 8},
            (
                "model.max_position_embeddings = 8 in inference",
                "data.seq_len = 32",
                "raise model.max_position_embeddings, or choose linear, yarn or llama3",
            ),
        ),
        (
            {"model__dtype": "torch.float16", "hybrid_zero_optimizer__master": "split"},
            ("hybrid_zero_optimizer.master", '= "split" needs model.dtype', 'set master="fp32"'),
        ),
        *(
            (
                {"data__rampup_batch_size": text},
                ("data.rampup_batch_size", repr(text), 'expected three numbers "START INCR EVERY", as "2 2 100"'),
            )
            for text in ("2 2", "a b c")
        ),
        (
            {"data__rampup_batch_size": "8 1 10", "data__micro_num": 4},
            ("data.rampup_batch_size", "8 micro batches, above data.micro_num = 4", "start with 4 or fewer"),
        ),
        *(
            (
                {"data__rampup_batch_size": text, "data__micro_num": 4},
                ("data.rampup_batch_size", repr(text), "START, INCR and EVERY must be 1 or more"),
            )
            for text in ("2 0 10", "4 0 5", "1 1 0")
        ),
        *(
            (
                {"data__seed": seed},
                ("data.seed", f"= {seed}", "expected int in [0, 4294967295] (seed of the order of rows)"),
            )
            for seed in (-1, 99999999999)
        ),
        ({"adam__lr": "1e999"}, ("adam.lr", "= inf", "expected float >= 0 (peak learning rate)")),
        (
            {"data__skip_batches": "3,x"},
            ("data.skip_batches", "'3,x'", """expected batches "N" and spans "A-B" for 'x'"""),
        ),
        ({"data__skip_batches": "5-3"}, ("data.skip_batches", "5-3 ends before it begins", "write 3-5")),
        *(
            ({"data__skip_batches": text}, ("data.skip_batches", problem, "spans must ascend, without overlap"))
            for text, problem in (("3-6,5-9", "5-9 comes after 6"), ("9,3", "3 comes after 9"))
        ),
        (
            {"data__type": "text"},
            ("data.tokenizer_path", 'data.type = "text"', "give that of a sentencepiece model"),
        ),
        ({"data__type": "chat"}, ("data.tokenizer_path", 'data.type = "chat"', "or a Hugging Face folder")),
        ({"data__type": "megatron"}, ("data.train_folder", 'data.type = "megatron"', "give it")),
        (
            {"data__tokenizer_path": "/no/such.model"},
            ("data.tokenizer_path", "= '/no/such.model': no such file", "name one that is there"),
        ),
        (
            {"data__type": "tokenized", "data__train_folder": "/no/such"},
            ("data.train_folder", "(/ is the last part that exists)", "name one that is there"),
        ),
        (
            {"data__type": "tokenized", "data__train_folder": __file__},
            ("data.train_folder", f"{__file__!r} is a file", "name the folder"),
        ),
        (
            {"lr_scheduler__init_steps": 8, "lr_scheduler__warmup_ratio": 0.5},
            ("init_steps 8 + warm-up 5", "= 13 steps, more than data.total_steps = 10", "lower one of them"),
        ),
        (
            {"lr_scheduler__type": "wsd", "lr_scheduler__warmup_ratio": 0.9, "lr_scheduler__init_steps": 1},
            ("decay 1 (decay_ratio 0.1)", "= 11 steps, more than data.total_steps = 10", "lower one of them"),
        ),
        ({"lr_scheduler__eta_min": 1.0}, ("lr_scheduler.eta_min = 1.0", "the peak adam.lr = 0.0001", "lower it")),
        ({"adam__adam_beta1": 1.0}, ("adam.adam_beta1", "adam.adam_beta2", "must be below 1")),
        (
            {"ckpt__stop_file_path": "stop", "ckpt__enable_save_ckpt": False},
            ("ckpt.stop_file_path", "ckpt.enable_save_ckpt = False", "set it True"),
        ),
        ({"run_dir": __file__}, ("run_dir", f"{__file__!r} is a file", "name a folder, to be written there")),
    ],
)
def test_contradictions(small, keys, told):
    problems = problems_with(small, **keys)
    assert_told(problems, told)
    assert len(problems) == len(set(problems))


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
    assert "name one of code.jsonl, en" in problems_with(small, data__mixture={"fr": 1.0})[0]
    assert "all weights are 0" in problems_with(small, data__mixture={"en": 0.0})[0]


WHOLE_HEADS = "to one of 1, 2, 4, and cut rows further by parallel.context.ring"


@pytest.mark.parametrize(
    ("parallel", "told"),
    [
        ({"context": {"ring": 3}}, ("2 * parallel.context.ring = 6", "(16 = 2 * 6 + 4)", "Set data.seq_len to 18")),
        ({"context": {"ulysses": 8}}, ("parallel.context.ulysses = 8", "(4 = 0 * 8 + 4)", f"Set it {WHOLE_HEADS}")),
        (
            {"tensor": {"size": 3, "mode": "isp"}},
            (
                "a ring rank = 16 is not divisible by parallel.tensor.size (isp) = 3",
                "(16 = 5 * 3 + 1)",
                "Set data.seq_len to 18",
            ),
        ),
        (
            {"tensor": {"size": 2, "mode": "isp"}, "context": {"ulysses": 4}},
            (
                "parallel.context.ulysses 4 * parallel.tensor.size 2 (isp) = 8",
                "heads of a tensor rank = 4",
                f"Set their product {WHOLE_HEADS}",
            ),
        ),
        (
            {"context": {"ring": 4, "ulysses": 8}},
            ("parallel.context.ulysses = 8", "a ring rank = 4 is not divisible", "Set data.seq_len to 64"),
        ),
        (
            {"context": {"ring": 2}, "tensor": {"size": 0}},
            ("parallel.tensor.size", "= 0", "expected a number of ranks, 1 or more"),
        ),
    ],
)
def test_rows_that_cannot_be_cut(small, parallel, told):
    data = {**small["data"], "seq_len": 16, "micro_bsz": 1}
    assert_told(find_problems(Config.model_validate({**small, "data": data, "parallel": parallel})), told)


@pytest.mark.parametrize("module", [checks, layout_checks])
def test_every_refusal_ends_with_what_to_do(module):
    """Also those that no table has a row for."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    refusals = [ast.unparse(node.value) for node in ast.walk(tree) if isinstance(node, ast.Yield) and node.value]
    assert len(refusals) > 10
    assert [text for text in refusals if not ASKS.search(last_clause(text)) and not text.endswith("{fix}'")] == []
