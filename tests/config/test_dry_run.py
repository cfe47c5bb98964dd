"""The dry run's numbers against the engine's own buffers and what autograd really keeps."""

import gc
import logging
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from internlm.config.loader import load_config
from internlm.core.launch import launch, simulated_world
from internlm.core.mesh import build_mesh
from internlm.model.batch import Batch, Segments
from internlm.model.init import initialize
from internlm.model.transformer import Transformer, build_model
from internlm.parallel.offload import offload_blocks
from internlm.parallel.parallelize import parallelize
from internlm.parallel.recompute import recompute_blocks
from internlm.solver.hybrid_zero import HybridZero
from internlm.train.dry_run import layout_name, report
from internlm.train.memory import (
    around_feed_forward,
    memory_per_rank,
    most_kept,
    normed_per_token,
    saved_per_token,
    selected_per_token,
)
from internlm.utils import logger


def sized(**changes):
    model = {"num_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "vocab_size": 1024, **changes}
    return {"model": model, "data": {"type": "synthetic", "seq_len": 64, "total_steps": 10}}


def states(memory) -> int:
    return memory.parameters + memory.gradients + memory.masters + memory.moments


def count(config) -> int:
    return sum(p.numel() for p in Transformer(config.model).parameters())


@pytest.mark.parametrize(
    ("overrides", "bytes_per_parameter"),
    [
        ([], 2 + 2 + 2 + 8),
        (["hybrid_zero_optimizer.master=fp32"], 2 + 2 + 4 + 8),
        (["hybrid_zero_optimizer.moment_dtype=torch.bfloat16"], 2 + 2 + 2 + 4),
        (["hybrid_zero_optimizer.grad_dtype=torch.float32"], 2 + 4 + 2 + 8),
        (["model.dtype=torch.float32"], 4 + 4 + 0 + 8),
        (["model.dtype=torch.float16"], 2 + 2 + 4 + 8),
    ],
)
def test_bytes_per_parameter(overrides, bytes_per_parameter):
    config = load_config(sized(), overrides)
    expected = count(config) * bytes_per_parameter
    assert states(memory_per_rank(config, 1)) == pytest.approx(expected, rel=1e-3)  # padding


def test_shares_of_a_rank():
    config = load_config(sized(), ["parallel.weight.size=2", "parallel.gradient.size=4", "parallel.zero1.size=8"])
    memory, number = memory_per_rank(config, 16), count(config)
    assert memory.parameters == pytest.approx(number * 2 / 2, rel=1e-2)
    assert memory.gradients == pytest.approx(number * 2 / 4, rel=1e-2)
    assert memory.masters == pytest.approx(number * 2 / 8, rel=1e-2)
    assert memory.moments == pytest.approx(number * 8 / 8, rel=1e-2)
    embedding = 1024 * 256 * 2
    block = sum(p.numel() for p in Transformer(config.model).layers[0].parameters()) * 2
    assert memory.gathered == pytest.approx(3 * max(embedding, block), rel=1e-2)  # two gathered, one gradient


def test_equal_to_what_the_engine_allocates(small):
    config = load_config(small, ["model.dtype=torch.bfloat16"])
    with launch() as world:
        model = build_model(config)
        engine = HybridZero(model, config, build_mesh(config.parallel, world), lambda name, shape: torch.zeros(shape))
        allocated = engine.memory()
    memory = memory_per_rank(config, 1)
    assert {name: getattr(memory, name) for name in allocated} == allocated


@pytest.mark.parametrize(
    ("changes", "tensor", "mode"),
    [
        ({}, 1, "mtp"),
        ({"num_kv_attention_heads": 2}, 1, "mtp"),
        ({"mlp_ratio": 1.0}, 1, "mtp"),
        ({"residual_in_fp32": True}, 1, "mtp"),
        ({"num_experts": 4}, 1, "mtp"),
        ({"num_experts": 8, "moe": {"top_k": 3, "intermediate_size": 64, "num_shared_experts": 2}}, 1, "mtp"),
        ({}, 4, "mtp"),
        ({}, 4, "msp"),
        ({}, 4, "fsp"),
        ({"num_experts": 4}, 4, "mtp"),
        ({"num_experts": 4}, 4, "fsp"),
        ({"num_experts": 4, "moe": {"num_shared_experts": 1}}, 4, "mtp"),
        ({"num_experts": 4, "moe": {"num_shared_experts": 1, "intermediate_size": 64}}, 4, "msp"),
    ],
)
def test_saved_activations_against_autograd(changes, tensor, mode):
    """Two models that differ by one block, run under a hook that sees every tensor autograd keeps. What other tensor
    ranks would send is anything, of the right shape."""
    saved = []
    for num_layers in (1, 2):
        config = load_config(
            sized(num_layers=num_layers, dtype="torch.float32", **changes),
            [f"parallel.tensor.size={tensor}", f"parallel.tensor.mode={mode}"],
        )
        saved.append(saved_by_autograd(config))
    # The plain RMSNorm of CPUs also keeps its normalised input and 1 / rms; the formula is for the fused one of GPUs.
    plain_norms = 2 * (config.model.hidden_size + 1) * 4 / (1 if mode == "mtp" else tensor)
    expected = saved_per_token(config.model, tensor, mode) + plain_norms
    assert expected == pytest.approx(saved[1] - saved[0], rel=0.005)


def saved_by_autograd(config) -> float:
    """Bytes per token."""
    with simulated_world(0, config.parallel.tensor.size) as world:
        model = build_model(config)
        parallelize(model, config, build_mesh(config.parallel, world))
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        tokens = torch.arange(64)
        segments = Segments(torch.tensor([0, 64], dtype=torch.int32), [64])
        batch = Batch(tokens, labels=tokens, positions=tokens, segments=segments)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.loss(batch)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / len(tokens)


def test_recomputation_keeps_the_inputs_of_blocks():
    none = memory_per_rank(load_config(sized(num_layers=8)), 1).activations
    half = memory_per_rank(load_config(sized(num_layers=8), ["model.checkpoint=0.5"]), 1).activations
    all_blocks = memory_per_rank(load_config(sized(num_layers=8), ["model.checkpoint=True"]), 1).activations
    block, stream = none // 8, 64 * 256 * 2
    assert half == 5 * block + 4 * stream  # one of the recomputed ones is whole again while it is differentiated
    assert all_blocks == block + 8 * stream
    selective = memory_per_rank(load_config(sized(num_layers=8), ["model.checkpoint=selective"]), 1).activations
    assert block + 8 * stream < selective < none


@pytest.mark.parametrize(
    ("schedule", "first", "last"),
    [
        ("1f1b", 4 * 2, 2),  # as many micro batches as there are stages behind, of 2 blocks
        ("interleaved", 2 * 3 + 5, 2 * 0 + 5),  # (Narayanan et al., 2021): 2 (p - 1 - stage) + (v - 1) p, and one more
        ("zbv", 2 * 4, 2 * 4),  # (Qi et al., 2024): 2 p chunks on every stage, as much as 1f1b's first one
        ("dualpipev", 2 * 4 + 1, 2 * 4 + 1),  # (DeepSeek-AI, 2024): 2 p + 1 chunks
    ],
)
def test_what_a_schedule_keeps(schedule, first, last):
    """Blocks that stages keep the activations of, with 8 blocks on 4 stages and 16 micro batches."""
    config = load_config(
        sized(num_layers=8, num_chunks=2 if schedule == "interleaved" else 1),
        ["parallel.pipeline.size=4", f"parallel.pipeline.schedule={schedule}", "data.micro_num=16"],
    )
    found = [most_kept(config, stage, float) for stage in range(4)]
    assert (found[0], found[-1]) == (first, last), found


EXPERTS = {"num_experts": 8, "moe": {"top_k": 3, "intermediate_size": 64}}
SHARED = {"num_experts": 8, "moe": {**EXPERTS["moe"], "num_shared_experts": 2}}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [(kind, changes) for kind in ("selective", "feed_forward") for changes in ({}, EXPERTS, SHARED)]
    + [("offload", {})],
)
def test_recomputation_against_autograd(kind, changes):
    """What is kept of one more block: tensors that are alive after a forward, those on the host (uint8) apart."""
    kept, on_host = [], []
    for num_layers in (1, 2):
        config = load_config(sized(num_layers=num_layers, dtype="torch.float32", checkpoint=kind, **changes))
        model = Transformer(config.model)
        initialize(model, config.model, seed=0)
        recompute_blocks(model.layers, config.model)
        if kind == "offload":
            offload_blocks([model.layers])
        tokens = torch.arange(64)
        batch = Batch(tokens, labels=tokens, positions=tokens, segments=Segments.of((64,)))
        gc.collect()
        before, host_before = live_bytes()
        loss = model.loss(batch).loss_sum
        after, host_after = live_bytes()
        kept.append((after - before) / len(tokens))
        on_host.append(host_after - host_before)
        del loss
    expected = selected_per_token(config.model)
    if kind != "selective":
        plain_norms = 2 * (config.model.hidden_size + 1) * 4
        expected = around_feed_forward(config.model) + plain_norms
    assert expected == pytest.approx(kept[1] - kept[0], rel=0.02)
    assert on_host == [0, memory_per_rank(config, 1).host]  # the last block's stays


