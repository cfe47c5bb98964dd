"""Backward in two parts gives the gradients of one: that of the input first, no weight's before its turn."""

import pytest
import torch
from torch import Tensor, nn

from internlm.parallel.split_backward import backward_input, backward_weights


class Net(nn.Module):
    """A residual block with a norm, and "experts": slices of one weight for parts of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.norm, self.experts = nn.LayerNorm(6), nn.Parameter(torch.randn(3, 6, 6))
        self.unused = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.second(torch.tanh(self.first(self.norm(x))))
        parts = zip(x.split(2), self.experts.unbind(), strict=True)
        return x + torch.cat([part @ weight for part, weight in parts])


@pytest.fixture
def case() -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randn(6, 6, requires_grad=True), torch.randn(6, 6)


def test_gradients_are_those_of_one_backward(case: tuple[Net, Tensor, Tensor]) -> None:
    net, x, grad = case
    used = [parameter for name, parameter in net.named_parameters() if name != "unused"]
    expected = torch.autograd.grad(net(x), [x, *used], grad)
    fired: list[int] = []
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda weight: fired.append(id(weight)))
    joins = backward_input(net(x), grad, x, [net.second.weight], [p for p in used if p is not net.second.weight])
    assert x.grad is not None and torch.equal(x.grad, expected[0])
    assert fired == [id(net.second.weight)]
    backward_weights(joins)
    assert sorted(fired) == sorted(map(id, used))  # each hook once, that of the sliced weight as well
    for parameter, wanted in zip(used, expected[1:], strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-6, atol=1e-7)
    assert net.unused.grad is None


def test_weights_come_in_the_order_of_backward(case: tuple[Net, Tensor, Tensor]) -> None:
    net, x, grad = case
    later = [parameter for parameter in net.parameters() if parameter is not net.unused]
    joins = backward_input(net(x), grad, x, [], later)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    order = [sorted(names[id(weight)] for weight in join.weights) for join in joins]
    assert order == [["experts"], ["second.weight"], ["first.bias", "first.weight"], ["norm.bias", "norm.weight"]]


def test_the_second_part_computes_weights_alone(case: tuple[Net, Tensor, Tensor]) -> None:
    net, x, grad = case
    joins = backward_input(net(x), grad, x, [], [net.first.weight, net.experts])
    before = x.grad
    assert before is not None
    before = before.clone()
    backward_weights(joins)
    backward_weights(joins)  # used up
    assert torch.equal(x.grad, before) and net.second.weight.grad is None  # type: ignore[arg-type]
