"""Attention to the keys that hash like the query (Reformer, arXiv:2001.04451): hashes, what they show, sorted chunks.

Queries and keys are one projection. A key is its token's query of a fixed length, and a hash looks at directions alone.
Legend: B batch, H heads, Q queries, K keys, D head_dim, R rounds; T texts of n tokens each.
"""

import math
from typing import NamedTuple

import torch

from .block_attention import block_attention
from .block_plan import BlockPlan, make_sorted_plan
from .pattern_base import Tile, split
from .sparse_patterns import Lsh, scramble

KEY_EPS = 1e-6
# As many as the fused kernel takes at a time
QUERIES_OF_A_CAUSAL_TILE = 32


class HashedTexts(NamedTuple):
    """The texts of a batch, in place of a mask: the layer sorts each by its hashes and attends in chunks."""

    rows: tuple[
        torch.Tensor, ...
    ]  # one `(T, n)` int64 a length: the rows of its texts, the slots of the batch end to end


class OwnKeys(NamedTuple):
    """The keys of the queries' own tokens."""

    key: torch.Tensor  # (B, H, Q, D)
    slots: torch.Tensor  # (Q,): which of all keys they are


def as_key(query: torch.Tensor) -> torch.Tensor:
    """`(..., D)` queries as the keys of their tokens, of length sqrt(D)."""
    exact = query.to(torch.promote_types(query.dtype, torch.float32))
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + KEY_EPS)).to(query.dtype)


