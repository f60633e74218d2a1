"""The products of tokens with the weights of the experts that they chose, on a CPU: each expert's rows are gathered, multiplied
and added back while they are in its cache.

Legend: T tokens, S assignments (a token that chose k experts has k), E experts, D width of a token, F width inside.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from .losses import is_traced


class Assignments(NamedTuple):
    """Which token goes to which expert, sorted by expert."""

    order: torch.Tensor  # (S,): where each assignment stood before sorting, token by token
    tokens: torch.Tensor  # (S,): its token
    sizes: list[int]  # how many each expert has


def sort_by_expert(chosen: torch.Tensor, num_experts: int) -> Assignments:
    """Sorts the experts `(T, k)` that the tokens chose; a number of `num_experts` or more stands for none and is left out.

    One wait for the device: the sizes become numbers.
    """
    chosen, per_token = chosen.flatten(), chosen.shape[1]
    order = chosen.argsort(stable=True)
    sizes = torch.bincount(chosen, minlength=num_experts)[:num_experts].tolist()
    order = order[: sum(sizes)]
    return Assignments(order, order // per_token, sizes)


def run_fused(experts: Any, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What transformers' "grouped_mm" computes, with nothing of size S x D: `(T, D)`, `(T, k)`, `(T, k)` -> `(T, D)`.

    Args:
        experts: with the attributes that transformers' experts interface names.
    """
    if torch.is_autocast_enabled("cpu"):
        hidden_states = hidden_states.to(torch.get_autocast_dtype("cpu"))
    dtype = hidden_states.dtype
    into, out_of = (
        (experts.gate_up_proj if experts.has_gate else experts.up_proj).to(dtype),
        experts.down_proj.to(dtype),
    )
    order, tokens, sizes = sort_by_expert(chosen, experts.num_experts)
    inner = GatherProduct.apply(hidden_states, into, tokens, sizes)
    if experts.has_bias:
        bias = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
        inner = inner + bias.to(dtype).repeat_interleave(torch.tensor(sizes), dim=0)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    weights = weights.to(dtype)
    output = ProductScatter.apply(inner, out_of, weights.flatten()[order], tokens, sizes, len(hidden_states))
    if experts.has_bias:
        shares = weights.new_zeros(len(weights), experts.num_experts).scatter_add(1, chosen, weights)
        output = output + shares @ experts.down_proj_bias.to(dtype)
    return output


def can_fuse(experts: Any, hidden_states: torch.Tensor) -> bool:
    """Whether the weights are plain matrices on a CPU, whole, and nothing is being traced."""
    if hidden_states.device.type != "cpu" or experts._is_expert_parallel or is_traced():
        return False
    weights = (experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj)
    return all(type(weight) in (nn.Parameter, torch.Tensor) for weight in weights)


class GatherProduct(torch.autograd.Function):
    """Row s is `weight[expert of s] @ hidden_states[token of s]`: `(T, D)`, `(E, F, D)` -> `(S, F)`.

    The weight is unbound, not indexed: the backward of an index costs a copy of the whole, for each expert.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, tokens, sizes):
        ctx.save_for_backward(hidden_states, weight, tokens)
        ctx.sizes = sizes
        output = hidden_states.new_empty(len(tokens), weight.shape[1])
        for matrix, own, product in zip(weight.unbind(0), tokens.split(sizes), output.split(sizes)):
            torch.mm(hidden_states.index_select(0, own), matrix.t(), out=product)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        hidden_states, weight, tokens = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_states) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        parts = zip(weight.unbind(0), tokens.split(ctx.sizes), grad_output.split(ctx.sizes))
        for expert, (matrix, own, grad) in enumerate(parts):
            if needs_weight:
                torch.mm(grad.t(), hidden_states.index_select(0, own), out=grad_weight[expert])
            if needs_hidden:
                grad_hidden.index_add_(0, own, grad @ matrix)
        return grad_hidden, grad_weight, None, None


class ProductScatter(torch.autograd.Function):
    """Row t is the sum of `shares[s] * weight[expert of s] @ inner[s]` over the assignments s of token t:
    `(S, F)`, `(E, D, F)`, `(S,)` -> `(T, D)`.
    """

    @staticmethod
    def forward(ctx, inner, weight, shares, tokens, sizes, num_tokens):
        ctx.save_for_backward(inner, weight, shares, tokens)
        ctx.sizes = sizes
        output = inner.new_zeros(num_tokens, weight.shape[1])
        parts = zip(weight.unbind(0), tokens.split(sizes), inner.split(sizes), shares[:, None].split(sizes))
        for matrix, own, rows, share in parts:
            output.index_add_(0, own, (rows * share) @ matrix.t())
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        inner, weight, shares, tokens = ctx.saved_tensors
        grad_inner, grad_shares = torch.empty_like(inner), torch.empty_like(shares)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        of_experts = (tensor.split(ctx.sizes) for tensor in (tokens, inner, shares[:, None], grad_inner, grad_shares))
        for expert, (matrix, own, rows, share, grad_rows, grad_share) in enumerate(zip(weight.unbind(0), *of_experts)):
            grad = grad_output.index_select(0, own)
            torch.mm(grad, matrix, out=grad_rows)
            torch.sum(grad_rows * rows, dim=1, out=grad_share)
            grad_rows.mul_(share)
            if grad_weight is not None:
                torch.mm(grad.t(), rows * share, out=grad_weight[expert])
        return grad_inner, grad_weight, grad_shares, None, None, None
