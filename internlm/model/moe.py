"""Mixture of experts: a feed-forward layer of which each token uses a few parts, chosen by a router.

    route     a score per expert for each token; the best top_k are chosen, their scores become weights
    dispatch  k rows a token, sorted by expert
    compute   every expert on its rows
    combine   each token's k outputs, weighted, are summed; shared experts, which see every token, are added

Two losses keep routers healthy. With T tokens in a packed row, E experts, k choices a token, p the scores as shares:

    balance   E * sum over experts e of f_e * P_e; f_e is the share of the choices that fell on e, P_e the mean of p_e.
              1 when all experts get the same. With balance_over="first" f counts first choices alone, as GShard does
              (Lepikhin et al., 2020); else all of them, as Switch Transformer and its followers do (Fedus et al., 2021)
    z         mean over tokens of logsumexp(logits)^2 (Zoph et al., 2022)

Both are of one row, padding included, and summed over layers; the objective has their mean over the rows of the step,
whatever the number of trained tokens in each. So they depend on no layout. `bias_rate` balances without a loss: a bias,
which only the choice sees, falls for experts with more than their share and rises for the others (Wang et al., 2024).

With a capacity factor an expert keeps at most that many times its fair share of a row, T k / E, in training: the
assignments of highest score, as in batch prioritized routing (Riquelme et al., 2021); the others are dropped, and a
token's weights are normalised over what is kept. Documents that begin alike have tokens that score alike but for
rounding, which every layout does otherwise: scores are compared in 11 bits, and of equals the earlier token goes first.

How a row lies on several ranks and where experts live isn't known here: `parallel/expert.py` replaces `MoE.row` and the
experts' forward.
"""

from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.config.schema import ModelConfig
from internlm.model.feed_forward import FeedForward
from internlm.ops.grouped_gemm import grouped_linear
from internlm.ops.swiglu import swiglu


class Routes(NamedTuple):
    """Which experts compute each token."""

    experts: Tensor  # int64 [tokens, top_k]
    weights: Tensor  # fp32 [tokens, top_k], with gradient
    kept: Tensor | None  # bool [tokens, top_k]; None: nothing was dropped


class RowPart:
    """How the tokens of a row lie on ranks: here, all on one."""

    num_parts = 1

    def enter(self, x: Tensor) -> Tensor:
        """The tokens that this rank routes, of those that it has."""
        return x

    def leave(self, y: Tensor, num_tokens: int) -> Tensor:
        """The outputs for all `num_tokens` tokens that this rank has."""
        return y

    def sum(self, counts: Tensor) -> Tensor:
        """The sum over all parts of the row."""
        return counts

    def gather(self, x: Tensor) -> Tensor:
        """x [tokens, ...] of all parts, in the order of the row: where scores tie, the earlier token comes first."""
        return x

    def own(self, x: Tensor) -> Tensor:
        """This rank's part of what `gather` returned."""
        return x


class Ledger:
    """What a router notes during a step, and how much its losses weigh in the objective of that step.

    It notes in backward: once a micro batch, also where blocks are recomputed, and never in evaluation.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.loss_weights = (0.0, 0.0)  # of balance and z, of each row
        self.sums: Tensor | None = None  # fp64 [experts + 3]: load, balance, z, dropped; None: nothing was noted

    def begin_step(self, balance: float, z: float) -> None:
        """Forgets the last step. The losses of each row are multiplied by these weights."""
        self.loss_weights, self.sums = (balance, z), None

    def add(self, facts: Tensor) -> None:
        self.sums = facts.double() if self.sums is None else self.sums + facts


class Router(nn.Module):
    """Scores of experts, the choice among them, and its losses."""

    bias: Tensor | None

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.num_experts = config.moe, config.num_experts
        dtype = torch.float32 if self.config.router_fp32 else dtype
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=dtype))
        self.register_buffer("bias", torch.zeros(config.num_experts) if self.config.bias_rate else None)
        self.ledger = Ledger(config.num_experts)

    def forward(self, x: Tensor, row: RowPart) -> tuple[Routes, Tensor | None]:
        """x [tokens, hidden] -> the routes of these tokens, and what to `note` of them, fp32 [experts + 3], if there is
        a backward."""
        logits = F.linear(x.to(self.weight.dtype), self.weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = logits.softmax(-1) if self.config.score == "softmax" else logits.sigmoid()
        with torch.no_grad():
            chosen = (scores if self.bias is None else scores + self.bias).topk(self.config.top_k, -1).indices
        weights, kept = scores.gather(-1, chosen), None
        if self.training and self.config.capacity_factor is not None:
            kept = self._within_capacity(chosen, weights, row)
            weights = weights * kept
        if self.config.normalises:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        facts = self._facts(logits, scores, chosen, kept, row) if torch.is_grad_enabled() else None
        return Routes(chosen, weights, kept), facts

    @torch.no_grad()
    def _within_capacity(self, chosen: Tensor, weights: Tensor, row: RowPart) -> Tensor:
        """Which assignments their expert takes: bool [tokens, top_k]. Every rank of the row finds the same."""
        experts, scores = row.gather(chosen), row.gather(weights)
        assert self.config.capacity_factor is not None
        capacity = max(ceil(experts.numel() / self.num_experts * self.config.capacity_factor), self.config.min_capacity)
        by_score = scores.flatten().half().argsort(descending=True, stable=True)
        order = by_score[experts.flatten()[by_score].argsort(stable=True)]  # by expert, then by falling score
        counts = _count(experts, self.num_experts)
        starts = counts.cumsum(0) - counts
        places = torch.arange(len(order), device=order.device) - starts[experts.flatten()[order]]
        kept = torch.empty_like(places, dtype=torch.bool)
        kept[order] = places < capacity
        return row.own(kept.view_as(experts))

    def _facts(self, logits: Tensor, scores: Tensor, chosen: Tensor, kept: Tensor | None, row: RowPart) -> Tensor:
        """This rank's terms of load [experts], balancing loss, z-loss, and dropped assignments."""
        row_tokens = len(logits) * row.num_parts
        load = _count(chosen, self.num_experts)
        counted = chosen[:, :1] if self.config.balance_over == "first" else chosen
        fractions = row.sum(_count(counted, self.num_experts)) / (row_tokens * counted.shape[1])
        shares = scores / scores.sum(-1, keepdim=True) if self.config.score == "sigmoid" else scores
        balance = self.num_experts * (fractions * shares.sum(0)).sum() / row_tokens
        z = logits.logsumexp(-1).square().sum() / row_tokens
        dropped = torch.zeros_like(balance) if kept is None else (~kept).sum()
        return torch.cat((load.to(z.dtype), torch.stack((balance, z, dropped.to(z.dtype)))))

    @torch.no_grad()
    def move_bias(self, loads: Tensor, ok: Tensor) -> None:
        """After a step (`ok` bool []: it was made): experts with more than their share, a load above 1, lose."""
        if self.bias is not None and self.weight.requires_grad:  # beside adapters, all of the router is frozen
            self.bias += self.config.bias_rate * (1 - loads).sign() * ok

    def note(self, y: Tensor, facts: Tensor | None) -> Tensor:
        """y itself; in its backward the losses join the objective, and the ledger takes note."""
        # `requires_grad_`: of a frozen router that no trained weight comes before, the ledger takes note as well.
        return y if facts is None else _Note.apply(y, facts.requires_grad_(), self.ledger)


