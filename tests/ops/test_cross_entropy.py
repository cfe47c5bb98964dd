"""The chunked loss against F.cross_entropy on all logits."""

import pytest
import torch
from torch.nn import functional as F

from internlm.ops import cross_entropy as room
from internlm.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy, linear_cross_entropy_reference

TOKENS, SIZE, VOCAB = 37, 16, 50

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(params=[1, 8, 1000], autouse=True)
def rows_per_chunk(request, monkeypatch):
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", dict.fromkeys(("cpu", "cuda"), request.param * VOCAB))


def random_case(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, SIZE, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(VOCAB, SIZE, dtype=dtype, device=device, requires_grad=True)
    labels = torch.randint(VOCAB, (TOKENS,), device=device)
    labels[::5] = IGNORE_INDEX
    return hidden, weight, labels


def by_torch(hidden, weight, labels, smoothing):
    return F.cross_entropy(
        hidden @ weight.T, labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("upstream", [1.0, 0.25])
def test_loss_and_gradients_equal_torch(smoothing, upstream):
    hidden, weight, labels = random_case()
    expected = by_torch(hidden, weight, labels, smoothing)
    expected_grads = torch.autograd.grad(expected * upstream, (hidden, weight))
    out = linear_cross_entropy(hidden, weight, labels, smoothing)
    grads = torch.autograd.grad(out.loss_sum * upstream, (hidden, weight))
    torch.testing.assert_close(out.loss_sum, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6)


def test_weighted_tokens_equal_torch():
    hidden, weight, labels = random_case()
    weights = torch.randn(TOKENS)
    each = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE_INDEX, reduction="none")
    out = linear_cross_entropy(hidden, weight, labels, token_weights=weights)
    torch.testing.assert_close(out.loss_sum, each @ weights, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.token_losses, each.detach(), rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(out.loss_sum, (hidden, weight))
    for ours, theirs in zip(grads, torch.autograd.grad(each @ weights, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6)


def test_token_losses_and_predictions():
    hidden, weight, labels = random_case()
    best = (hidden @ weight.T).argmax(-1)
    labels[:10] = torch.where(labels[:10] == IGNORE_INDEX, labels[:10], best[:10])
    out = linear_cross_entropy(hidden, weight, labels, 0.1)
    expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(out.token_losses, expected.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(out.correct, best == labels) and out.correct.sum() >= 8
    assert not out.token_losses.requires_grad and out.loss_sum.requires_grad


def test_reference_says_the_same():
    hidden, weight, labels = random_case()
    ours, plain = (f(hidden, weight, labels, 0.2) for f in (linear_cross_entropy, linear_cross_entropy_reference))
    torch.testing.assert_close(ours.loss_sum, plain.loss_sum, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.token_losses, plain.token_losses, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.correct, plain.correct)


def test_row_without_trained_tokens():
    hidden, weight, labels = random_case()
    out = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE_INDEX), 0.1)
    out.loss_sum.backward()
    assert out.loss_sum == 0 and hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_only_wanted_gradients():
    hidden, weight, labels = random_case()
    out = linear_cross_entropy(hidden, weight.detach(), labels)
    (grad,) = torch.autograd.grad(out.loss_sum, hidden)
    (expected,) = torch.autograd.grad(by_torch(hidden, weight, labels, 0.0), hidden)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=5e-6)


def test_no_gradient_work_without_need(monkeypatch):
    def refuse(*_):
        raise AssertionError("gradient work in a forward without gradients")

    monkeypatch.setattr(room, "_to_gradient_", refuse)
    hidden, weight, labels = random_case()
    with torch.no_grad():
        out = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(out.loss_sum, by_torch(hidden, weight, labels, 0.0).detach(), rtol=1e-6, atol=0)


def test_extreme_logits():
    """Certain, hopeless and equal predictions: no overflow, no lost digits."""
    hidden = torch.tensor([[200.0], [-200.0], [0.0], [1e-3]], requires_grad=True)
    weight = torch.linspace(-1, 1, VOCAB)[:, None].requires_grad_()
    labels = torch.tensor([VOCAB - 1, VOCAB - 1, 3, 4])
    out = linear_cross_entropy(hidden, weight, labels)
    exact = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="none")
    torch.testing.assert_close(out.token_losses.double(), exact.detach(), rtol=1e-6, atol=1e-6)
    out.loss_sum.backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_backward_twice_gives_the_same():
    hidden, weight, labels = random_case()
    loss = linear_cross_entropy(hidden, weight, labels).loss_sum
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_z_loss(smoothing):
    hidden, weight, labels = random_case()
    expected = linear_cross_entropy_reference(hidden, weight, labels, smoothing, 1e-2).loss_sum
    found = linear_cross_entropy(hidden, weight, labels, smoothing, z_loss=1e-2).loss_sum
    plain = linear_cross_entropy(hidden, weight, labels, smoothing).loss_sum
    trained = labels != IGNORE_INDEX
    logits = (hidden @ weight.T)[trained]
    torch.testing.assert_close(found - plain, 1e-2 * logits.logsumexp(-1).square().sum(), rtol=1e-4, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_bf16_is_near_fp32(device):
    hidden, weight, labels = random_case(torch.bfloat16, device)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = by_torch(*exact, labels, 0.1)
    expected.backward()
    out = linear_cross_entropy(hidden, weight, labels, 0.1)
    out.loss_sum.backward()
    assert out.loss_sum.dtype == torch.float32
    torch.testing.assert_close(out.loss_sum.double(), expected, rtol=1e-2, atol=0)
    for ours, theirs in zip((hidden.grad, weight.grad), (exact[0].grad, exact[1].grad), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() / theirs.norm() < 2e-2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_fp16_gradients_are_rounded_after_the_loss_scale(device):
    """A model that is sure of its labels: gradients of 1e-7 and less, which float16 holds once they are scaled."""
    hidden, weight, _ = random_case(torch.float16, device)
    for tensor in (hidden, weight):
        tensor.data[:, 1:] /= 64
    hidden.data[:, 0], weight.data[:-1, 0], weight.data[-1, 0] = 1, 0, 14.5  # each other token has p = 5e-7
    labels = torch.full((TOKENS,), VOCAB - 1, device=device)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    scale = 2.0**16
    expected = torch.autograd.grad(by_torch(*exact, labels, 0.0) * scale, exact)
    found = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, labels, upstream=scale).loss_sum * scale, (hidden, weight)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).norm() / theirs.norm() < 3e-2  # fp16 logits near 14.5 are 0.8 % apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_comes_upstream_need_not_be_what_was_foretold(dtype):
    hidden, weight, labels = random_case(dtype)
    plain = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).loss_sum * 3, (hidden, weight))
    other = linear_cross_entropy(hidden, weight, labels, upstream=8.0).loss_sum
    for ours, expected in zip(torch.autograd.grad(other * 3, (hidden, weight)), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=3e-3, atol=1e-3)
