"""What the layers of a stack hide, in the form that their backend takes: once a forward for each distinct pattern.

Legend: B batch (1 where rows agree), S slots, Q queries, K keys, H heads.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_bidirectional_mask,
    create_causal_mask,
    flash_attention_mask,
    flex_attention_mask,
    sdpa_mask,
)
from transformers.utils import is_torch_flex_attn_available, is_torchdynamo_compiling

from .attention import SPELLED_OUT, GlobalRows
from .block_plan import BlockPlan, Group, Rows, columns_of_distances, make_plan, planned_scores
from .late_plan import LatePlan
from .local_patterns import LocalGlobal
from .lsh import HashedTexts
from .pattern_base import Full, Pattern, PrefixLm, Text
from .positions import packed_documents
from .sparse_patterns import Lsh
from .texts import Texts, mask_function

if is_torch_flex_attn_available():
    from torch.nn.attention.flex_attention import create_block_mask

# From here on a plan is worth its making
SHORTEST_FOR_BLOCKS = 256
# One score of a plan costs as much as 1.2 to 2.4 of the dense kernel's: small tiles, gathers, half-hidden tiles
COST_OF_A_PLANNED_SCORE = 2
# ... and a dense one that is spelled out as much as 1.5 to 4 of them
COST_OF_A_SPELLED_OUT_SCORE = 1.6


def lay_out(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    num_seen: int | torch.Tensor,
    global_attention_mask: torch.Tensor | None = None,
    prefix_lengths: torch.Tensor | None = None,
) -> Texts:
    """Finds the texts of a batch.

    Args:
        hidden_states: `(B, Q, size)`, of this call's tokens. num_seen: tokens before them.
        attention_mask: `(B, slots)`, 1 for real tokens, or None. documents: as `packed_documents` numbers them.
        global_attention_mask: `(B, slots of the first call)`, 1 for global tokens. prefix_lengths: `(B,)`.
    """
    device = hidden_states.device
    marked = None if global_attention_mask is None else global_attention_mask.to(device).bool()
    prefix = None if prefix_lengths is None else prefix_lengths.to(device)
    if not is_plain_mask(attention_mask) and documents is None:
        length = torch.as_tensor(num_seen + hidden_states.shape[1], device=device).view(1, 1)
        return Texts(torch.zeros_like(length), length, None, marked, prefix)
    if not is_plain_mask(attention_mask):
        attention_mask = torch.ones_like(documents)  # type: ignore[arg-type]  # packed: there are documents
    real = attention_mask.to(device).bool()
    num_slots = real.shape[1]
    slots = torch.arange(num_slots, device=device).expand_as(real)
    # Of each text, the first and the last slot with a real token
    numbers = torch.zeros_like(slots) if documents is None else documents.expand_as(slots)
    firsts, lasts = slots.masked_fill(~real, num_slots), slots.masked_fill(~real, -1)
    table = slots.new_zeros(slots.shape[0], num_slots + 2)
    starts = table.scatter_reduce(1, numbers, firsts, "amin", include_self=False)
    ends = table.scatter_reduce(1, numbers, lasts, "amax", include_self=False)
    if documents is None:
        starts, ends = starts[:, :1], ends[:, :1]
    else:
        starts, ends = starts.gather(1, numbers), ends.gather(1, numbers)
    return Texts(starts, (ends - starts + 1).clamp(min=0), documents, marked, prefix)


class Scene(NamedTuple):
    """What one forward of a stack knows when it lowers its patterns."""

    config: Any
    hidden_states: torch.Tensor  # (B, Q, size), for sizes, dtype and device
    attention_mask: torch.Tensor | None  # (B, slots), 1 for real tokens
    position_ids: torch.Tensor  # (B, Q)
    texts: Texts
    cache: Cache | None

    def sizes(self, layer_idx: int) -> tuple[int, int, int, int]:
        """Queries, slots before them, keys, and slots before those, of a layer."""
        num_queries = self.hidden_states.shape[1]
        if self.cache is None:
            return num_queries, 0, num_queries, 0
        return num_queries, self.cache.get_seq_length(layer_idx), *self.cache.get_mask_sizes(num_queries, layer_idx)


def simplify(pattern: Pattern, scene: Scene) -> Pattern:
    """`full` in place of a pattern that hides nothing in texts as short as these: they run the code of full attention."""
    if is_traced() or (scene.cache is not None and scene.cache.is_compileable):
        return pattern
    if type(pattern) is PrefixLm:
        return Full() if scene.texts.prefix is None else pattern
    length = seen_tokens(scene.cache) + scene.hidden_states.shape[1]
    return Full() if length <= pattern.longest_whole(scene.config.is_causal_stack) else pattern


def is_plain_full(pattern: Pattern, scene: Scene) -> bool:
    """Whether a query sees all of its row, or all of its past."""
    return type(pattern) is Full and scene.texts.documents is None


def lower_to_plan(
    pattern: Pattern, scene: Scene, bias_index: Callable | None = None
) -> BlockPlan | LatePlan | HashedTexts | None:
    """The plan by which the block kernel computes a pattern, where that gives the same result and is cheaper; else None.

    The kernel stands in for the default backends. It does not continue a cache, and it takes no score bias that each layer
    makes for its own queries. Of chunks that are sorted by hash, each layer makes the plan for its own queries; they take no
    score bias. Under torch.compile, where shapes alone are known, the plan is made when the graph runs; an exported program
    has a mask, and so needs none of our code.

    Args:
        bias_index: `(queries' places, keys' places)` -> columns of the score bias's table, for schemes that have one.
    """
    batch, length = scene.hidden_states.shape[:2]
    is_growing = scene.cache is None or not scene.cache.is_compileable
    if (
        torch.jit.is_tracing()
        or torch.compiler.is_exporting()
        or length < SHORTEST_FOR_BLOCKS
        or not leaves_blocks(scene.config._attn_implementation)
        or scene.config.position_embedding_type == "transformer_xl"
        or not (is_growing and is_first_call(scene.cache))
    ):
        return None
    if is_torchdynamo_compiling():
        if isinstance(pattern, (Full, Lsh)):
            return None
        columns = None if bias_index is None else columns_of_distances(bias_index, length, scene.hidden_states.device)
        return late_plan(pattern, scene, columns)
    is_causal, num_heads = scene.config.is_causal_stack, scene.config.num_attention_heads
    rows = scene.texts.rows(batch, length, is_causal, scene.attention_mask)
    if rows is None:
        return None
    if isinstance(pattern, Lsh):
        # Always worth it: spelled out pair by pair, the chunks cost many times the scores
        is_sorted = pattern.chunked and bias_index is None
        return hash_texts(rows, scene.hidden_states.device) if is_sorted else None
    planned = sum(planned_scores(pattern, text, num_heads=num_heads) for text, _ in rows)
    # A dense mask computes every pair; the causal kernel without a mask, half of them
    is_unmasked = is_plain_full(pattern, scene) and scene.attention_mask is None and bias_index is None
    dense = batch * length * length / (2 if is_causal and is_unmasked else 1)
    if planned * COST_OF_A_PLANNED_SCORE >= dense * cost_of_a_dense_score(scene.config._attn_implementation):
        return None
    return make_plan(pattern, rows, num_heads=num_heads, bias_index=bias_index, device=scene.hidden_states.device)


def late_plan(pattern: Pattern, scene: Scene, columns: torch.Tensor | None) -> LatePlan:
    """What the plan of a pattern will be made from. Args: columns: of the score bias, as in `BlockPlan`."""
    config, layer = scene.config, getattr(pattern, "layer", 0)
    heads_differ = len(pattern.by_head(config.num_attention_heads)) > 1
    spec = constant_string(pattern)
    return LatePlan(spec, layer, config.is_causal_stack, heads_differ, scene.texts, scene.attention_mask, columns)


@torch.compiler.assume_constant_result
def constant_string(pattern: Pattern) -> str:
    """The entry of a pattern, which no compiler looks into."""
    return str(pattern)


def cost_of_a_dense_score(implementation: str) -> float:
    """As a multiple of sdpa's."""
    return COST_OF_A_SPELLED_OUT_SCORE if implementation == SPELLED_OUT else 1


