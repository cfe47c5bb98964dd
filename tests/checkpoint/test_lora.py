"""Adapters: trained over every ZeRO class as on one rank, saved as PEFT's files, merged into exports."""

import json
from copy import deepcopy
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from internlm.apis.generate import load_model
from internlm.checkpoint.hf import export_hf
from internlm.checkpoint.inputs import find_checkpoint_problems
from internlm.checkpoint.native import NativeReader
from internlm.checkpoint.peft import export_adapter
from internlm.config.checks import find_problems
from internlm.model.batch import Batch, Segments
from internlm.model.lora import is_adapter
from internlm.utils.errors import UserError
from tests.checkpoint.runs import Chain, contents, global_tensors, run_config, train
from tests.pool import run_ranks

LORA = {"rank": 4, "alpha": 8.0}
ADAM = {"lr": 0.05, "weight_decay": 0.0}


Tuned = tuple[Path, list[float], list[float]]  # folder, losses, norms of gradients


def norms_of(found: dict[str, list[Any]]) -> list[float]:
    return [float.fromhex(norm) for norm in found["norms"]]


def run(folder: Path, chain: Chain, world_size: int, **sections: Any) -> dict[str, list[Any]]:
    config = run_config(chain, world_size, 6, **{"lora": LORA, "adam": ADAM, **sections})
    return run_ranks(world_size, train, config, folder)[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained base model."""
    folder = tmp_path_factory.mktemp("base")
    run_ranks(1, train, run_config((1, 1, 1), 1, 3, adam={"lr": 0.02, "weight_decay": 0.0}), folder)
    return folder / "checkpoints" / "3"


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("tuned")
    found = run(folder, (1, 1, 1), 1, ckpt={"load_ckpt_info": {"path": str(base)}})
    return folder, found["losses"], norms_of(found)


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    row = torch.tensor(ids)
    with torch.no_grad():
        return model(Batch(row, row, torch.arange(len(ids)), Segments.of((len(ids),))))


IDS = [1, 5, 9, 40, 3, 3, 7, 22]


def test_peft_and_merged_exports_compute_the_same(base: Path, tuned: Tuned, tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    folder = tuned[0]
    ours, _ = load_model(folder, "cpu")
    reader, base_reader = NativeReader(folder), NativeReader(base)
    layers = [name for name in reader.names() if is_adapter(name)]
    assert len(layers) == 2 * 4 * 2 and all(reader.read(name).abs().sum() > 0 for name in layers)
    # o_proj has no bias while q, k, v have: no Hugging Face layout but qwen2's holds that
    export_hf(base_reader.read, base_reader.config, tmp_path / "base", dtype="float32")
    export_adapter(reader, tmp_path / "adapter", str(tmp_path / "base"))
    with pytest.raises(UserError, match="not empty"):
        export_adapter(reader, tmp_path / "adapter")
    export_hf(reader.read, reader.config, tmp_path / "merged", dtype="float32")
    expected = logits_of(ours, IDS)
    before, _ = load_model(base, "cpu")
    assert (logits_of(before, IDS) - expected).abs().max() > 0.1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    first = NativeReader(folder)  # as of a run on the attention of one layer
    first.has = lambda name: "layers.0.attention" in name and reader.has(name)  # type: ignore[method-assign]
    export_adapter(first, tmp_path / "first", str(tmp_path / "base"))
    added = get_peft_model_state_dict(PeftModel.from_pretrained(deepcopy(theirs), str(tmp_path / "first")))
    assert len(added) == 2 * 4 and all("layers.0.self_attn" in name for name in added)
    for model in (
        PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")),
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32),
    ):
        with torch.no_grad():
            torch.testing.assert_close(model(torch.tensor([IDS])).logits[0], expected, atol=2e-5, rtol=1e-4)


def test_the_adapter_names_a_base_that_fits(
    tuned: Tuned, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = NativeReader(tuned[0])
    for model_type in ("qwen2", "internlm2"):
        (tmp_path / model_type).mkdir()
        (tmp_path / model_type / "config.json").write_text(json.dumps({"model_type": model_type}))
    named = []
    for path in (tmp_path / "qwen2", tmp_path / "internlm2", base):
        export_adapter(reader, tmp_path / "adapter", str(path), force=True)
        named.append(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"])
    assert named == [str(tmp_path / "qwen2"), "", ""]
    model = {"num_experts": 4, "qkv_bias": False, "moe": {"num_shared_experts": 1}}
    reader.config = run_config((1, 1, 1), 1, lora=LORA, model=model)
    with pytest.raises(UserError, match="num_shared_experts"):
        export_adapter(reader, tmp_path / "shared")
    assert "in the layout qwen2" in caplog.text


def test_the_base_stays_as_it_was(base: Path, tuned: Tuned) -> None:
    folder, losses, _ = tuned
    assert len(set(losses)) == 6  # the data are random, but something was learnt of them
    before, after = contents(base)["tensors"], contents(folder / "checkpoints" / "6")["tensors"]
    for (name, kind), bits in after.items():
        if not is_adapter(name):
            assert kind == "param" and bits == before[name, "param"]  # no optimizer state at all


@pytest.mark.parametrize(
    ("world_size", "chain", "tensor"),
    [
        (2, (1, 1, 2), None),
        (2, (2, 2, 2), None),
        (4, (1, 2, 4), None),
        (4, (2, 2, 4), None),
        (2, (1, 1, 1), "mtp"),
        (2, (1, 1, 1), "msp"),
        (4, (2, 2, 2), "fsp"),
    ],
)
def test_every_layout_trains_as_one_rank(
    base: Path, tuned: Tuned, tmp_path: Path, world_size: int, chain: Chain, tensor: str | None
) -> None:
    sections: dict[str, Any] = {"ckpt": {"load_ckpt_info": {"path": str(base)}}}
    if tensor is not None:  # ranks that share matrices read the same rows
        sections |= {"parallel": {"tensor": {"size": 2, "mode": tensor}}, "data": {"micro_num": 8 // world_size}}
    found = run(tmp_path, chain, world_size, **sections)
    assert found["losses"] == pytest.approx(tuned[1], rel=1e-5)
    assert norms_of(found) == pytest.approx(tuned[2], rel=1e-4)  # Adam would forgive gradients of a wrong scale
    trained, expected = (NativeReader(folder) for folder in (tmp_path, tuned[0]))
    for name in filter(is_adapter, expected.names()):
        torch.testing.assert_close(trained.read(name), expected.read(name), atol=1e-5, rtol=1e-4)


def test_a_killed_run_goes_on_bit_by_bit(base: Path, tmp_path: Path) -> None:
    sections = {"model": {"dtype": "torch.bfloat16"}, "lora": {**LORA, "dropout": 0.3}, "adam": ADAM}
    sections["ckpt"] = {"load_ckpt_info": {"path": str(base)}, "checkpoint_every": 3}
    config = run_config((2, 2, 2), 2, 6, **sections)
    whole = run_ranks(2, train, config, tmp_path / "whole")[0]["losses"]
    first = run_ranks(2, train, config, tmp_path / "parts", 3)[0]["losses"]
    rest = run_ranks(2, train, config, tmp_path / "parts")[0]["losses"]
    assert first + rest == whole
    reader, name = NativeReader(tmp_path / "whole"), "layers.0.attention.wo"
    start, lora_a, lora_b = (
        source.read(f"{name}.{kind}").bfloat16().double()
        for source, kind in ((NativeReader(base), "weight"), (reader, "lora_a"), (reader, "lora_b"))
    )
    expected = start + LORA["alpha"] / LORA["rank"] * lora_b @ lora_a
    assert (expected - start).abs().max() > 0.01  # what is merged is not rounded to the base's 16 bits
    torch.testing.assert_close(reader.read(f"{name}.weight").double(), expected, atol=1e-7, rtol=1e-6)


def test_no_adapter_is_lost_on_the_way_into_another_run(tuned: Tuned, tmp_path: Path) -> None:
    """The merged model and the same adapters begin at the same loss; other settings are refused."""
    start = tuned[0] / "checkpoints" / "6"
    reader = NativeReader(start)
    export_hf(reader.read, reader.config, tmp_path / "merged", dtype="float32")
    merged = {"load_ckpt_info": {"path": str(tmp_path / "merged"), "ckpt_type": "hf"}}
    still = {"adam": {"lr": 0.0}}
    expected = run(tmp_path / "full", (1, 1, 1), 1, lora=None, ckpt=merged, **still)["losses"]
    load = {"load_ckpt_info": {"path": str(start)}}
    assert run(tmp_path / "same", (1, 1, 1), 1, ckpt=load, **still)["losses"] == pytest.approx(expected, rel=1e-5)
    for lora in (None, {**LORA, "alpha": 4.0}, {**LORA, "rank": 2}, {**LORA, "target": ("*.attention.w*",)}):
        config = run_config((1, 1, 1), 1, 1, lora=lora, ckpt=load)
        (problem,) = find_checkpoint_problems(config)
        assert "holds adapters: its lora section is {'rank': 4, 'alpha': 8.0" in problem and "convert2hf" in problem
    with pytest.raises(AssertionError, match="holds adapters"):
        run(tmp_path / "lost", (1, 1, 1), 1, lora=None, ckpt=load)


@pytest.fixture(scope="module")
def in_4_bits(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("nf4")
    load = {"load_ckpt_info": {"path": str(base)}, "checkpoint_every": 3}
    return folder, run(folder, (1, 1, 1), 1, lora={**LORA, "base": "nf4"}, ckpt=load)["losses"]


def test_projections_in_4_bits_have_the_values_of_bitsandbytes(
    base: Path, in_4_bits: tuple[Path, list[float]], tmp_path: Path
) -> None:
    """And training is that of a base with these values in full precision."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    folder, losses = in_4_bits
    before, after = global_tensors(base), global_tensors(folder / "checkpoints" / "6")
    changed = 0
    for name in (name for name, kind in before if kind == "param"):
        value, found = (torch.from_numpy(bits[name, "param"]).view(torch.float32) for bits in (before, after))
        if fnmatch(name, "layers.*.w*.weight"):
            codes, state = quantize_4bit(value.flatten(), blocksize=64, quant_type="nf4", compress_statistics=False)
            assert not torch.equal(found, value)
            value, changed = dequantize_4bit(codes, state).view_as(value), changed + 1
        assert torch.equal(found, value), name
    assert changed == 2 * 4
    still = {"lora": {**LORA, "base": "nf4"}, "adam": {"lr": 0.0}, "ckpt": {"load_ckpt_info": {"path": str(base)}}}
    run(tmp_path / "still", (1, 1, 1), 1, **still)
    rounded = {"load_ckpt_info": {"path": str(tmp_path / "still" / "checkpoints" / "6")}}
    assert run(tmp_path / "full", (1, 1, 1), 1, ckpt=rounded)["losses"] == losses


@pytest.mark.parametrize(("world_size", "chain"), [(2, (1, 1, 2)), (2, (2, 2, 2)), (4, (2, 2, 4))])
def test_every_zero_class_trains_on_4_bits(
    base: Path, in_4_bits: tuple[Path, list[float]], tmp_path: Path, world_size: int, chain: Chain
) -> None:
    load = {"load_ckpt_info": {"path": str(base)}}
    losses = run(tmp_path, chain, world_size, lora={**LORA, "base": "nf4"}, ckpt=load)["losses"]
    assert losses == pytest.approx(in_4_bits[1], rel=1e-5)


def test_4_bits_with_tensor_parallel(base: Path, in_4_bits: tuple[Path, list[float]], tmp_path: Path) -> None:
    """Blocks of 64 numbers begin anew in each rank's part, so weights round otherwise there: close, and not equal."""
    sections = {"ckpt": {"load_ckpt_info": {"path": str(base)}}, "parallel": {"tensor": {"size": 2}}}
    config = run_config((1, 1, 1), 1, 6, lora={**LORA, "base": "nf4"}, adam=ADAM, **sections)
    losses = run_ranks(2, train, config, tmp_path)[0]["losses"]
    assert losses == pytest.approx(in_4_bits[1], rel=2e-3)


def test_a_run_on_4_bits_goes_on_bit_by_bit(base: Path, in_4_bits: tuple[Path, list[float]], tmp_path: Path) -> None:
    load = {"load_ckpt_info": {"path": str(base)}, "checkpoint_every": 3}
    config = run_config((1, 1, 1), 1, 6, lora={**LORA, "base": "nf4"}, adam=ADAM, ckpt=load)
    first = run_ranks(1, train, config, tmp_path, 3)[0]["losses"]
    rest = run_ranks(1, train, config, tmp_path)[0]["losses"]
    assert first + rest == in_4_bits[1]
    last = [folder / "checkpoints" / "6" for folder in (in_4_bits[0], tmp_path)]
    assert contents(last[0]) == contents(last[1])


def test_refusals() -> None:
    lora = {"dropout": 0.1, "target": ("*.mlp", "*.attention.wqkv")}
    config = run_config((1, 1, 1), 2, lora=lora, model={"checkpoint": True}, parallel={"tensor": {"size": 2}})
    problems = "\n".join(find_problems(config, 2))
    assert "lora.target: *.mlp matches no projection" in problems and "target: *.attention" not in problems
    assert "would leave out others of the inputs" in problems and "would draw other numbers" in problems
    assert "lora: the frozen weights are those of ckpt.load_ckpt_info, which is not set" in problems
    for shared, fit in ((0, "some of attention.wqkv, attention.wo as in"), (1, "wo, feed_forward.shared.w13, feed")):
        model = {"num_experts": 4, "moe": {"num_shared_experts": shared}}
        problems = "\n".join(find_problems(run_config((1, 1, 1), 1, lora={}, model=model)))
        assert "*.feed_forward.w* matches no projection of" in problems and fit in problems
    with pytest.raises(ValidationError, match=r"lora\.target"):
        run_config((1, 1, 1), 1, lora={"target": ()})