class _Note(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, facts: Tensor, ledger: Ledger) -> Tensor:
        ctx.ledger = ledger
        ctx.save_for_backward(facts)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (facts,) = ctx.saved_tensors
        ctx.ledger.add(facts)
        weights = torch.zeros_like(facts)
        weights[-3], weights[-2] = ctx.ledger.loss_weights
        return grad, weights, None


class Experts(nn.Module):
    """Gated feed-forward layers side by side; see `FeedForward`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        experts, hidden, size = config.num_experts, config.hidden_size, config.expert_size
        self.w13 = nn.Parameter(torch.empty(experts, 2, size, hidden, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, size, dtype=dtype))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [rows, hidden] in order of their expert, counts int64 [experts] -> [rows, hidden]."""
        gate_up = grouped_linear(rows, self.w13.flatten(1, 2), counts).unflatten(-1, self.w13.shape[1:3])
        return grouped_linear(swiglu(gate_up), self.w2, counts)


class Mix(nn.Module):
    """Weights of routed and shared output: softmax(W x + b), as the 2023 framework's `moe_use_residual`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, config.hidden_size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(2, dtype=dtype))

    def forward(self, x: Tensor, routed: Tensor, shared: Tensor) -> Tensor:
        """All [tokens, hidden]."""
        shares = F.linear(x, self.weight, self.bias).softmax(-1)
        return shares[:, :1] * routed + shares[:, 1:] * shared


class MoE(nn.Module):
    """The feed-forward layer of a block whose model has experts."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        moe = config.moe
        self.row = RowPart()
        self.router = Router(config, dtype)
        self.experts = Experts(config, dtype)
        self.shared = None
        if moe.num_shared_experts:
            self.shared = FeedForward(config, dtype, moe.num_shared_experts * config.expert_size)
        self.mix = Mix(config, dtype) if moe.mix_shared else None

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        own = self.row.enter(x)
        routes, facts = self.router(own, self.row)
        routed = self.row.leave(self.router.note(self._compute(own, routes), facts), len(x))
        if self.shared is None:
            return routed
        shared = self.shared(x)
        return routed + shared if self.mix is None else self.mix(x, routed, shared)

    def _compute(self, x: Tensor, routes: Routes) -> Tensor:
        """The weighted sum of each token's experts."""
        top_k, num_experts = routes.experts.shape[1], self.router.num_experts
        experts = routes.experts.flatten()
        if routes.kept is not None:  # what is dropped stands behind all experts
            experts = experts.where(routes.kept.flatten(), num_experts)
        counts = _count(experts, num_experts + 1)[:-1]
        order = experts.argsort(stable=True)  # assignments, token * top_k + choice, in order of their expert
        num_rows = len(order) if routes.kept is None else int(counts.sum())
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        rows = _Spread.apply(x, order[:num_rows], places, top_k)
        outputs = permuted(self.experts(rows, counts), places, order[:num_rows])  # [tokens * top_k, hidden]
        weighted = outputs.unflatten(0, (-1, top_k)) * routes.weights.to(outputs.dtype)[..., None]
        return weighted.sum(1)


def _count(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs: int64 [num_experts]."""
    flat = experts.flatten()
    return flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))


class _Spread(torch.autograd.Function):
    """Tokens [tokens, hidden] to rows in order of their expert. Gathers both ways: the same result every time, where
    autograd's own backward of indexing adds up in any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor, top_k: int) -> Tensor:
        ctx.top_k = top_k
        ctx.save_for_backward(places)
        return x[order // top_k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return _rows_at(grad, places).unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


def permuted(rows: Tensor, places: Tensor, inverse: Tensor) -> Tensor:
    """rows[places], differentiable, where rows = result[inverse]; zeros for places behind the last row."""
    return _Permute.apply(rows, places, inverse)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _rows_at(rows, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


def _rows_at(rows: Tensor, places: Tensor) -> Tensor:
    """rows[places], zeros for places behind the last row."""
    if len(rows) < len(places):
        rows = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
        places = places.clamp_max(len(rows) - 1)
    return rows[places]