def leaves_blocks(implementation: str) -> bool:
    """Whether a backend is one that the block kernel stands in for: `sdpa`, also by the platform's other names, and ours."""
    return implementation == SPELLED_OUT or ALL_MASK_ATTENTION_FUNCTIONS.get(implementation) is sdpa_mask


def hash_texts(rows: list[tuple[Text, int]], device: torch.device) -> HashedTexts:
    """The texts that each layer sorts by its hashes, from `Texts.rows`."""
    by_length: dict[int, list[int]] = {}
    for text, first in rows:
        by_length.setdefault(text.length, []).append(first)
    firsts = ((torch.tensor(own, device=device)[:, None], length) for length, own in by_length.items())
    return HashedTexts(tuple(own + torch.arange(length, device=device) for own, length in firsts))


def lower_to_mask(pattern: Pattern, scene: Scene, layer_idx: int, has_bias: bool = False) -> Any:
    """What the layers of one pattern hide, as the backend takes it; None where nothing is hidden but, in a causal stack, the
    future.

    Args:
        layer_idx: a layer with the pattern, to read the cache's lengths from.
        has_bias: a score bias will be added: the mask is spelled out, so that this can be done once.
    """
    config, hidden_states, num_heads = scene.config, scene.hidden_states, scene.config.num_attention_heads
    num_queries, num_seen, num_keys, first_key = scene.sizes(layer_idx)
    if is_plain_full(pattern, scene):
        # The platform's own, which knows when a backend needs no mask at all
        if not config.is_causal_stack:
            return create_bidirectional_mask(config, hidden_states, scene.attention_mask, None, scene.cache)
        options: dict[str, Any] = {"allow_is_causal_skip": False} if has_bias and num_queries > 1 else {}
        return create_causal_mask(config, hidden_states, scene.attention_mask, scene.cache, **options)
    if scene.texts.documents is not None and (len(hidden_states) > 1 or scene.attention_mask is not None):
        refuse_flash(config, "a batch of packed documents, but for one row without padding")
    is_seen = mask_function(pattern, scene.texts, config.is_causal_stack, num_heads)
    padding = scene.attention_mask
    padding = None if padding is None else padding.to(hidden_states.device, torch.bool)
    if len(pattern.by_head(num_heads)) > 1:
        if mask_maker(config) is flex_attention_mask:
            return block_mask_by_head(is_seen, padding, scene, layer_idx)
        is_seen = for_each_head(is_seen, num_heads)
    return mask_maker(config)(
        batch_size=hidden_states.shape[0],
        q_length=num_queries,
        kv_length=num_keys,
        q_offset=num_seen,
        kv_offset=first_key,
        mask_function=is_seen,
        attention_mask=padding,
        allow_is_causal_skip=False,
        dtype=hidden_states.dtype,
        config=config,
        device=hidden_states.device,
    )