def rotations(
    pattern: Lsh, layer_idx: int, num_heads: int, size: int, device: torch.device | None = None
) -> torch.Tensor:
    """`(H, D, R, directions)` in (-1, 1): what the pattern hashes with in a layer, the same on every machine."""
    shape = (num_heads, size, pattern.rounds, sum(pattern.factors) // 2)
    numbers = scramble(1 + torch.arange(math.prod(shape), device=device), pattern.seed, layer_idx)
    # The 23 upper bits, which float32 holds exactly
    return (((numbers >> 8).float() + 0.5) / 2**22 - 1).view(shape)


@torch.no_grad()
def hash_keys(key: torch.Tensor, pattern: Lsh, layer_idx: int) -> torch.Tensor:
    """The buckets `(B, H, R, K)` int64 of keys `(B, H, K, D)`: the nearest of random directions and their opposites
    (arXiv:1509.02897)."""
    directions = rotations(pattern, layer_idx, key.shape[1], key.shape[-1], key.device).to(key.dtype)
    # (B, H, K, D) @ (H, D, R * S) -> (B, H, R, K, S)
    products = (key @ directions.flatten(2)).unflatten(-1, directions.shape[2:]).transpose(2, 3)
    buckets, total = torch.zeros_like(products[..., 0], dtype=torch.long), 1
    for factor, own in zip(pattern.factors, products.split([factor // 2 for factor in pattern.factors], dim=-1)):
        nearest = own.abs().argmax(-1, keepdim=True)
        is_opposite = own.gather(-1, nearest) < 0
        buckets = buckets + total * (nearest + factor // 2 * is_opposite).squeeze(-1)
        total *= factor
    return buckets


def see_by_hash(
    pattern: Lsh, layer_idx: int, own: OwnKeys, key: torch.Tensor, shown: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What each query sees: the definition, pair by pair.

    A token sees itself only where it sees nothing else: the product of a query with its own key would outweigh all others.

    Args:
        own: the keys of the queries' tokens. key: `(B, H, K, D)`, all keys.
        shown: `(B or 1, H or 1, Q, K)` boolean, what is seen where no hash hides anything.

    Returns:
        What is seen, `(B, H, Q, K)` boolean, and, with `chunked`, how often each key counts.
    """
    buckets = hash_keys(key, pattern, layer_idx)
    if pattern.chunked:
        repeats = count_in_chunks(buckets, pattern, shown)
        shown_here = shown & (repeats > 0)
    else:
        repeats = None
        own_buckets = buckets if own.key is key else hash_keys(own.key, pattern, layer_idx)
        shown_here = shown & (own_buckets[..., :, None] == buckets[..., None, :]).any(2)
    is_self = own.slots[:, None] == torch.arange(key.shape[2], device=key.device)
    others = shown_here & ~is_self
    return others | (shown & is_self & ~others.any(-1, keepdim=True)), repeats


def count_in_chunks(buckets: torch.Tensor, pattern: Lsh, shown: torch.Tensor) -> torch.Tensor:
    """How often each pair of tokens meets in chunks of tokens that are sorted by bucket: `(B, H, n, n)`.

    In each round a chunk meets itself and the one before; what is before the first is the last of the round before, and for
    the first round that of the last.

    Args:
        buckets: `(B, H, R, n)`. shown: as in `see_by_hash`. A text begins where its first token is shown; padding is hidden
            from itself too, and sorted last.
    """
    length = buckets.shape[-1]
    shown = shown[:, :1]
    starts = shown.int().argmax(-1)  # (B, 1, n)
    starts = starts.where(shown.diagonal(dim1=-2, dim2=-1), length)
    # One text after the other, and in each by bucket
    order = (starts[:, :, None] * math.prod(pattern.factors) + buckets).argsort(stable=True)
    lengths = (starts[..., :, None] == starts[..., None, :]).sum(-1)
    firsts = (starts[..., :, None] > starts[..., None, :]).sum(-1)
    chunks = (order.argsort(-1) - firsts[:, :, None]) // pattern.chunk  # (B, H, R, n)
    last = (lengths[..., None] - 1) // pattern.chunk  # (B, 1, n, 1)
    repeats = torch.zeros_like(chunks[:, :, 0, :, None] + chunks[:, :, 0, None], dtype=torch.int)
    for number in range(pattern.rounds):
        query, key, key_before = (
            chunks[:, :, number, :, None],
            chunks[:, :, number, None],
            chunks[:, :, number - 1, None],
        )
        is_before = torch.where(query == 0, key_before == last, key == query - 1) & (last > 0)
        repeats = repeats + (key == query).int() + is_before.int()
    return repeats


def attend_in_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    texts: HashedTexts,
    pattern: Lsh,
    layer_idx: int,
    is_causal: bool,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> torch.Tensor:
    """The same at the cost of the chunks, for `chunked`: `(B, H, S, D)` each -> `(B, S, H, D)`; 0 for padding."""
    batch, num_heads, length, size = query.shape
    rows = [states.transpose(1, 2).flatten(0, 2) for states in (query, key, value)]  # (B * S * H, D) each
    output = torch.zeros_like(rows[0])
    for of_texts in texts.rows:
        by_head = of_texts[:, None] * num_heads + torch.arange(num_heads, device=query.device)[:, None]  # (T, H, n)
        own = [states.index_select(0, by_head.flatten()) for states in rows]
        plan = plan_chunks(own[1].view(*by_head.shape, size), pattern, layer_idx, is_causal)
        query_rows, key_rows, value_rows = (states[:, None] for states in own)
        found = block_attention(query_rows, key_rows, value_rows, plan, scaling=scaling, dropout=dropout)
        output = output.index_copy(0, by_head.flatten(), found[:, 0].to(output.dtype))
    return output.view(batch, length, num_heads, size)


def plan_chunks(key: torch.Tensor, pattern: Lsh, layer_idx: int, is_causal: bool) -> BlockPlan:
    """The plan for texts of one length whose keys are `(T, H, n, D)`, with a row a text, head and token."""
    length, chunk = key.shape[2], pattern.chunk
    # (R, T * H, n): the places of each text and head in sorted order
    orders = hash_keys(key, pattern, layer_idx).argsort(stable=True).flatten(0, 1).transpose(0, 1)
    if is_causal:
        orders = sort_chunks(orders, chunk)
    # In front of each round stands the last chunk of the round before
    ahead = (length - 1) % chunk + 1 if length > chunk else 0
    key_orders = torch.cat((orders.roll(1, 0)[..., length - ahead :], orders), dim=-1)
    tiles = [
        Tile((a, b), [(max(0, start + ahead - chunk), (b if is_causal else end) + ahead)])
        for start, end in split(0, length, chunk)
        for a, b in split(start, end, QUERIES_OF_A_CAUSAL_TILE if is_causal else chunk)
    ]
    ends = None
    if is_causal or length == 1:
        # A token sees what is before it, or itself where it meets nothing of that
        ends = torch.arange(length, device=key.device) + find_alone(orders, chunk)
    return make_sorted_plan(orders, tiles, key_orders, ends)


def sort_chunks(orders: torch.Tensor, chunk: int) -> torch.Tensor:
    """The same chunks, each in rising order: the first queries of a causal chunk need not meet its last keys."""
    whole = orders.shape[-1] // chunk * chunk
    chunks = orders[..., :whole].unflatten(-1, (-1, chunk)).sort(-1).values.flatten(-2)
    return torch.cat((chunks, orders[..., whole:].sort(-1).values), dim=-1)


def find_alone(orders: torch.Tensor, chunk: int) -> torch.Tensor:
    """`(T * H, n)`: the tokens that meet no earlier one, in any round. Args: orders: as in `plan_chunks`, chunks in order."""
    length = orders.shape[-1]
    firsts = orders[..., ::chunk]  # the earliest token of each chunk
    before = torch.cat((firsts.roll(1, 0)[..., -1:], firsts[..., :-1]), dim=-1)
    met = torch.minimum(firsts, before).repeat_interleave(chunk, dim=-1)[..., :length]
    earliest = torch.empty_like(orders).scatter(-1, orders, met)
    return (earliest >= torch.arange(length, device=orders.device)).all(0)
