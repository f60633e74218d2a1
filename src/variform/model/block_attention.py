"""Attention at the cost of its pattern: the tiles of a plan are taken from the rows, computed, and put back.

Legend: N rows, H heads, G key-value heads, D head_dim, T tiles of a call, Q queries and K keys of a tile.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .block_plan import BlockPlan, Group, Places, Sorted

# Elements of the keys of one call: on a CPU they are to stay in its cache, an accelerator is to be kept busy
ELEMENTS_ON_CPU, ELEMENTS_ELSEWHERE = 2**19, 2**24
# The logarithm of an empty sum: finite, so that the difference of two is a number
NEVER = torch.finfo(torch.float32).min


class Scoring(NamedTuple):
    """How scores become weights: `dropout(softmax(softcap * tanh(query @ key * scaling / softcap) + mask))`."""

    scaling: float
    softcap: float | None = None
    dropout: float = 0.0


class States(NamedTuple):
    """The rows that calls read, or the sums of their gradients."""

    query: torch.Tensor  # (N, H, D)
    key: torch.Tensor  # (N, G, D)
    value: torch.Tensor  # (N, G, D)
    bias: torch.Tensor | None  # (H, distances)

    def of(self, heads: slice) -> "States":
        """Views of what some heads read; of heads that share keys, all or none."""
        num_heads = self.query.shape[1]
        if heads.indices(num_heads) == (0, num_heads, 1):
            return self
        sharing = num_heads // self.key.shape[1]
        shared = heads if sharing == 1 else slice(heads.start // sharing, heads.stop // sharing)
        bias = None if self.bias is None else self.bias[heads]
        return States(self.query[:, heads], self.key[:, shared], self.value[:, shared], bias)


class Inputs(NamedTuple):
    """What one call computes from."""

    query: torch.Tensor  # (T, H, Q, D)
    key: torch.Tensor  # (T, G, K, D)
    value: torch.Tensor  # (T, G, K, D)
    mask: torch.Tensor | None  # (1 or T, 1 or H, Q, K), added to the scores
    factors: torch.Tensor | None  # (T, H, Q, K), of the weights: 0 where dropped


class Attended(NamedTuple):
    """What queries take from the keys that they see: those of one call, or all rows."""

    output: torch.Tensor  # (T, H, Q, D), or (N, H, D)
    log_sum: torch.Tensor  # (T, H, Q, 1), or (N, H, 1): the logarithm of the sum of the scores' exponentials


class Gradients(NamedTuple):
    """Of the inputs of one call."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None  # (T, H, Q, K); the fused kernel gives none


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    *,
    scaling: float,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`softmax(cap(query @ key * scaling) + bias + mask) @ value` over the pairs of a plan; equals `eager_attention`.

    Softmax and sums are in float32 at least. Rows that the plan leaves out, and queries that see no key, give 0.

    Args:
        query: `(N, H, D)`. key, value: `(N, G, D)`, each shared by H / G heads.
        bias: `(H, columns)`; the plan's `bias_index` says which column is added to which score.
        dropout: probability of a weight to be dropped; one number from torch's CPU generator decides which are.
        sinks: `(H,)`, a logit a head that takes part in the softmax and contributes no value.

    Returns:
        `(N, H, D)`.
    """
    query, key, value = autocast(query, key, value)
    sharing = query.shape[1] // key.shape[1]
    if sharing > 1 and any(is_apart(group.heads, sharing) for group in plain_groups(plan)):
        key, value = (states.repeat_interleave(sharing, dim=1) for states in (key, value))
    if bias is not None:
        bias = bias[:, plan.columns]  # (H, distances)
    seed = int(torch.randint(2**62, ())) if dropout > 0 else 0
    return BlockAttention.apply(query, key, value, bias, sinks, plan, Scoring(scaling, softcap, dropout), seed)


class BlockAttention(torch.autograd.Function):
    """`attend_by_plan`. The backward makes the weights anew, and drops the same ones."""

    @staticmethod
    def forward(ctx: Any, query, key, value, bias, sinks, plan: BlockPlan, scoring: Scoring, seed: int):
        total = attend_by_plan(States(query, key, value, bias), sinks, plan, scoring, seed)
        ctx.save_for_backward(query, key, value, bias, sinks, *total)
        ctx.plan, ctx.scoring, ctx.seed = plan, scoring, seed
        return total.output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        *states, sinks, output, log_sum = ctx.saved_tensors
        total, learns_bias = Attended(output, log_sum), ctx.needs_input_grad[3]
        sums, d_sinks = go_back_by_plan(
            grad, States(*states), sinks, total, ctx.plan, ctx.scoring, ctx.seed, learns_bias=learns_bias
        )
        return *sums, d_sinks, None, None, None


def attend_by_plan(
    states: States, sinks: torch.Tensor | None, plan: BlockPlan, scoring: Scoring, seed: int
) -> Attended:
    """What the rows take from the keys that a plan shows them: its calls one after the other."""
    states = pack_all(states)
    query, device = states.query, states.query.device
    attend = attend_fused if is_fusible(query, scoring) else attend_explicitly
    generator = torch.Generator(device).manual_seed(seed)
    is_merged = len(plan.rounds) > 1 or sinks is not None
    total = nothing_attended(query, widen(query.dtype) if is_merged else query.dtype)
    with torch.autocast(device.type, enabled=False):
        for number, groups in enumerate(plan.rounds):
            found = total if number == 0 else nothing_attended(query, widen(query.dtype))
            for call in calls(groups, states.key):
                go_forward(call, states, found, attend, scoring, generator)
            total = found if number == 0 else merge(total, found)
    if sinks is not None:
        sums = sinks[:, None].to(total.log_sum.dtype)
        total = merge(total, Attended(torch.zeros_like(sums), sums))
    return Attended(total.output.to(query.dtype), total.log_sum)


def go_back_by_plan(
    grad: torch.Tensor,
    states: States,
    sinks: torch.Tensor | None,
    total: Attended,
    plan: BlockPlan,
    scoring: Scoring,
    seed: int,
    *,
    learns_bias: bool,
) -> tuple[States, torch.Tensor | None]:
    """The gradients of what `attend_by_plan` read, and that of the sinks."""
    states, grad = pack_all(states), pack(grad)
    query, device = states.query, states.query.device
    # The fused kernel gives no gradient of the mask, to which the bias belongs
    go_back = go_back_fused if is_fusible(query, scoring) and not learns_bias else go_back_explicitly
    generator = torch.Generator(device).manual_seed(seed)
    sums = zero_sums(states if learns_bias else states._replace(bias=None))
    with torch.autocast(device.type, enabled=False):
        for groups in plan.rounds:
            for call in calls(groups, states.key):
                go_backward(call, states, total, grad, sums, go_back, scoring, generator)
    d_sinks = None
    if sinks is not None:
        d_sums = (sinks[:, None] - total.log_sum).exp() * -(grad * total.output).sum(-1, keepdim=True)
        d_sinks = d_sums.sum((0, 2)).to(sinks.dtype)
    narrowed = (None if part is None else part.to(own.dtype) for own, part in zip(states, sums))
    return States._make(narrowed), d_sinks


def go_forward(
    call: Group | Sorted, states: States, found: Attended, attend: Callable, scoring: Scoring, generator
) -> None:
    """Computes one call and writes what it finds into the rows."""
    if isinstance(call, Sorted):
        of_places = sort_states(call, states)
        found_there = nothing_attended(of_places.query, found.output.dtype)
        for own_call in calls(call.groups, of_places.key):
            go_forward(own_call, of_places, found_there, attend, scoring, generator)
        for rows, values in zip(found, found_there):
            rows.index_copy_(0, call.query.flatten(), values.flatten(0, 1)[:, None])
        return
    attended = attend(take_inputs(call, states.of(call.heads), scoring, generator), scoring)
    for rows, values in zip(found, attended):
        call.query.put(rows[:, call.heads], values)


def go_backward(
    call: Group | Sorted,
    states: States,
    total: Attended,
    grad,
    sums: States,
    go_back: Callable,
    scoring: Scoring,
    generator,
) -> None:
    """Computes the gradients of one call and adds them to their sums."""
    if isinstance(call, Sorted):
        of_places = sort_states(call, states)
        output, log_sum, grad = (sort_rows(rows, call.query) for rows in (*total, grad))
        sums_there = zero_sums(of_places)
        for own_call in calls(call.groups, of_places.key):
            go_backward(own_call, of_places, Attended(output, log_sum), grad, sums_there, go_back, scoring, generator)
        for rows, part, values in zip((call.query, call.key, call.key), sums, sums_there):
            part.index_add_(0, rows.flatten(), values.flatten(0, 1)[:, None])
        return
    inputs = take_inputs(call, states.of(call.heads), scoring, generator)
    output, log_sum, grad = (call.query.take(rows[:, call.heads]) for rows in (*total, grad))
    dtype = inputs.query.dtype
    own = go_back(grad.to(dtype), inputs, Attended(output.to(dtype), log_sum), scoring)
    own_sums = sums.of(call.heads)
    call.query.add(own_sums.query, own.query)
    call.key.add(own_sums.key, own.key)
    call.key.add(own_sums.value, own.value)
    if own_sums.bias is not None and own.mask is not None:
        add_to_bias(own_sums.bias, call, own.mask)


def sort_states(call: Sorted, states: States) -> States:
    """The states of the call's sequences, side by side in sorted order, in place of heads."""
    query, key, value = states.query, states.key, states.value
    return States(sort_rows(query, call.query), sort_rows(key, call.key), sort_rows(value, call.key), None)


