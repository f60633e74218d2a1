"""How many (query, key) pairs of a text patterns show, by arithmetic: a mask of them takes as long as there are pairs."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ..model.local_patterns import Chunked, Dilated, LocalGlobal, SlidingWindow
from ..model.pattern_base import Full, Pattern, PrefixLm, split
from ..model.sparse_patterns import BigBird, Column, Fixed, Lsh, Near, Strided


@lru_cache(maxsize=1024)
def visible_pairs(pattern: Pattern, length: int, is_causal: bool, num_heads: int = 1) -> float:
    """How many pairs a pattern shows, a head on average, of a text without marked tokens and without a prefix.

    Of `lsh`, whose pairs depend on the states, those to be expected of hashes that fall evenly.
    """
    by_head = pattern.by_head(num_heads)
    total = sum(len(heads) * PAIRS[type(own)](own, length, is_causal) for own, heads in by_head.items())
    return total / num_heads


def seen_pairs(length: int, window: int | None, is_causal: bool) -> int:
    """How many pairs of a text are seen, all of them or within a window.

    Args:
        length: of the text in tokens.
        window: keys that a causal query sees, with itself, or that a query sees on each side; None for all.
    """
    if not is_causal:
        # The past and the future alike, each with the query itself, which is one pair and not two
        return 2 * seen_pairs(length, None if window is None else window + 1, is_causal=True) - length
    reach = length if window is None else min(window, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def pairs_at_gaps(length: int, gap: int, window: int | None, is_causal: bool) -> int:
    """The same of keys that lie `gap` apart: the places of each remainder of division by it are a text of their own."""
    shorter, longer = divmod(length, gap)  # so many of the texts have one token more
    short = seen_pairs(shorter, window, is_causal)
    return longer * seen_pairs(shorter + 1, window, is_causal) + (gap - longer) * short


def sizes(length: int, size: int) -> list[int]:
    """The tokens of each piece of a text, of which the last may be shorter."""
    return [end - start for start, end in split(0, length, size)]


def everything(pattern: Any, length: int, is_causal: bool) -> int:
    return seen_pairs(length, None, is_causal)


def in_window(pattern: SlidingWindow, length: int, is_causal: bool) -> int:
    return seen_pairs(length, pattern.window, is_causal)


def in_dilated(pattern: Any, length: int, is_causal: bool) -> int:
    return pairs_at_gaps(length, pattern.gap, pattern.window, is_causal)


def in_chunks(pattern: Chunked, length: int, is_causal: bool) -> int:
    chunks, is_cyclic, total = sizes(length, pattern.size), pattern.cyclic and not is_causal, 0
    for number, queries in enumerate(chunks):
        before = min(pattern.before, len(chunks) - 1 if is_cyclic else number)
        keys = before * pattern.size
        if number < before:  # around the end, past the last chunk, which may be shorter
            keys += chunks[-1] - pattern.size
        total += seen_pairs(queries, None, is_causal) + queries * keys
    return total


def in_local_global(pattern: LocalGlobal, length: int, is_causal: bool) -> int:
    first = min(pattern.tokens, length)
    rest = length - first
    near = seen_pairs(first, None, is_causal) + seen_pairs(rest, pattern.window, is_causal)
    return near + first * rest * (1 if is_causal else 2)


def in_near(pattern: Near, length: int, is_causal: bool) -> int:
    return seen_pairs(length, pattern.reach if is_causal else pattern.reach - 1, is_causal)


def in_column(pattern: Column, length: int, is_causal: bool) -> int:
    return pairs_at_gaps(length, pattern.stride, None, is_causal) - pattern.is_far * length


def in_strided(pattern: Strided, length: int, is_causal: bool) -> float:
    return sum(PAIRS[type(part)](part, length, is_causal) for part in pattern.parts(is_causal))


def in_fixed(pattern: Fixed, length: int, is_causal: bool) -> int:
    blocks = sizes(length, pattern.block)
    end = pattern.block - pattern.shift * pattern.summary
    summaries = [max(0, min(block, end) - (end - pattern.summary)) for block in blocks]
    total = 0
    for number, queries in enumerate(blocks):
        of_others = number * pattern.summary if is_causal else sum(summaries) - summaries[number]
        total += seen_pairs(queries, None, is_causal) + queries * of_others
    return total


def in_big_bird(pattern: BigBird, length: int, is_causal: bool) -> int:
    if length <= pattern.longest_whole(is_causal):
        return seen_pairs(length, None, is_causal)
    blocks, total = sizes(length, pattern.block), 0
    for row, queries in enumerate(blocks):
        others = pattern.blocks_of(row, length, is_causal) - {row}
        total += seen_pairs(queries, None, is_causal) + queries * sum(blocks[other] for other in others)
    return total


def expected_pairs(pattern: Lsh, length: int, is_causal: bool) -> float:
    """How many pairs `lsh` is expected to compute: those that share a bucket in a round, or two chunks a query and round."""
    all_pairs = seen_pairs(length, None, is_causal)
    if pattern.chunked:
        return pattern.rounds * all_pairs * min(1, 2 * pattern.chunk / length)
    apart = (1 - 1 / math.prod(pattern.factors)) ** pattern.rounds
    # A token sees itself only where it sees nothing else
    alone = (1 - apart**length) / (1 - apart) if is_causal else length * apart ** (length - 1)
    return (all_pairs - length) * (1 - apart) + alone


# What the heads of a pattern show; one whose heads differ has a pattern for each of them
PAIRS: dict[type[Pattern], Callable[[Any, int, bool], float]] = {
    Full: everything,
    PrefixLm: everything,
    SlidingWindow: in_window,
    Dilated: in_dilated,
    Chunked: in_chunks,
    LocalGlobal: in_local_global,
    Near: in_near,
    Column: in_column,
    Strided: in_strided,
    Fixed: in_fixed,
    BigBird: in_big_bird,
    Lsh: expected_pairs,
}