def lower_source(
    scene: Scene, encoder_hidden_states: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor | None
) -> Any:
    """What the queries of a decoder see of an encoder's states, as the backend takes it: all, or the source of their own.

    Args:
        encoder_hidden_states: `(B, K, encoder_size)`. attention_mask: `(B, K)`, 1 for real tokens, or as the backend takes it.
        position_ids: `(B, K)`, of the sources; where they restart inside a row, it holds several.

    Raises:
        ValueError: for a row with several sources and another number of documents.
    """
    config, targets = scene.config, scene.texts
    sources = None
    if position_ids is not None and (attention_mask is None or is_plain_mask(attention_mask)):
        sources = packed_documents(position_ids, attention_mask)
    if sources is not None or targets.documents is not None:
        refuse_flash(config, "packed documents that attend to an encoder")
    if sources is None:
        return create_bidirectional_mask(config, scene.hidden_states, attention_mask, encoder_hidden_states)
    batch, length = scene.hidden_states.shape[:2]
    of_keys = sources.to(scene.hidden_states.device).expand(batch, -1)
    of_queries = of_keys.new_ones(batch, length) if targets.documents is None else targets.documents.expand(batch, -1)
    num_sources, num_targets = of_keys[:, -1], of_queries[:, -1]
    is_alone = num_sources == 1
    if not is_traced():
        is_wrong = (num_sources != num_targets) & ~is_alone
        if is_wrong.any():
            row = int(is_wrong.nonzero()[0])
            raise ValueError(
                f"Row {row} packs {num_sources[row]} sources and {num_targets[row]} targets: in the first call, "
                "`decoder_position_ids` must restart as often as `position_ids`; generate from one source a row."
            )
        plan = plan_of_sources(scene, lay_out(encoder_hidden_states, attention_mask, sources, 0), attention_mask)
        if plan is not None:
            return plan

    def is_seen(batch_idx, head_idx, q_idx, kv_idx):
        return (of_queries[batch_idx, q_idx] == of_keys[batch_idx, kv_idx]) | is_alone[batch_idx]

    return create_bidirectional_mask(
        config, scene.hidden_states, attention_mask, encoder_hidden_states, and_mask_function=is_seen
    )