def sort_rows(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`(N, 1, D)` -> `(n, S, D)`."""
    return states[:, 0].index_select(0, rows.flatten()).unflatten(0, rows.shape)


def zero_sums(states: States) -> States:
    """Nothing yet, of the gradients of states."""
    return States._make(None if part is None else torch.zeros_like(part, dtype=widen(part.dtype)) for part in states)


def widen(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.promote_types(dtype, torch.float32)


def autocast(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The states in the dtype of autocast, where it is on."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return states
    return tuple(part.to(torch.get_autocast_dtype(device)) for part in states)


def pack_all(states: States) -> States:
    """The queries, keys and values packed."""
    return States(pack(states.query), pack(states.key), pack(states.value), states.bias)


def pack(states: torch.Tensor) -> torch.Tensor:
    """The states with the elements of a head next to each other, as the fused kernel takes for granted."""
    return states if states.stride(-1) == 1 else states.contiguous()


def nothing_attended(query: torch.Tensor, dtype: torch.dtype) -> Attended:
    """What rows `(N, H, D)` have before any call."""
    log_sum = query.new_full((*query.shape[:2], 1), NEVER, dtype=widen(dtype))
    return Attended(torch.zeros_like(query, dtype=dtype), log_sum)


def merge(first: Attended, second: Attended) -> Attended:
    """What the softmax over the keys of both takes."""
    log_sum = torch.logaddexp(first.log_sum, second.log_sum)
    output = first.output * (first.log_sum - log_sum).exp() + second.output * (second.log_sum - log_sum).exp()
    return Attended(output, log_sum)


def plain_groups(plan: BlockPlan) -> Iterator[Group]:
    """The groups whose heads are those of the rows."""
    return (group for groups in plan.rounds for group in groups if isinstance(group, Group))


def is_apart(heads: slice, sharing: int) -> bool:
    """Whether heads are other than neighbouring whole groups of `sharing` heads that share keys."""
    return heads.step > 1 or heads.start % sharing != 0 or heads.stop % sharing != 0


def calls(groups: tuple[Group | Sorted, ...], key: torch.Tensor) -> Iterator[Group | Sorted]:
    """The groups in pieces of a size that suits the device."""
    elements = ELEMENTS_ON_CPU if key.device.type == "cpu" else ELEMENTS_ELSEWHERE
    for group in groups:
        if isinstance(group, Sorted):
            yield group
            continue
        yield from group.cut(max(1, round(elements / (group.key.length * key.shape[1] * key.shape[2]))))


def take_inputs(call: Group, states: States, scoring: Scoring, generator: torch.Generator) -> Inputs:
    """What a call computes from, out of the states of its heads."""
    device, dtype = states.query.device, states.query.dtype
    if device.type == "cpu":
        dtype = widen(dtype)  # faster than in half precision, for tiles that fit the cache
    query = call.query.take(states.query).to(dtype)
    key, value = call.key.take(states.key).to(dtype), call.key.take(states.value).to(dtype)
    factors = None
    if scoring.dropout > 0:
        drawn = torch.rand((*query.shape[:3], key.shape[2]), generator=generator, device=device)
        factors = (drawn >= scoring.dropout) / (1 - scoring.dropout)
    return Inputs(query, key, value, additive_mask(call, states.bias, widen(dtype)), factors)


def additive_mask(call: Group, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """`(1 or T, 1 or H, Q, K)`, what is added to the scores; of their dtype, since the fused kernel misreads any other."""
    mask = call.mask
    if isinstance(mask, Places):
        mask = mask.seen()
    elif mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8).to(dtype)  # converted several times as fast as booleans
    if mask is not None and mask is not call.mask:
        # 1 - 1 / 1 is 0 and 1 - 1 / 0 is -inf: several times as fast as to fill what is hidden
        mask = mask.reciprocal_().neg_().add_(1)
    if bias is not None:
        columns = bias_columns(call, bias)
        biases = bias.index_select(1, columns.flatten()).unflatten(1, columns.shape).transpose(0, 1)
        mask = biases if mask is None else biases + mask
    return None if mask is None else mask.to(dtype)


def bias_columns(call: Group, bias: torch.Tensor) -> torch.Tensor:
    """`(1 or T, Q, K)`: where each pair's distance is in `(H, distances)`; 1 where it is the same in all tiles."""
    queries, keys = call.query.numbers(bias.device), call.key.numbers(bias.device)
    if call.query.listed is None and call.key.listed is None and call.query.step == call.key.step:
        queries, keys = queries[:1], keys[:1]
    return keys[:, None, :] - queries[:, :, None] + bias.shape[1] // 2


def add_to_bias(d_bias: torch.Tensor, call: Group, d_mask: torch.Tensor) -> None:
    """Adds the gradient of a call's mask, `(T, H, Q, K)`, to that of the bias, `(H, distances)`."""
    columns = bias_columns(call, d_bias)
    if len(columns) == 1:
        d_mask = d_mask.sum(0, keepdim=True)
    d_bias.index_add_(1, columns.flatten(), d_mask.transpose(0, 1).flatten(1))


def is_fusible(query: torch.Tensor, scoring: Scoring) -> bool:
    """Whether the fused kernel can compute it."""
    return query.device.type == "cpu" and scoring.softcap is None and scoring.dropout == 0


def attend_fused(inputs: Inputs, scoring: Scoring) -> Attended:
    """One call by the kernel behind torch's `scaled_dot_product_attention`."""
    output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        inputs.query, inputs.key, inputs.value, attn_mask=inputs.mask, scale=scoring.scaling
    )
    log_sum = log_sum[..., None]
    if inputs.mask is not None:
        # Of no keys at all the kernel gives 0
        log_sum = torch.where(inputs.mask.amax(-1, keepdim=True) == -torch.inf, NEVER, log_sum)
    return Attended(output, log_sum)


