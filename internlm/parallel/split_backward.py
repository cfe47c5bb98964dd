"""Backward in two parts, for schedules that fill bubbles: first the gradients of the input, for which the previous
stage waits, later those of the weights, for which nobody does (zero bubble, Qi et al., 2023).

A weight's path joins the path from input to output in one node of autograd's graph: the matrix product, the norm. In
the first part the gradient that arrives there is noted; in the second each such node computes the gradient of its
weights from it, and nothing else runs. The weights' hooks see their gradients as in any backward.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


@dataclass
class Join:
    """A node of the graph where weights join, and the gradients that arrived there."""

    node: Node
    weights: list[nn.Parameter]
    arrived: tuple[Tensor | None, ...] = field(default=())

    def take(self, gradients: tuple[Tensor | None, ...]) -> None:
        self.arrived = gradients


def backward_input(
    output: Tensor,
    gradient: Tensor | None,
    x: Tensor,
    at_once: Sequence[nn.Parameter],
    later: Sequence[nn.Parameter],
) -> list[Join]:
    """Adds the gradient of the leaf `x`, and those of the weights `at_once`.

    Args:
        output: computed from `x`; its `gradient` is None for a scalar.
        at_once: weights whose gradients can't wait: of blocks that would be recomputed once more.
        later: the other weights.

    Returns:
        What `backward_weights` needs, in the order of this backward. It holds the graph.
    """
    joins = _find_joins(output, x, later)
    handles = [join.node.register_prehook(join.take) for join in joins]
    torch.autograd.backward(output, gradient, inputs=[x, *at_once], retain_graph=True)
    for handle in handles:
        handle.remove()
    return joins


def backward_weights(joins: Iterable[Join]) -> None:
    """Adds the gradients of the weights that were left. Joins are used up."""
    for join in joins:
        edges = [GradientEdge(join.node, index) for index, value in enumerate(join.arrived) if value is not None]
        gradients = [value for value in join.arrived if value is not None]
        join.arrived = ()
        if edges:  # a part of the chunk that the loss doesn't depend on got none
            torch.autograd.backward(edges, gradients, inputs=join.weights)


def _find_joins(output: Tensor, x: Tensor, weights: Sequence[nn.Parameter]) -> list[Join]:
    """Where `weights` join the path from `x` to `output`, in the order of backward."""
    by_node = {get_gradient_edge(weight).node: weight for weight in weights}
    start = get_gradient_edge(x).node
    leads = {start}  # nodes through which the gradient of x passes
    below: dict[Node, list[nn.Parameter]] = {}  # other nodes: the weights whose gradients pass through them
    joins = []
    for node in _sources_first(get_gradient_edge(output).node):
        if node is start:
            continue
        sources = [source for source, _ in node.next_functions if source is not None]
        reached = list(dict.fromkeys(weight for source in sources for weight in below.get(source, [])))
        if leads.isdisjoint(sources):
            below[node] = [by_node[node]] if node in by_node else reached
            continue
        leads.add(node)
        if reached:
            joins.append(Join(node, reached))
    found = [weight for join in joins for weight in join.weights]
    assert len(found) == len(set(found)), "a weight joins the path in two places: its gradient would come twice"
    return joins[::-1]


def _sources_first(root: Node) -> list[Node]:
    """All nodes of a graph, each after those that its gradients go to."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((source, False) for source, _ in node.next_functions if source is not None)
    return order
