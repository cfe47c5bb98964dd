"""Folders of every generation of 2023 hold what was put into them, and compute what transformers computes."""

import os
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from internlm.checkpoint.hf import export_hf
from internlm.checkpoint.legacy.reader import LegacyReader
from internlm.model.transformer import Transformer
from internlm.utils.errors import UserError
from tests.checkpoint import folders_2023 as old
from tests.checkpoint.runs import edited
from tests.model.tiny import random_batch

MODELS: dict[str, old.Generation] = {
    "0.1_tp2": old.V01.at(tp=2),
    "0.2_tp2_pp2": old.V02.at(tp=2, pp=2, zero=2),
    "0.2.1_tp4": old.V021.at(tp=4, split_hidden=False),
    "0.2.1_pp2_chunks2": old.V021.at(pp=2, chunks=2, zero=3),
    "0.2.1_overlap": old.V021.at(zero=2, overlap=True),
    "0.2.1_fp32": old.V021.at(dtype=torch.float32, zero=2),
    "evo0.2_internlm2_tp2": old.EVO02_INTERNLM2.at(tp=2, adapt_hf=False, split_hidden=False),
    "evo0.2_llama2_tp2_pp2": old.EVO02_LLAMA2.at(tp=2, pp=2),
    "evo0.3.2_pp3": old.EVO032.at(pp=3),
    "evo0.3.3_tp2_chunks4": old.EVO033.at(tp=2, chunks=4),
    "evo_internlm2_tp2_pp2_chunks2": old.EVO_INTERNLM2.at(tp=2, pp=2, chunks=2, zero=2),
    "evo_internlm2_bias": old.EVO_INTERNLM2.at(tp=2, bias=True),
    "evo_llama2_interleaved": old.EVO_LLAMA2.at(adapt_hf=False),
    "0.2.1_moe_tp2_pp2": old.V021_MOE.at(tp=2, pp=2, zero=4),
    "0.2.1_moe_groups": old.V021_MOE.at(groups=("default", "fp32", "norm", "gate", "moe_ep_size_4"), ep=4, zero=4),
    "evo_moe_pp2_chunks2": old.EVO_MOE.at(pp=2, chunks=2),
    "evo_isp": old.EVO_ISP.at(tp=2, wp=4, dp=4, pp=2),
    "evo_isp_wide": old.EVO_ISP.at(tp=4, wp=2, dp=2),
    "evo_isp_bias": old.EVO_ISP.at(tp=2, wp=2, dp=1, bias=True),
    "evo_isp_internlm": old.EVO033.at(groups=("default", "embed_head", "fp32"), tp=1, wp=4, dp=4),
}


def of_transformers(generation: old.Generation, weights: old.Weights) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "vocab_size": len(weights["lm_head.weight"]),
        "hidden_size": old.HIDDEN,
        "intermediate_size": old.FFN,
        "num_hidden_layers": old.LAYERS,
        "num_attention_heads": old.HEADS,
        "num_key_value_heads": generation.kv_heads,
        "attention_bias": generation.bias,
        "rms_norm_eps": 1e-5,
    }
    if generation.num_experts == 1:
        return LlamaForCausalLM.from_pretrained(None, config=LlamaConfig(**sizes), state_dict=weights)
    experts = {"num_local_experts": generation.num_experts, "attention_multiplier": old.HEAD**-0.5}
    return GraniteMoeForCausalLM.from_pretrained(None, config=GraniteMoeConfig(**sizes, **experts), state_dict=weights)


COMPUTED = ("0.2_tp2_pp2", "evo0.2_internlm2_tp2", "evo_llama2_interleaved", "0.2.1_moe_tp2_pp2", "evo_isp_internlm")