def live_bytes() -> tuple[int, int]:
    """On the device, on the host."""
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = {x.untyped_storage().data_ptr(): (x.untyped_storage().nbytes(), x.dtype) for x in tensors}
    on_host = sum(size for size, dtype in storages.values() if dtype == torch.uint8)
    return sum(size for size, _ in storages.values()) - on_host, on_host


def test_the_report():
    config = load_config(sized(), ["parallel.zero1.size=-1"])
    text = report(config, 8)
    assert "  model.hidden_size = 256" in text
    assert f"{count(config):,} parameters" in text
    assert "(p, g, os) = (1, 1, 8): ZeRO-1" in text
    assert "14.00  before sharding" in text
    assert max(map(len, text.splitlines())) < 140


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.compile=True", "parallel.tensor.size=2"], "blocks are not compiled: they communicate (tensor 2)"),
        (["model.fp8=True", "model.num_experts=4"], "model.fp8 = True leaves products of routed experts in torch.bf"),
    ],
)
def test_what_was_asked_for_and_is_not_done_is_a_warning(overrides, expected, caplog, monkeypatch):
    monkeypatch.setattr(logger, "_seen", set())
    for asked in ([], overrides):
        memory_per_rank(load_config(sized(), asked), 2)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and expected in warnings[0]