def plan_of_sources(scene: Scene, sources: Texts, attention_mask: torch.Tensor | None) -> BlockPlan | None:
    """The plan by which each document attends to the source of its own, under the same conditions as `lower_to_plan`.

    Args:
        sources: laid out in the encoder's slots, of which `attention_mask` marks the real ones.
    """
    batch, length = scene.hidden_states.shape[:2]
    num_keys = sources.starts.shape[1]
    if length < SHORTEST_FOR_BLOCKS or not leaves_blocks(scene.config._attn_implementation):
        return None
    of_queries = scene.texts.rows(batch, length, False, scene.attention_mask)
    of_keys = sources.rows(batch, num_keys, False, attention_mask)
    if of_queries is None or of_keys is None:
        return None
    if [first // length for _, first in of_queries] != [first // num_keys for _, first in of_keys]:
        return None  # one source for several documents, or none
    pairs = [(text.length, first, source.length, key) for (text, first), (source, key) in zip(of_queries, of_keys)]
    planned = sum(queries * keys for queries, _, keys, _ in pairs)
    dense = batch * length * num_keys * cost_of_a_dense_score(scene.config._attn_implementation)
    if planned * COST_OF_A_PLANNED_SCORE >= dense:
        return None
    heads = slice(0, scene.config.num_attention_heads, 1)
    return BlockPlan((tuple(Group(Rows(1, q, first), Rows(1, k, key), None, heads) for q, first, k, key in pairs),))


def refuse_flash(config: Any, what: str) -> None:
    """Refuses a backend whose masks tell padding alone, which would show what must be hidden."""
    name = config._attn_implementation
    if ALL_MASK_ATTENTION_FUNCTIONS.get(name) is flash_attention_mask:
        raise ValueError(
            f"`attn_implementation={name!r}` cannot hide {what}; use 'sdpa' or 'flex_attention', or give one document a row."
        )


def mask_maker(config: Any) -> Callable:
    """The function that makes masks for the backend.

    Raises:
        ValueError: for a backend that has none, which would show what a pattern hides.
    """
    name = config._attn_implementation
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"`attn_implementation={name!r}` has no mask function, so it cannot hide what `attention_patterns` hide; register "
            "one with `AttentionMaskInterface.register`."
        )
    return ALL_MASK_ATTENTION_FUNCTIONS[name]


def for_each_head(is_seen: Callable, num_heads: int) -> Callable:
    """The truth spelled out for all heads, for masks that are made as if for one: `(B, H, Q, K)` from any head index."""

    def is_seen_by_each(batch_idx, head_idx, q_idx, kv_idx):
        heads = torch.arange(num_heads, device=q_idx.device).view(1, -1, 1, 1)
        return is_seen(batch_idx, heads, q_idx, kv_idx)

    return is_seen_by_each


