"""Switches, names, dtypes and construction of the transformer. Equality with transformers is in test_hf_parity.py."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from internlm.config.schema import Config
from internlm.model.batch import IGNORE_INDEX
from internlm.model.transformer import Transformer, build_model
from tests.model.tiny import random_batch, random_model, tiny_config

EVERYTHING = {
    "qkv_bias": True,
    "out_bias": True,
    "qk_norm": True,
    "head_dim": 12,
    "qk_interleaved": True,
    "norm_head": True,
    "embed_grad_scale": 0.1,
    "tie_word_embeddings": True,
}


def gradients(model: Transformer, batch, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.loss(batch, **options).loss_sum.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_parameter_names_and_shapes():
    config = tiny_config(qkv_bias=True, out_bias=True, qk_norm=True, num_layers=1)
    shapes = {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}
    assert shapes == {
        "embedding.weight": (61, 32),
        "layers.0.attention_norm.weight": (32,),
        "layers.0.attention.wqkv.weight": (2, 4, 8, 32),
        "layers.0.attention.wqkv.bias": (2, 4, 8),
        "layers.0.attention.q_norm.weight": (8,),
        "layers.0.attention.k_norm.weight": (8,),
        "layers.0.attention.wo.weight": (32, 32),
        "layers.0.attention.wo.bias": (32,),
        "layers.0.ffn_norm.weight": (32,),
        "layers.0.feed_forward.w13.weight": (2, 48, 32),
        "layers.0.feed_forward.w2.weight": (32, 48),
        "head.norm.weight": (32,),
        "head.weight": (61, 32),
    }
    assert "head.weight" not in dict(Transformer(tiny_config(tie_word_embeddings=True)).named_parameters())


def test_built_on_meta_with_fp32_norms():
    config = Config(
        use_fp32_norm=True,
        model=tiny_config(dtype="torch.bfloat16", qk_norm=True),
        data={"seq_len": 8, "total_steps": 1},
    )
    model = build_model(config)
    assert all(p.is_meta for p in model.parameters()) and not list(model.buffers())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("norm.weight") else torch.bfloat16), name


@pytest.mark.parametrize("use_fp32_norm", [False, True])
@pytest.mark.parametrize("residual_in_fp32", [False, True])
def test_16_bit_models_are_near_fp32(use_fp32_norm, residual_in_fp32):
    options = {**EVERYTHING, "residual_in_fp32": residual_in_fp32}
    model = random_model(tiny_config(dtype="torch.bfloat16", **options), use_fp32_norm=use_fp32_norm)
    exact = random_model(tiny_config(**options))
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    batch = random_batch((9, 1, 14))
    stream = []
    model.layers[-1].register_forward_hook(lambda *args: stream.append(args[-1].dtype))
    logits = model(batch)
    assert logits.dtype == torch.bfloat16
    assert stream == [torch.float32 if residual_in_fp32 else torch.bfloat16]
    assert (logits - exact(batch)).norm() / exact(batch).norm() < 3e-2
    ours, theirs = gradients(model, batch), gradients(exact, batch)
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() / expected.norm() < 0.1, name


def test_fp32_residual_is_the_same_in_fp32():
    batch = random_batch((24,))
    plain, switched = (random_model(tiny_config(residual_in_fp32=flag)) for flag in (False, True))
    assert torch.equal(plain(batch), switched(batch))


@pytest.mark.parametrize("options", [{}, {"norm_head": True}, EVERYTHING], ids=["plain", "norm_head", "everything"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_cross_entropy_of_the_logits(options, smoothing):
    model, batch = random_model(tiny_config(**options)), random_batch((9, 1, 14))
    model.zero_grad()
    expected = F.cross_entropy(
        model(batch), batch.labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing
    )
    expected.backward()
    expected_grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    torch.testing.assert_close(model.loss(batch, smoothing).loss_sum, expected, rtol=1e-6, atol=0)
    for name, grad in gradients(model, batch, label_smoothing=smoothing).items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-5)


def test_norm_head_divides_rows_by_their_norm():
    model, batch = random_model(tiny_config(norm_head=True)), random_batch((12,))
    plain = random_model(tiny_config())
    with torch.no_grad():
        plain.head.weight.div_(plain.head.weight.square().sum(1, keepdim=True).sqrt())
        torch.testing.assert_close(model(batch), plain(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_embed_grad_scale(tied):
    batch = random_batch((12, 8))
    full, scaled = (
        gradients(random_model(tiny_config(embed_grad_scale=s, tie_word_embeddings=tied)), batch) for s in (1.0, 0.1)
    )
    for name, grad in full.items():
        factor = 0.1 if name in ("embedding.weight", "head.weight") else 1.0
        torch.testing.assert_close(scaled[name], grad * factor, rtol=1e-5, atol=1e-6)


def test_interleaved_rotary_is_half_split_with_permuted_rows():
    batch = random_batch((15, 5))
    half, interleaved = (random_model(tiny_config(qk_interleaved=flag, qkv_bias=True)) for flag in (False, True))
    rows = torch.arange(8).view(2, 4).T.flatten()  # row 2j of interleaved is row j of half-split, 2j + 1 is j + d/2
    with torch.no_grad():
        for ours, theirs in zip(interleaved.layers, half.layers, strict=True):
            for kind in ("weight", "bias"):
                source, target = getattr(theirs.attention.wqkv, kind), getattr(ours.attention.wqkv, kind)
                target[:, :-1] = source[:, :-1, rows]  # queries and keys; values stay
        assert (half(batch) - random_model(tiny_config(qk_interleaved=True, qkv_bias=True))(batch)).abs().max() > 1e-3
        torch.testing.assert_close(interleaved(batch), half(batch), rtol=1e-5, atol=1e-5)


def test_hooks_fire_on_embedding_blocks_and_head():
    model = random_model(tiny_config(tie_word_embeddings=True))
    called = []
    for name in ("embedding", "layers.0", "layers.1", "head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    model.loss(random_batch((12,)))
    assert called == ["embedding", "layers.0", "layers.1", "head"]


def test_parameters_can_be_views_of_one_buffer():
    """The engine replaces storages after construction: nothing may hold on to the first ones."""
    model, batch = random_model(tiny_config(**EVERYTHING)), random_batch((12, 3))
    expected = model(batch)
    buffer = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    offset = 0
    for parameter in model.parameters():
        count = parameter.numel()
        parameter.data = buffer[offset : offset + count].view_as(parameter)
        offset += count
    assert torch.equal(model(batch), expected)
    buffer.mul_(1.5)
    assert not torch.equal(model(batch), expected)


@pytest.mark.parametrize("lengths", [(12, 12), (9, 1, 14)])
def test_blocks_recompute(lengths):
    model, batch = random_model(tiny_config(**EVERYTHING)), random_batch(lengths)
    expected = gradients(model, batch)
    for block in model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for name, grad in gradients(model, batch).items():
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("lengths", [(12, 12), (9, 1, 14)])
def test_blocks_compile_without_a_break(lengths):
    model, batch = random_model(tiny_config(**EVERYTHING)), random_batch(lengths)
    expected = gradients(model, batch)
    for block in model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    for name, grad in gradients(model, batch).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)
