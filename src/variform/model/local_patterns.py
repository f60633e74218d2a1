"""Patterns of the keys near a query: windows, windows with gaps, chunks, and a window beside a few tokens that all see."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .pattern_base import NARROW_TILE, Pairs, Pattern, Text, Tile, band, count, residues, split, tile_size, union


@dataclass(frozen=True)
class SlidingWindow(Pattern):
    """The nearest keys: `sliding_window:W` (Longformer, arXiv:2004.05150, sec. 3.1; Mistral, arXiv:2310.06825).

    Args:
        window: in a causal stack, keys with the query itself; both ways, keys on each side of it.
    """

    name: ClassVar[str] = "sliding_window"
    window: int = count(unit=" key", is_reach=True)

    def sees(self, pairs: Pairs) -> torch.Tensor:
        distance = pairs.query - pairs.key
        return distance < self.window if pairs.is_causal else distance.abs() <= self.window

    def tiles(self, text: Text) -> list[Tile]:
        before, after = (self.window - 1, 0) if text.is_causal else (self.window, self.window)
        return band(0, text.length, before, after, tile_size(self.window))

    def retained(self, is_causal: bool) -> int | None:
        return self.window if is_causal else None

    def longest_whole(self, is_causal: bool) -> float:
        return self.window if is_causal else self.window + 1

    def check(self, is_causal: bool, max_length: int, num_heads: int) -> None:
        super().check(is_causal, max_length, num_heads)
        self.refuse(
            is_causal and self.window == 1,
            "a causal window of 1 key, in which a token sees only itself; use 2 or more.",
        )


@dataclass(frozen=True)
class Dilated(Pattern):
    """A window with gaps: `dilated:W,gap=G` (Longformer, arXiv:2004.05150, sec. 3.1).

    Args:
        window: as for `sliding_window`, counted in keys that are seen, which lie `gap` apart.
        gap: distance from one key to the next, in tokens; a list gives the heads different gaps, tiled over them.
    """

    name: ClassVar[str] = "dilated"
    window: int = count(unit=" key")
    gap: int | tuple[int, ...] = count(unit=" token", default=2)

    def sees(self, pairs: Pairs) -> torch.Tensor:
        distance = pairs.query - pairs.key
        reach = (self.window - 1 if pairs.is_causal else self.window) * self.gap
        return (distance % self.gap == 0) & (distance.abs() <= reach)

    @property
    def _gap(self) -> int:
        # A pattern whose heads differ is never sorted itself
        return self.gap if isinstance(self.gap, int) else self.gap[0]

    def order(self, text: Text) -> torch.Tensor | None:
        return None if self._gap == 1 else residues(text.length, self._gap)[0]

    def tiles(self, text: Text) -> list[Tile]:
        before, after = (self.window - 1, 0) if text.is_causal else (self.window, self.window)
        spans = residues(text.length, self._gap)[1]
        return [tile for start, end in spans for tile in band(start, end, before, after, tile_size(self.window))]

    def by_head(self, num_heads: int) -> dict[Pattern, list[int]]:
        if isinstance(self.gap, int):
            return super().by_head(num_heads)
        heads: dict[Pattern, list[int]] = {}
        for head in range(num_heads):
            heads.setdefault(Dilated(self.window, self.gap[head % len(self.gap)]), []).append(head)
        return heads

    def retained(self, is_causal: bool) -> int | None:
        widest = self.gap if isinstance(self.gap, int) else max(self.gap)
        return (self.window - 1) * widest + 1 if is_causal else None

    def longest_whole(self, is_causal: bool) -> float:
        is_window = self.gap in (1, (1,))
        return SlidingWindow(self.window).longest_whole(is_causal) if is_window else 1

    def check(self, is_causal: bool, max_length: int, num_heads: int) -> None:
        super().check(is_causal, max_length, num_heads)
        gaps = (self.gap,) if isinstance(self.gap, int) else self.gap
        self.refuse(not 1 <= len(gaps) <= num_heads, f"`gap` lists {len(gaps)} numbers for {num_heads} heads.")
        reach = (self.window - 1 if is_causal else self.window) * max(gaps)
        self.refuse(
            reach >= max_length, f"it reaches {reach} tokens, beyond `max_position_embeddings={max_length}`; use less."
        )
        self.refuse(
            is_causal and self.window == 1,
            "a causal window of 1 key, in which a token sees only itself; use 2 or more.",
        )


@dataclass(frozen=True)
class Chunked(Pattern):
    """The text in pieces; a piece sees itself and, of the others, those just before it: `chunked:SIZE` (Llama 4's local
    layers; with `before=1`, Reformer's, arXiv:2001.04451).

    Args:
        size: tokens in a chunk.
        before: how many chunks before its own a token sees as well.
        cyclic: the first chunk comes after the last one. Both ways only: a causal text hides what comes after.
    """

    name: ClassVar[str] = "chunked"
    size: int = count(at_least=2, unit=" tokens", is_reach=True)
    before: int = count(at_least=0, unit=" chunks", default=0)
    cyclic: bool = False

    def sees(self, pairs: Pairs) -> torch.Tensor:
        distance = pairs.query // self.size - pairs.key // self.size
        if self.cyclic and not pairs.is_causal:
            distance = distance % ((pairs.length - 1) // self.size + 1)
        return (distance >= 0) & (distance <= self.before)

    def tiles(self, text: Text) -> list[Tile]:
        spans = list(split(0, text.length, self.size))
        is_cyclic = self.cyclic and not text.is_causal
        tiles = []
        for number, (start, end) in enumerate(spans):
            numbers = range(number - self.before, number) if self.before < len(spans) else range(-len(spans), number)
            earlier = [spans[other] for other in numbers if other >= 0 or is_cyclic]
            for a, b in split(start, end, tile_size(self.size)):
                tiles.append(Tile((a, b), union([*earlier, (start, b if text.is_causal else end)])))
        return tiles

    def retained(self, is_causal: bool) -> int | None:
        return (1 + self.before) * self.size if is_causal else None

    def longest_whole(self, is_causal: bool) -> float:
        return (1 + self.before) * self.size if is_causal or self.cyclic else self.size

    def check(self, is_causal: bool, max_length: int, num_heads: int) -> None:
        super().check(is_causal, max_length, num_heads)
        reach = self.before * self.size
        self.refuse(
            reach >= max_length,
            f"`before={self.before}` reaches {reach} tokens, beyond `max_position_embeddings={max_length}`; use less.",
        )
        self.refuse(
            self.cyclic and is_causal,
            "`cyclic=true` shows the first chunk the last one, which is its future; drop it.",
        )
        self.refuse(
            self.cyclic and self.before == 0, "`cyclic=true` says which chunk is before the first; add `before=1`."
        )


@dataclass(frozen=True)
class LocalGlobal(Pattern):
    """A window, and some tokens that see and are seen by all: `local_global:W` (Longformer, arXiv:2004.05150, sec. 3.1).

    Global are the first `tokens` of a text, and those that the forward's `global_attention_mask` marks.

    Args:
        window: as for `sliding_window`.
        tokens: how many first tokens are global by rule.
        global_projections: queries of global tokens, and the keys and values that they see, have projections of their own.
    """

    name: ClassVar[str] = "local_global"
    window: int = count(unit=" key", is_reach=True)
    tokens: int = count(at_least=0, is_reach=True, default=0)
    global_projections: bool = False

    def sees(self, pairs: Pairs) -> torch.Tensor:
        near = SlidingWindow(self.window).sees(pairs)
        return near | self.is_global(pairs.query, pairs.query_marked) | self.is_global(pairs.key, pairs.key_marked)

    def is_global(self, places: torch.Tensor, marked: bool | torch.Tensor) -> torch.Tensor:
        """Which places see, and are seen by, all of their text."""
        return (places < self.tokens) | marked

    def order(self, text: Text) -> torch.Tensor | None:
        first = self._first(text)
        if first == list(range(len(first))):
            return None
        is_first = torch.zeros(text.length, dtype=torch.bool)
        is_first[first] = True
        places = torch.arange(text.length)
        return torch.cat((places[is_first], places[~is_first]))

    def tiles(self, text: Text) -> list[Tile]:
        # Taking the global tokens out of the line brings the others nearer to each other, so the window still covers
        n, first = text.length, len(self._first(text))
        near = band(first, n, self.window, 0 if text.is_causal else self.window, tile_size(self.window))
        rows = [Tile(span, [(0, n)]) for span in split(0, first, NARROW_TILE)]
        return rows + [Tile(tile.queries, union([(0, first), *tile.keys])) for tile in near]

    def check(self, is_causal: bool, max_length: int, num_heads: int) -> None:
        super().check(is_causal, max_length, num_heads)
        self.refuse(
            is_causal and self.global_projections,
            "`global_projections=true` needs keys of its own for the whole past, which no cache holds; use it in an encoder.",
        )

    def _first(self, text: Text) -> list[int]:
        by_rule = range(min(self.tokens, text.length))
        return [*by_rule, *(place for place in text.marked if place >= self.tokens)]

    def longest_whole(self, is_causal: bool) -> float:
        return SlidingWindow(self.window).longest_whole(is_causal) + self.tokens
