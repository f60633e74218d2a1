"""Patterns that reach across a text at less than its full cost: columns, summaries, random blocks and equal hashes."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from .pattern_base import (
    WIDE_TILE,
    Full,
    Pairs,
    Pattern,
    Places,
    Text,
    Tile,
    band,
    count,
    hidden,
    residues,
    split,
    tile_size,
    union,
)


@dataclass(frozen=True)
class Near(Pattern):
    """Keys less than `reach` away on either side: one half of `strided`."""

    name: ClassVar[str] = "near"
    reach: int

    def sees(self, pairs: Pairs) -> torch.Tensor:
        return (pairs.query - pairs.key).abs() < self.reach

    def tiles(self, text: Text) -> list[Tile]:
        before = self.reach - 1
        return band(0, text.length, before, 0 if text.is_causal else before, tile_size(self.reach))

    def longest_whole(self, is_causal: bool) -> float:
        return self.reach


@dataclass(frozen=True)
class Column(Pattern):
    """Every `stride`-th key: the other half of `strided`. `is_far` leaves out the query itself, which is near."""

    name: ClassVar[str] = "column"
    stride: int
    is_far: bool = False

    def sees(self, pairs: Pairs) -> torch.Tensor:
        distance = pairs.query - pairs.key
        seen = distance % self.stride == 0
        return seen & (distance != 0) if self.is_far else seen

    def order(self, text: Text) -> torch.Tensor | None:
        return residues(text.length, self.stride)[0]

    def tiles(self, text: Text) -> list[Tile]:
        return [
            Tile((a, b), [(start, b if text.is_causal else end)])
            for start, end in residues(text.length, self.stride)[1]
            for a, b in split(start, end, WIDE_TILE)
        ]

    def longest_whole(self, is_causal: bool) -> float:
        return 1


@dataclass(frozen=True)
class Strided(Pattern):
    """The last `stride` keys, and every `stride`-th one: `strided:STRIDE` (Sparse Transformer, arXiv:1904.10509, sec. 4.3).

    The column alone has n * n / stride scores: a stride near the square root of n makes that n ** 1.5.

    Args:
        stride: in tokens.
        heads: "merged", each head sees both; "split", the first half of the heads sees the last keys, the other half the
            column; "column", all see the column alone, for layers that alternate with `sliding_window`.
    """

    name: ClassVar[str] = "strided"
    stride: int = count(at_least=2, unit=" tokens", is_reach=True)
    heads: Literal["merged", "split", "column"] = "merged"

    def sees(self, pairs: Pairs) -> torch.Tensor:
        return Near(self.stride).sees(pairs) | Column(self.stride).sees(pairs)

    def parts(self, is_causal: bool) -> tuple[Pattern, ...]:
        return (Near(self.stride), Column(self.stride, is_far=True))

    def by_head(self, num_heads: int) -> dict[Pattern, list[int]]:
        if self.heads == "merged":
            return super().by_head(num_heads)
        half = num_heads // 2 if self.heads == "split" else 0
        halves: dict[Pattern, list[int]] = {Near(self.stride): list(range(half))} if half else {}
        return {**halves, Column(self.stride): list(range(half, num_heads))}

    def longest_whole(self, is_causal: bool) -> float:
        return self.stride + 1 if self.heads == "merged" else 1

    def check(self, is_causal: bool, max_length: int, num_heads: int) -> None:
        super().check(is_causal, max_length, num_heads)
        self.refuse(
            self.heads == "split" and num_heads < 2, "`heads=split` needs 2 heads or more; use `heads=merged`."
        )


@dataclass(frozen=True)
class Fixed(Pattern):
    """The query's own block, and the last `summary` places of every block: `fixed:BLOCK` (Sparse Transformer,
    arXiv:1904.10509, sec. 4.3). The summaries alone have n * n * summary / block scores.

    Args:
        block: tokens in a block.
        summary: how many places of each block all later queries see.
        groups: with more than one, head h sees the summary that lies h % groups times `summary` places further in front.
        shift: the number of the summary, counted from the end of a block.
    """

    name: ClassVar[str] = "fixed"
    block: int = count(at_least=2, unit=" tokens", is_reach=True)
    summary: int = count(unit=" token", default=1)
    groups: int = count(default=1)
    shift: int = hidden(0)

    def sees(self, pairs: Pairs) -> torch.Tensor:
        return (pairs.query // self.block == pairs.key // self.block) | self._is_summary(pairs.key)

    def order(self, text: Text) -> torch.Tensor | None:
        places = torch.arange(text.length)
        is_summary = self._is_summary(places)
        return torch.cat((places[is_summary], places[~is_summary]))

    def tiles(self, text: Text) -> list[Tile]:
        # Sorted: the summaries of all blocks, then the rest of all blocks
        n, rest = text.length, self.block - self.summary
        summaries = int(self._is_summary(torch.arange(n)).sum())
        tiles = []
        for number in range(-(-n // self.block)):
            own_summary = (min(summaries, number * self.summary), min(summaries, (number + 1) * self.summary))
            own_rest = (min(n, summaries + number * rest), min(n, summaries + (number + 1) * rest))
            seen = [(0, own_summary[1] if text.is_causal else summaries), own_rest]
            tiles += [Tile(span, union(seen)) for part in (own_summary, own_rest) for span in split(*part, WIDE_TILE)]
        return tiles

    def by_head(self, num_heads: int) -> dict[Pattern, list[int]]:
        heads: dict[Pattern, list[int]] = {}
        for head in range(num_heads):
            heads.setdefault(Fixed(self.block, self.summary, shift=head % self.groups), []).append(head)
        return heads

    def longest_whole(self, is_causal: bool) -> float:
        return self.block

    def check(self, is_causal: bool, max_length: int, num_heads: int) -> None:
        super().check(is_causal, max_length, num_heads)
        self.refuse(
            self.summary * self.groups > self.block,
            f"{self.groups} groups of `summary={self.summary}` places do not fit into `block={self.block}`.",
        )
        self.refuse(self.groups > num_heads, f"`groups={self.groups}` is more than there are heads, {num_heads}.")

    def _is_summary(self, places: torch.Tensor) -> torch.Tensor:
        place, end = places % self.block, self.block - self.shift * self.summary
        return (place >= end - self.summary) & (place < end)


def scramble(number: Any, *salts: int) -> Any:
    """A number below 2 ** 31 that looks random, from integers or int64 tensors: the same on every machine."""
    for salt in (*salts, 0):
        number = number ^ (salt * 0x9E3779B1 & 0x7FFFFFFF)
        number = ((number ^ (number >> 16)) * 0x45D9F3B) & 0x7FFFFFFF
        number = ((number ^ (number >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
        number = number ^ (number >> 16)
    return number


@dataclass(frozen=True)
class BigBird(Pattern):
    """Neighbouring blocks, the first and the last block, and random ones: `big_bird:BLOCK` (arXiv:2007.14062, sec. 2).

    The first and, both ways, the last block see and are seen by all. The random blocks of a row of blocks follow from the
    fields, the layer and the row, in training and evaluation alike: the blocks that the row does not see yet are cut into
    `random` stretches, and one of each is drawn. A causal row draws from the past alone.

    Args:
        block: tokens in a block.
        random: random blocks a row.
        placement: "random", or "first": all random blocks of a row fall on the first block, which then counts once more for
            each, and texts of up to (5 + 2 * random) blocks are seen whole (what transformers' BigBird does in evaluation).
        seed: of the draw.
    """

    name: ClassVar[str] = "big_bird"
    block: int = count(unit=" token", is_reach=True, default=64)
    random: int = count(at_least=0, default=3)
    placement: Literal["random", "first"] = "random"
    seed: int = count(at_least=0, default=0)
    layer: int = hidden(0)

    def sees(self, pairs: Pairs) -> torch.Tensor:
        row, column = pairs.query // self.block, pairs.key // self.block
        seen = ((row - column).abs() <= 1) | (column == 0) | (row == 0)
        if not pairs.is_causal:
            last = (pairs.length - 1) // self.block
            seen = seen | (row == last) | (column == last)
        if self.placement == "first":
            return seen | self._is_short(pairs)
        for number in range(self.random):
            seen = seen | (column == self._random_block(row, number, pairs.length, pairs.is_causal))
        return seen

    def repeats(self, pairs: Pairs) -> torch.Tensor | None:
        if self.placement == "random":
            return None
        row, column, last = pairs.query // self.block, pairs.key // self.block, (pairs.length - 1) // self.block
        is_between = (row > 0) & (row < last) if not pairs.is_causal else row > 0
        return 1 + self.random * ((column == 0) & is_between & ~self._is_short(pairs))

    def tiles(self, text: Text) -> list[Tile]:
        n = text.length
        if self.placement == "first" and n <= self._whole():
            return Full().tiles(text)
        spans, tiles = list(split(0, n, self.block)), []
        for row, span in enumerate(spans):
            keys = union([spans[block] for block in self.blocks_of(row, n, text.is_causal)])
            tiles += [Tile(part, keys) for part in split(*span, WIDE_TILE)]
        return tiles

    def blocks_of(self, row: int, length: int, is_causal: bool) -> set[int]:
        """The blocks that a row of blocks sees, in a text that is not seen whole; in a causal one, up to its own."""
        last = (length - 1) // self.block
        if row in (0, last) and not is_causal:
            return set(range(last + 1))
        drawn = range(self.random if self.placement == "random" else 0)
        randoms = [self._random_block(row, number, length, is_causal) for number in drawn]
        blocks = {0, row - 1, row, row + 1, last, *randoms}
        return {block for block in blocks if 0 <= block <= (row if is_causal else last)}

    def at_layer(self, layer_idx: int) -> Pattern:
        return dataclasses.replace(self, layer=layer_idx if self.placement == "random" else 0)

    def check(self, is_causal: bool, max_length: int, num_heads: int) -> None:
        super().check(is_causal, max_length, num_heads)
        self.refuse(
            is_causal and self.placement == "first",
            "`placement=first` sees short texts whole, so what a token sees depends on what follows; use it in an encoder.",
        )

    def _random_block(self, row: Any, number: int, length: Places, is_causal: bool) -> Any:
        """The block that a row, or each row of a tensor, draws from its stretch `number` of the candidates; -1 for none."""
        last = (length - 1) // self.block
        # Arithmetic alone, which numbers and tensors share: a condition is 0 or 1
        before = (row > 2) * (row - 2)  # candidates 1 to row - 2
        after = 0 if is_causal else (row < last - 2) * (last - 2 - row)  # row + 2 to last - 1
        candidates = before + after
        start, end = number * candidates // self.random, (number + 1) * candidates // self.random
        drawn = start + scramble(row, self.seed, self.layer, number) % (end - start + (start == end))
        block = drawn + 1 + (drawn >= before) * (row + 1 - before)
        return (end > start) * (block + 1) - 1

    def _whole(self) -> int:
        return (5 + 2 * self.random) * self.block

    def _is_short(self, pairs: Pairs) -> torch.Tensor:
        return (pairs.query >= 0) & (pairs.key >= 0) & torch.as_tensor(pairs.length <= self._whole())

    def longest_whole(self, is_causal: bool) -> float:
        if self.placement == "first":
            return self._whole()
        return (self.random + (3 if is_causal else 4)) * self.block


@dataclass(frozen=True)
class Lsh(Full):
    """Keys that hash like the query: `lsh:BUCKETS` (Reformer, arXiv:2001.04451, sec. 2). Queries and keys are one projection.

    Which those are depends on the states and is decided where they are at hand, in `lsh.py`; of the places, all may be seen.

    Args:
        buckets: how many buckets a hash has; even. A list of even numbers gives their product, of as many hashes in one,
            which costs less where there are many: 64/128.
        rounds: hashes; seen is what shares a bucket in at least one of them.
        chunked: Reformer's approximation: in each round the tokens are sorted by bucket and cut into chunks, a chunk sees
            itself and the one before, and the rounds' softmaxes are summed. Its order depends on the whole text, so that a
            causal stack with it has no cache.
        chunk: tokens in a chunk, with `chunked`.
        seed: of the hashes, which differ by layer and are the same in training and evaluation.
    """

    name: ClassVar[str] = "lsh"
    buckets: int | tuple[int, ...] = count(at_least=2)
    rounds: int = count(default=1)
    chunked: bool = False
    chunk: int = count(unit=" token", default=64)
    seed: int = count(at_least=0, default=0)

    @property
    def factors(self) -> tuple[int, ...]:
        """The numbers of buckets of the hashes that make one."""
        return (self.buckets,) if isinstance(self.buckets, int) else self.buckets

    def longest_whole(self, is_causal: bool) -> float:
        return 0  # what is seen, and how, depends on the states

    def check(self, is_causal: bool, max_length: int, num_heads: int) -> None:
        super().check(is_causal, max_length, num_heads)
        self.refuse(self.factors == (), "`buckets` is empty; give an even number, or several.")
        for number in self.factors:
            self.refuse(number % 2 != 0, f"`buckets={number}` must be even: a hash and its opposite are a pair.")
        self.refuse(
            self.chunked and self.chunk > max_length,
            f"`chunk={self.chunk}` is wider than `max_position_embeddings={max_length}`; use less.",
        )
        self.refuse(
            not self.chunked and self.chunk != Lsh.chunk,
            f"`chunk={self.chunk}` is the size of the pieces of `chunked=true`; add that, or drop it.",
        )