def go_back_fused(grad: torch.Tensor, inputs: Inputs, attended: Attended, scoring: Scoring) -> Gradients:
    """The gradients of `attend_fused`; what was attended may be a sum over more keys than the call's."""
    query, key, value, mask, _ = inputs
    output, log_sum = attended.output, attended.log_sum.squeeze(-1)
    d_query, d_key, d_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, output, log_sum, 0.0, False, attn_mask=mask, scale=scoring.scaling
    )
    return Gradients(d_query, d_key, d_value, None)


def attend_explicitly(inputs: Inputs, scoring: Scoring) -> Attended:
    """One call spelled out: for any device, and for what the fused kernel has not."""
    value, mask = inputs.value, inputs.mask
    scores = raw_scores(inputs, scoring)
    scores = scores if mask is None else scores.add_(mask)
    log_sum = scores.logsumexp(-1, keepdim=True).clamp(min=NEVER)
    weights = scores.sub_(log_sum).exp_()
    weights = weights if inputs.factors is None else weights.mul_(inputs.factors)
    output = fold(weights.to(value.dtype), value) @ value
    return Attended(output.view(inputs.query.shape), log_sum)


def go_back_explicitly(grad: torch.Tensor, inputs: Inputs, attended: Attended, scoring: Scoring) -> Gradients:
    """The gradients of `attend_explicitly`; what was attended may be a sum over more keys than the call's."""
    query, key, value, mask, factors = inputs
    scores = raw_scores(inputs, scoring)
    weights = (scores if mask is None else scores + mask).sub(attended.log_sum).exp_()
    d_weights = (fold(grad, value) @ value.transpose(-1, -2)).view(weights.shape).to(weights.dtype)
    kept = weights
    if factors is not None:
        kept, d_weights = weights * factors, d_weights * factors
    d_value = fold(kept.to(value.dtype), value).transpose(-1, -2) @ fold(grad, value)
    # The softmax is a quotient: its gradient has a part for the sum
    d_sum = (grad * attended.output).sum(-1, keepdim=True, dtype=weights.dtype)
    d_masked = d_weights.sub_(d_sum).mul_(weights)
    d_scores = d_masked if scoring.softcap is None else d_masked * (1 - (scores / scoring.softcap).square())
    d_scores = fold((d_scores * scoring.scaling).to(key.dtype), key)
    d_query, d_key = d_scores @ key, d_scores.transpose(-1, -2) @ fold(query, key)
    return Gradients(d_query.view(query.shape), d_key, d_value, d_masked)


def raw_scores(inputs: Inputs, scoring: Scoring) -> torch.Tensor:
    """`(T, H, Q, K)` scores without the mask, capped."""
    query, key = inputs.query, inputs.key
    scores = fold(query * scoring.scaling, key) @ key.transpose(-1, -2)
    scores = scores.view(*query.shape[:3], key.shape[2]).to(widen(query.dtype))
    return scores if scoring.softcap is None else scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)


def fold(states: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """`(T, H, Q, ...)` -> `(T, G, H / G * Q, ...)`: the queries of heads that share keys, one after the other."""
    return states.reshape(states.shape[0], key.shape[1], -1, states.shape[-1])
