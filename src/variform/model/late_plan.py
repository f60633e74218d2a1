"""The block kernel in a compiled graph: an operation that makes its plan when the graph runs.

While a graph is traced, shapes are known and the texts of its batch are not. So what a plan is made from travels through the
graph as tensors, and the operation, which is opaque to compilers, makes the plan from them: once a layer and direction, of
tiles that `block_plan` remembers.
Legend: N rows, B batch, H heads, G key-value heads, S slots, D head_dim.
"""

from typing import NamedTuple

import torch

from .block_attention import Attended, Scoring, States, attend_by_plan, autocast, go_back_by_plan, widen
from .block_plan import BlockPlan, Group, Rows, make_plan, slices
from .pattern_base import Pattern
from .patterns import parse
from .texts import Texts, mask_function

# The number changes with what the operation computes, since two releases may be loaded at once
NAME = "variform::attend_in_blocks_1"


class LatePlan(NamedTuple):
    """What the plan of a pattern will be made from."""

    pattern: str
    layer: int
    is_causal: bool
    heads_differ: bool
    texts: Texts
    attention_mask: torch.Tensor | None  # (B, S), 1 for real tokens
    columns: torch.Tensor | None  # as in `BlockPlan`, for texts of S tokens


def attend_late(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: LatePlan,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """`attend_in_blocks` with a plan that is made when the graph runs."""
    batch, num_heads, length, size = query.shape
    sharing = num_heads // key.shape[1]
    if sharing > 1 and plan.heads_differ:
        key, value = (states.repeat_interleave(sharing, dim=1) for states in (key, value))
    rows = (states.transpose(1, 2).flatten(0, 1) for states in autocast(query, key, value))
    bias = None if position_bias is None else position_bias[:, plan.columns]
    seed = torch.randint(2**62, ()) if dropout > 0 else None
    texts = [*plan.texts, plan.attention_mask]
    settings = (batch, plan.pattern, plan.layer, plan.is_causal, scaling, softcap, dropout)
    output, _ = attend_operation(*rows, bias, s_aux, seed, texts, *settings)
    return output.view(batch, length, num_heads, size)


def plan_now(query: torch.Tensor, texts: list, batch: int, spec: str, layer: int, is_causal: bool) -> BlockPlan:
    """The plan, made from what `LatePlan` holds."""
    pattern, own_texts, attention_mask = parse(spec).at_layer(layer), Texts(*texts[:-1]), texts[-1]
    num_rows, num_heads = query.shape[:2]
    rows = own_texts.rows(batch, num_rows // batch, is_causal, attention_mask)
    if rows is None:
        return plan_whole_rows(pattern, own_texts, attention_mask, num_heads, is_causal)
    return make_plan(pattern, rows, num_heads=num_heads, device=query.device)


def plan_whole_rows(
    pattern: Pattern, texts: Texts, attention_mask: torch.Tensor, num_heads: int, is_causal: bool
) -> BlockPlan:
    """A tile for each row of the batch, which costs as much as a dense mask: for texts with padding inside."""
    length = attention_mask.shape[1]
    slots = torch.arange(length, device=attention_mask.device)
    queries, keys, groups = slots[:, None], slots[None, :], []
    for own, heads in pattern.by_head(num_heads).items():
        is_seen = mask_function(own, texts, is_causal, num_heads=1)
        for number, real in enumerate(attention_mask.bool()):
            row = slots.new_tensor(number)
            mask = is_seen(row, row, queries, keys) & real
            repeats = own.repeats(texts.pairs(row, queries, keys, is_causal))
            mask = mask if repeats is None else (mask * repeats).float().log()
            rows = Rows(1, length, number * length)
            groups += [Group(rows, rows, mask[None, None], of_heads) for of_heads in slices(heads)]
    return BlockPlan((tuple(groups),))


@torch.library.custom_op(NAME, mutates_args=())
def attend_operation(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    texts: list[torch.Tensor | None],
    batch: int,
    pattern: str,
    layer: int,
    is_causal: bool,
    scaling: float,
    softcap: float | None,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_by_plan`: rows `(N, H, D)` and `(N, G, D)`, a bias `(H, distances)`, and what the plan is made from."""
    plan = plan_now(query, texts, batch, pattern, layer, is_causal)
    scoring, drawn = Scoring(scaling, softcap, dropout), 0 if seed is None else int(seed)
    output, log_sum = attend_by_plan(States(query, key, value, bias), sinks, plan, scoring, drawn)
    return output.contiguous(), log_sum.contiguous()


@torch.library.custom_op(NAME + "_backward", mutates_args=())
def go_back_operation(
    grad: torch.Tensor,
    output: torch.Tensor,
    log_sum: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    texts: list[torch.Tensor | None],
    batch: int,
    pattern: str,
    layer: int,
    is_causal: bool,
    scaling: float,
    softcap: float | None,
    dropout: float,
    learns_bias: bool,
) -> list[torch.Tensor]:
    """`go_back_by_plan`: the gradients of query, key and value and, where there is something to learn, of bias and sinks."""
    plan = plan_now(query, texts, batch, pattern, layer, is_causal)
    scoring, drawn = Scoring(scaling, softcap, dropout), 0 if seed is None else int(seed)
    states, total = States(query, key, value, bias), Attended(output, log_sum)
    sums, d_sinks = go_back_by_plan(grad, states, sinks, total, plan, scoring, drawn, learns_bias=learns_bias)
    return [part.contiguous() for part in (*sums, d_sinks) if part is not None]


@attend_operation.register_fake
def _(query, key, value, bias, sinks, seed, texts, *settings):
    return query.new_empty(query.shape), query.new_empty((*query.shape[:2], 1), dtype=widen(query.dtype))


@go_back_operation.register_fake
def _(grad, output, log_sum, query, key, value, bias, sinks, seed, texts, *settings):
    learned = (query, key, value, bias if settings[-1] else None, sinks)
    return [part.new_empty(part.shape) for part in learned if part is not None]


def keep(ctx, inputs, output) -> None:
    """What the backward of `attend_operation` needs."""
    *tensors, texts, batch, pattern, layer, is_causal, scaling, softcap, dropout = inputs
    ctx.save_for_backward(*output, *tensors, *texts)
    ctx.num_texts = len(texts)
    ctx.settings = (batch, pattern, layer, is_causal, scaling, softcap, dropout)


def go_back(ctx, grad, _):
    """The gradients of the inputs of `attend_operation`."""
    saved = ctx.saved_tensors
    tensors, texts = saved[: -ctx.num_texts], list(saved[-ctx.num_texts :])
    learns_bias = ctx.needs_input_grad[3]
    found = go_back_operation(grad, *tensors, texts, *ctx.settings, learns_bias)
    d_bias = found[3] if learns_bias else None
    d_sinks = found[-1] if len(found) > 3 + learns_bias else None
    return *found[:3], d_bias, d_sinks, None, None, *[None] * len(ctx.settings)


attend_operation.register_autograd(go_back, setup_context=keep)
