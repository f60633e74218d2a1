"""The products of tokens with the weights of the experts that they chose, on a CPU: each expert's rows are gathered, multiplied
and added back while they are in its cache.

Legend: T tokens, S assignments (a token that chose k experts has k), E experts, D width of a token, F width inside.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .losses import is_traced

# Bytes that stay in a core's cache. Gates and what they scale are two products where their matrix has more: there the copy that
# the backward of a slice makes of a whole costs more than a second product.
SMALL_MATRIX = 2**19


class Assignments(NamedTuple):
    """Which token goes to which expert, sorted by expert."""

    order: torch.Tensor  # (S,): where each assignment stood before sorting, token by token
    tokens: torch.Tensor  # (S,): its token
    sizes: list[int]  # how many each expert has


class Busy(NamedTuple):
    """The experts that have assignments."""

    experts: list[int]
    sizes: list[int]  # how many each has

    def share_out(self, *tensors: torch.Tensor) -> Iterator[tuple[Any, ...]]:
        """The number of each expert and its rows of each tensor."""
        return zip(self.experts, *(tensor.split(self.sizes) for tensor in tensors))

    def gradient_of(self, weight: torch.Tensor) -> torch.Tensor:
        """As large, 0 for the experts that are idle."""
        gradient = torch.empty_like(weight)
        for expert in set(range(len(weight))).difference(self.experts):
            gradient[expert].zero_()
        return gradient


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
        experts: with the attributes that transformers' experts interface names, and a `multiply` of gates and what they scale.
    """
    if torch.is_autocast_enabled("cpu"):
        hidden_states = hidden_states.to(torch.get_autocast_dtype("cpu"))
    if len(hidden_states) == 1 and not torch.is_grad_enabled():
        return run_one_token(experts, hidden_states, chosen, weights)
    dtype = hidden_states.dtype
    into = experts.gate_up_proj if experts.has_gate else experts.up_proj
    order, tokens, sizes = sort_by_expert(chosen, experts.num_experts)
    busy = Busy([number for number, size in enumerate(sizes) if size], [size for size in sizes if size])
    num_parts = 2 if experts.has_gate and into[0].nbytes > SMALL_MATRIX else 1
    parts = GatherProduct.apply(hidden_states, into.to(dtype), tokens, busy, num_parts)
    if experts.has_bias:
        bias = (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias).to(dtype)
        bias = bias.repeat_interleave(torch.tensor(sizes), dim=0)
        parts = [part + own for part, own in zip(parts, bias.chunk(len(parts), dim=-1))]
    if num_parts == 2:
        inner = experts.multiply(*parts)
    else:
        inner = experts._apply_gate(parts[0]) if experts.has_gate else experts.act_fn(parts[0])
    weights = weights.to(dtype)
    shares = weights.flatten()[order]
    output = ProductScatter.apply(inner, experts.down_proj.to(dtype), shares, tokens, busy, len(hidden_states))
    if experts.has_bias:
        shares = weights.new_zeros(len(weights), experts.num_experts).scatter_add(1, chosen, weights)
        output = output + shares @ experts.down_proj_bias.to(dtype)
    return output


def run_one_token(
    experts: Any, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """`run_fused` of one token without gradients: nothing to sort, and only the chosen weights are touched."""
    dtype, numbers = hidden_states.dtype, chosen[0].tolist()
    into, weights = experts.gate_up_proj if experts.has_gate else experts.up_proj, weights.to(dtype)
    inner = torch.cat([F.linear(hidden_states, into[number].to(dtype)) for number in numbers])
    if experts.has_bias:
        inner = inner + (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias)[chosen[0]].to(dtype)
    inner = (experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)) * weights.t()
    output = (
        weights @ experts.down_proj_bias[chosen[0]].to(dtype) if experts.has_bias else torch.zeros_like(hidden_states)
    )
    for number, row in zip(numbers, inner.split(1)):
        output.addmm_(row, experts.down_proj[number].t().to(dtype))
    return output


def can_fuse(experts: Any, hidden_states: torch.Tensor) -> bool:
    """Whether the weights are plain matrices on a CPU, whole, and nothing is being traced."""
    if hidden_states.device.type != "cpu" or experts._is_expert_parallel or is_traced():
        return False
    weights = (experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj)
    return all(type(weight) in (nn.Parameter, torch.Tensor) for weight in weights)


class GatherProduct(torch.autograd.Function):
    """Row s of part p is `weight[expert of s, part p] @ hidden_states[token of s]`: `(T, D)`, `(E, P x F, D)` -> P of `(S, F)`.

    The weight is indexed out of autograd's sight: the backward of an index costs a copy of the whole, for each expert.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, tokens, busy, num_parts):
        ctx.save_for_backward(hidden_states, weight, tokens)
        ctx.busy = busy
        outputs = tuple(hidden_states.new_empty(len(tokens), weight.shape[1] // num_parts) for _ in range(num_parts))
        for expert, own, *products in busy.share_out(tokens, *outputs):
            rows = hidden_states.index_select(0, own)
            for matrix, product in zip(read(weight[expert]).chunk(num_parts), products):
                torch.mm(rows, matrix.t(), out=product)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_outputs):
        hidden_states, weight, tokens = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_states) if needs_hidden else None
        grad_weight = ctx.busy.gradient_of(weight) if needs_weight else None
        for expert, own, *grads in ctx.busy.share_out(tokens, *grad_outputs):
            if needs_weight:
                rows = hidden_states.index_select(0, own)
                for grad, product in zip(grads, grad_weight[expert].chunk(len(grads))):
                    torch.mm(grad.t(), rows, out=product)
            if needs_hidden:
                first, *others = weight[expert].chunk(len(grads))
                rows = grads[0] @ first
                for grad, matrix in zip(grads[1:], others):
                    rows.addmm_(grad, matrix)
                grad_hidden.index_add_(0, own, rows)
        return grad_hidden, grad_weight, None, None, None


class ProductScatter(torch.autograd.Function):
    """Row t is the sum of `shares[s] * weight[expert of s] @ inner[s]` over the assignments s of token t:
    `(S, F)`, `(E, D, F)`, `(S,)` -> `(T, D)`.
    """

    @staticmethod
    def forward(ctx, inner, weight, shares, tokens, busy, num_tokens):
        ctx.save_for_backward(inner, weight, shares, tokens)
        ctx.busy = busy
        output = inner.new_zeros(num_tokens, weight.shape[1])
        for expert, own, rows, share in busy.share_out(tokens, inner, shares[:, None]):
            output.index_add_(0, own, (rows * share) @ read(weight[expert]).t())
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        inner, weight, shares, tokens = ctx.saved_tensors
        grad_inner, grad_shares = torch.empty_like(inner), torch.empty_like(shares)
        grad_weight = ctx.busy.gradient_of(weight) if ctx.needs_input_grad[1] else None
        parts = ctx.busy.share_out(tokens, inner, shares[:, None], grad_inner, grad_shares)
        for expert, own, rows, share, grad_rows, grad_share in parts:
            grad = grad_output.index_select(0, own)
            torch.mm(grad, weight[expert], out=grad_rows)
            torch.sum(grad_rows * rows, dim=1, out=grad_share)
            grad_rows.mul_(share)
            if grad_weight is not None:
                torch.mm(grad.t(), rows * share, out=grad_weight[expert])
        return grad_inner, grad_weight, grad_shares, None, None, None


def read(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix itself. A small one is read once, row by row: so it comes into the cache three times as fast as a product
    with its transpose brings it there."""
    if matrix.nbytes <= SMALL_MATRIX:
        matrix.sum()
    return matrix