@pytest.mark.parametrize("ring", [1, 2])
def test_kernels_of_attention_are_not_told_where_a_ring_has_its_own(ring):
    with patch("internlm.parallel.parallelize.prepare_attention") as prepare:
        memory_per_rank(load_config(sized(), [f"parallel.context.ring={ring}"]), 2)
    assert prepare.called == (ring == 1)


def test_total_and_active_parameters_of_experts():
    mixtral = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_kv_attention_heads": 8}
    model = {**mixtral, "num_layers": 32, "vocab_size": 32000}
    config = load_config({**sized(), "model_type": "MIXTRAL", "model": model})
    text = report(config, 1)
    assert "46,702,792,704 parameters (46.7 G), 12,879,925,248 (12.9 G) active" in text  # as Mixtral-8x7B's card says


def test_experts_of_a_rank():
    """Dealt out to 4 ranks of 8, the two holders of the same ones share their optimizer states."""
    config = load_config(sized(num_experts=8), ["parallel.expert.size=4"])
    memory, number = memory_per_rank(config, 8), count(config)
    experts = sum(p.numel() for name, p in Transformer(config.model).named_parameters() if ".experts." in name)
    router = 2 * 8 * 256 * 4
    expected = (number - experts) * 2 + experts * 2 / 4
    assert memory.parameters == pytest.approx(expected + router / 2, rel=1e-3)
    assert memory.moments == pytest.approx((number - experts) * 8 / 8 + experts * 8 / 8, rel=1e-2)


def test_seven_billion_parameters_take_no_memory_to_count():
    config = load_config("configs/7B_sft.py")
    assert "7,321,948,160 parameters" in report(config, 8)


@pytest.mark.parametrize(("ranks", "expected"), [(8, 60.8), (16, 49.1)])
def test_twenty_billion_parameters_fit_as_their_config_says(ranks, expected):
    memory = memory_per_rank(load_config("configs/20B_sft.py", ["data.train_folder=None"]), ranks)
    assert memory.total / 2**30 == pytest.approx(expected, abs=0.1) and memory.total < 80e9


def test_the_page_tells_what_recomputation_keeps():
    """The table of doc/parallelism.md, in bytes a token and hidden size."""
    page = Path(__file__).parents[2].joinpath("doc", "parallelism.md").read_text(encoding="utf-8")
    told = {key: int(size) for key, size in re.findall(r"^\| `?([\w\".]+)`?[^|]*\| (\d+) \*h\*", page, re.MULTILINE)}
    model = load_config(sized(hidden_size=3 * 2**10, num_attention_heads=8, mlp_ratio=8 / 3, multiple_of=1)).model
    whole, hidden = saved_per_token(model), model.hidden_size
    around, stream = around_feed_forward(model) - normed_per_token(model), 2 * hidden  # compiled
    assert told == {
        "False": round(whole / hidden),
        '"selective"': round(selected_per_token(model) / hidden),
        '"feed_forward"': round(around / hidden),
        '"offload"': round(around / hidden),
        "0.5": round((whole + stream) / 2 / hidden),
        "True": round(stream / hidden),
    }


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ((1, 1, 1, 8), "plain data parallel"),
        ((1, 1, 8, 8), "ZeRO-1"),
        ((1, 8, 8, 8), "ZeRO-2"),
        ((8, 8, 8, 8), "ZeRO-3"),
        ((4, 4, 4, 8), "HSDP"),
        ((4, 4, 8, 8), "HFSDP"),
    ],
)
def test_layout_names(sizes, name):
    assert layout_name(*sizes).startswith(name)
