"""Backward in two parts, for schedules that fill bubbles: first the gradients of the input, for which the previous
stage waits, later those of the weights, for which no stage waits (zero bubble, Qi et al., 2023).

A weight's path joins the path from input to output in one node of autograd's graph: the matrix product, the norm. In
the first part the gradient that arrives there is noted; in the second each such node computes the gradient of its
weights from it, and nothing else runs. The weights' hooks see their gradients as in any backward.

A weight may join in several nodes that don't depend on one another, such as the stacked weight of experts that are
computed one after another. These nodes are computed together, so that the weight still gets one gradient.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


@dataclass(eq=False)
class Join:
    """Nodes of the graph where the same weights join, and the gradients that arrived there."""

    nodes: list[Node]
    weights: list[nn.Parameter]
    arrived: dict[Node, tuple[Tensor | None, ...]] = field(default_factory=dict)


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
    handles = [node.register_prehook(partial(join.arrived.__setitem__, node)) for join in joins for node in join.nodes]
    torch.autograd.backward(output, gradient, inputs=[x, *at_once], retain_graph=True)
    for handle in handles:
        handle.remove()
    return joins


def backward_weights(joins: Iterable[Join]) -> None:
    """Adds the gradients of the weights that were left. Joins are used up."""
    for join in joins:
        arrived = [
            (GradientEdge(node, index), value)
            for node, values in join.arrived.items()
            for index, value in enumerate(values)
            if value is not None
        ]
        join.arrived.clear()
        if arrived:  # a part of the chunk that the loss doesn't depend on got none
            edges, gradients = zip(*arrived, strict=True)
            torch.autograd.backward(edges, gradients, inputs=join.weights)


def _find_joins(output: Tensor, x: Tensor, weights: Sequence[nn.Parameter]) -> list[Join]:
    """Where `weights` join the path from `x` to `output`, in the order of backward."""
    by_node = {get_gradient_edge(weight).node: weight for weight in weights}
    start = get_gradient_edge(x).node
    leads = {start}  # nodes through which the gradient of x passes
    below: dict[Node, list[nn.Parameter]] = {}  # other nodes: the weights whose gradients pass through them
    joins: list[Join] = []
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
            _add(joins, Join([node], reached))
    return joins[::-1]


def _add(joins: list[Join], new: Join) -> None:
    """Appends a join, together with those that share a weight with it."""
    ids = {id(weight) for weight in new.weights}
    for join in [join for join in joins if not ids.isdisjoint(map(id, join.weights))]:
        joins.remove(join)
        new = Join([*join.nodes, *new.nodes], list(dict.fromkeys([*join.weights, *new.weights])))
    joins.append(new)


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