@pytest.mark.parametrize("name", COMPUTED)
@torch.no_grad()
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    generation = MODELS[name].at(dtype=torch.float32)
    weights = old.random_weights(generation)
    old.write(tmp_path / "7", generation, weights)
    reader = LegacyReader(tmp_path / "7")
    model = Transformer(reader.config.model).eval()
    for parameter_name, parameter in model.named_parameters():
        parameter.copy_(reader.read(parameter_name))
    batch = random_batch((23,), old.VOCAB)
    theirs = of_transformers(generation, weights)(batch.tokens[None]).logits[0]
    torch.testing.assert_close(model(batch), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_weights_masters_and_moments_are_those_that_were_written(name: str, tmp_path: Path) -> None:
    """An export of each kind, under the generator's names again, equals what that was given."""
    generation = MODELS[name]
    masters, *moments = (old.random_weights(generation, seed) for seed in range(3))
    old.write(tmp_path / "7", generation, masters, (moments[0], moments[1]))
    reader = LegacyReader(tmp_path / "7", top_k=2)
    config = reader.config.model_copy(
        update={"model": reader.config.model.model_copy(update={"dtype": "torch.float32", "norm_head": False})}
    )
    saved = {key: value if ".router." in key else value.to(generation.dtype) for key, value in masters.items()}
    arch = "llama" if generation.num_experts == 1 else "granitemoe"
    for kind, expected in {"param": saved, "master": masters, "exp_avg_sq": moments[1]}.items():
        export_hf(lambda name, kind=kind: reader.read(name, kind), config, tmp_path / kind, arch)
        found = load_file(tmp_path / kind / "model.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value.float()), (kind, key)


def test_a_plan_that_is_lost_is_made_again(tmp_path: Path) -> None:
    generation = old.V02.at(zero=3, plan="none")
    masters, *moments = (old.random_weights(generation, seed) for seed in range(3))
    old.write(tmp_path / "7", generation, masters, (moments[0], moments[1]))
    down = LegacyReader(tmp_path / "7").read("layers.2.feed_forward.w2.weight", "exp_avg")
    assert torch.equal(down, moments[0]["model.layers.2.mlp.down_proj.weight"])

    old.write(tmp_path / "8", generation.at(overlap=True), masters, (moments[0], moments[1]))
    with pytest.raises(UserError, match=r"holds \d+ elements, its plan says"):
        LegacyReader(tmp_path / "8").read("head.weight", "master")


def test_what_was_detected_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    generation = old.V02.at(tp=2)
    old.write(tmp_path / "7", generation, old.random_weights(generation))
    with caplog.at_level("INFO", "internlm"):
        LegacyReader(tmp_path / "7")
        LegacyReader(tmp_path / "7")  # looked at before ranks start, and opened to be loaded
    assert caplog.text.count("keys start with 'model.', gate w1, up w2, down w3") == 1
    assert "tensor size 2" in caplog.text


def test_square_feed_forwards_are_ambiguous(tmp_path: Path) -> None:
    for name, generation in {"old": old.V02, "new": old.EVO033}.items():
        weights = old.random_weights(generation, ffn=old.HIDDEN)
        old.write(tmp_path / name, generation, weights)
        with pytest.raises(UserError, match="don't tell which is the output"):
            LegacyReader(tmp_path / name)
        read = LegacyReader(tmp_path / name, mlp=name).read("layers.1.feed_forward.w2.weight")  # type: ignore[arg-type]
        assert torch.equal(read, weights["model.layers.1.mlp.down_proj.weight"].bfloat16())
    old.write(tmp_path / "told", old.V02, old.random_weights(old.V02))
    with pytest.raises(UserError, match="by its shapes w3 is the output of the feed-forward layer; omit --version"):
        LegacyReader(tmp_path / "told", mlp="new")
    generation = old.EVO_INTERNLM2  # whose names never changed
    weights = old.random_weights(generation, ffn=old.HIDDEN)
    old.write(tmp_path / "internlm2", generation, weights)
    read = LegacyReader(tmp_path / "internlm2").read("layers.1.feed_forward.w2.weight")
    assert torch.equal(read, weights["model.layers.1.mlp.down_proj.weight"].bfloat16())


MLP = "model.blocks.0.mlp.w1.weight"


def _without(*names: str) -> Any:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("model_tp0_pp1.pt"), "lacks the model file of tp0 of pipeline stage 1"),
        (_without("model_tp1_pp0.pt", "model_tp1_pp1.pt"), "hidden_size|vocab_size=64.*say 32"),
        (_without("model_tp0_pp1.pt", "model_tp1_pp1.pt"), r"lacks norm\.weight"),
        (_without("model_config.pt"), "has no model_config.pt"),
        (_without("optimizer_tp1_pp0_zo1.pt"), "zero rank's file is missing"),
        (edited("model_tp1_pp0.pt", lambda s: s.pop("model.blocks.0.mlp.w1.weight")), "which other ranks have"),
        (edited("model_tp0_pp0.pt", lambda s: s.update({"blocks.0.x": torch.ones(1)})), "of two generations"),
        (edited("model_tp0_pp0.pt", lambda s: s.update({"model.blocks.0.x": torch.ones(1)})), "is no part of INTERNLM"),
        (edited("model_tp0_pp0.pt", lambda s: s.update({"model.blocks.9.norm1.weight": torch.ones(1)})), "counts them"),
        (lambda folder: (folder / "model_tp0_pp0_dp0.pt").touch(), "FSDP"),
        (lambda folder: (folder / "model_moe_layer0_expert0_tp0.pt").touch(), "they are of a dense model"),
        (lambda folder: (folder / "model_tp0_wp0_pp0.pt").touch(), "mixes model files"),
        (lambda folder: (folder / "model_tp1_pp1.pt").write_bytes(b"PK"), "can't be read"),
        (lambda folder: torch.save([1], folder / "model_config.pt"), "holds a list"),
        (lambda folder: torch.save([1], folder / "model_tp0_pp0.pt"), "holds a list"),
        (lambda folder: os.truncate(folder / "model_tp1_pp0.pt", 5000), r"model_tp1_pp0\.pt can't be read"),
        (edited("model_tp0_pp0.pt", lambda s: s.update({5: torch.ones(1)})), "holds 5: a Tensor"),
        (edited("model_tp0_pp0.pt", lambda s: s.update({MLP: None})), f"{MLP}': a NoneType"),
        (edited("model_tp0_pp0.pt", lambda s: s.update({MLP: torch.ones(3)})), r"is \[3\], it needs 2 dimension"),
        (edited("model_tp1_pp0.pt", lambda s: s.update({MLP: "text"})), f"{MLP}': a str"),
        (edited("model_tp1_pp0.pt", lambda s: s.update({MLP: s[MLP][0]})), f"{MLP} has shapes .* that don't join"),
        (
            edited("model_tp1_pp0.pt", lambda s: s.update({MLP: s[MLP].double()})),
            f"{MLP} is torch.* on different ranks",
        ),
    ],
)
def test_damage_is_named(damage: Any, message: str, tmp_path: Path) -> None:
    generation = old.V021.at(tp=2, pp=2, zero=2)
    weights = old.random_weights(generation)
    old.write(tmp_path / "7", generation, weights, (weights, weights))
    damage(tmp_path / "7")
    with pytest.raises(UserError, match=message):
        reader = LegacyReader(tmp_path / "7")
        for name in ("layers.0.feed_forward.w13.weight", "head.weight", "layers.1.attention.wqkv.weight"):
            reader.read(name)
            reader.read(name, "master")