def block_mask_by_head(is_seen: Callable, padding: torch.Tensor | None, scene: Scene, layer_idx: int) -> Any:
    """FlexAttention's mask where the heads differ, which transformers' function takes to be alike."""
    num_queries, num_seen, num_keys, first_key = scene.sizes(layer_idx)

    def is_seen_and_real(batch_idx, head_idx, q_idx, kv_idx):
        query, key = q_idx + num_seen, kv_idx + first_key
        seen = is_seen(batch_idx, head_idx, query, key)
        return seen if padding is None else seen & padding[batch_idx, key]

    batch, device = scene.hidden_states.shape[0], scene.hidden_states.device
    num_heads = scene.config.num_attention_heads
    return create_block_mask(is_seen_and_real, batch, num_heads, num_queries, num_keys, device=device.type)


def repeat_bias(pattern: Pattern, scene: Scene, layer_idx: int) -> torch.Tensor | None:
    """`(B, 1, Q, K)`: the logarithm of how often each key counts, where a pattern counts some more than once."""
    if type(pattern).repeats is Pattern.repeats:
        return None
    texts, device = scene.texts, scene.hidden_states.device
    num_queries, num_seen, num_keys, first_key = scene.sizes(layer_idx)
    queries = torch.arange(num_queries, device=device)[None, :, None] + num_seen
    keys = torch.arange(num_keys, device=device)[None, None, :] + first_key
    rows = torch.arange(texts.starts.shape[0], device=device)[:, None, None]
    repeats = pattern.repeats(texts.pairs(rows, queries, keys, scene.config.is_causal_stack))
    return None if repeats is None else repeats.to(scene.hidden_states.dtype).log()[:, None]


def find_global_rows(pattern: Pattern, scene: Scene, scheme: Callable | None) -> GlobalRows | None:
    """The queries that global projections serve, and what they see: all of their text; None for other patterns.

    Args:
        scheme: score biases of `(B, Q)` and `(B, K)` positions, where the position scheme has some.
    """
    if not (isinstance(pattern, LocalGlobal) and pattern.global_projections):
        return None
    texts, device = scene.texts, scene.hidden_states.device
    batch, length = scene.hidden_states.shape[:2]
    num_seen = seen_tokens(scene.cache)
    slots, numbers = torch.arange(length, device=device)[None] + num_seen, torch.arange(batch, device=device)[:, None]
    places = texts.pairs(numbers, slots, slots, is_causal=False)
    is_real = torch.ones(batch, length, dtype=torch.bool, device=device)
    if scene.attention_mask is not None:
        is_real = scene.attention_mask[:, -length:].to(device).bool()
    is_global = pattern.is_global(places.query, places.query_marked) & is_real
    # At least one, so that the projections get a gradient in every step
    most = length if is_traced() else max(1, int(is_global.sum(-1).max()))
    index = is_global.int().argsort(dim=-1, descending=True, stable=True)[:, :most]
    seen = is_real[:, None, :].expand(-1, most, -1)
    if texts.documents is not None:
        documents = texts.documents.expand(batch, -1)
        seen = seen & (documents.gather(1, index)[:, :, None] == documents[:, None, :])
    bias = None
    if scheme is not None:
        positions = scene.position_ids.expand(batch, -1)
        bias = functools.partial(scheme, positions.gather(1, index), positions)
    shown = torch.zeros((), device=device, dtype=scene.hidden_states.dtype)
    return GlobalRows(is_global, index, torch.where(seen[:, None], shown, float("-inf")), bias)


def is_plain_mask(attention_mask) -> bool:
    """Whether a mask is 2-D, one entry a token; others come as a backend takes them."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


def is_traced() -> bool:
    """Whether shapes alone are known: under torch.compile, torch.export and torch.jit.trace."""
    return is_torchdynamo_compiling() or torch.jit.is_tracing()


def is_pair_cache(past_key_values) -> bool:
    """Whether a cache holds an encoder-decoder's two kinds of keys: the decoder's own and the encoder's."""
    return isinstance(past_key_values, EncoderDecoderCache)


def seen_tokens(cache: Cache | None) -> int | torch.Tensor:
    """How many tokens a cache has seen; a static cache says so in a tensor once it holds any."""
    return 0 if cache is None else cache.get_seq_length()


def is_first_call(cache: Cache | None) -> bool:
    """Whether nothing came before this call's tokens."""
    seen = seen_tokens(cache)
    return isinstance(seen, int) and seen == 0