EXPERT = "model_moe_layer1_expert3_tp0.pt"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without(EXPERT), f"lacks {EXPERT}"),
        (_without("model_moe_layer0_expert0_tp1.pt"), "lacks model_moe_layer0_expert0_tp1.pt"),
        (lambda folder: (folder / "model_moe_layer4_expert0_tp0.pt").touch(), "of another run"),
        (lambda folder: (folder / EXPERT).rename(folder / "model_moe_layer1_expert4_tp0.pt"), "of another run"),
        (lambda folder: (folder / EXPERT).replace(folder / "model_moe_layer1_expert2_tp0.pt"), f"lacks {EXPERT}"),
        (lambda folder: copyfile(folder / EXPERT, folder / "model_moe_layer1_expert2_tp0.pt"), "not of expert 2"),
        (
            lambda folder: copyfile(
                folder / "model_moe_layer0_expert0_tp0.pt", folder / "model_moe_layer1_expert0_tp0.pt"
            ),
            "of different runs",
        ),
        (edited(EXPERT, lambda s: s.popitem()), "lacks .*w3.weight"),
        (edited("model_config.pt", lambda s: s.update(num_experts=8)), "model_config.pt says num_experts=8"),
        (edited("model_config.pt", lambda s: s.pop("moe_gate_k")), "--top_k"),
        (_without("optimizer_tp0_pp0_zo3.pt"), "zero rank's file is missing"),
    ],
)
def test_damaged_experts_are_named(damage: Any, message: str, tmp_path: Path) -> None:
    generation = old.V021_MOE.at(tp=2, zero=4)
    weights = old.random_weights(generation)
    old.write(tmp_path / "7", generation, weights, (weights, weights))
    damage(tmp_path / "7")
    with pytest.raises(UserError, match=message):
        reader = LegacyReader(tmp_path / "7")
        for kind in ("param", "master"):
            for name in ("0.feed_forward.experts.w13", "1.feed_forward.experts.w2", "0.feed_forward.router.weight"):
                reader.read(f"layers.{name}", kind)


def test_a_dense_layer_beside_the_experts(tmp_path: Path) -> None:
    generation = old.V021_MOE.at(residual=True, tp=2, dtype=torch.float32)
    weights = old.random_weights(generation)
    old.write(tmp_path / "7", generation, weights, (weights, weights))
    reader = LegacyReader(tmp_path / "7")
    assert reader.config.model.moe.num_shared_experts == 1 and reader.config.model.moe.mix_shared
    layer = "model.layers.1"
    for kind in ("param", "master"):
        w13 = reader.read("layers.1.feed_forward.shared.w13.weight", kind)
        assert torch.equal(w13[0], weights[f"{layer}.residual.gate"])
        assert torch.equal(w13[1], weights[f"{layer}.residual.up"])
        down = reader.read("layers.1.feed_forward.shared.w2.weight", kind)
        assert torch.equal(down, weights[f"{layer}.residual.down"])
        for name in ("weight", "bias"):
            mix = reader.read(f"layers.1.feed_forward.mix.{name}", kind)
            assert torch.equal(mix, weights[f"{layer}.coefficient.{name}"])
