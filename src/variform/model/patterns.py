"""What each query of a text may see: one small value a pattern, from which every backend's mask is made.

A pattern is read from a config entry such as `"sliding_window:512"` and says three things:

- the truth: `visible(pairs)`, elementwise over (query, key) pairs of places;
- the plan: `order(text)`, how to sort the tokens, and `tiles(text)`, which ranges of sorted keys each range of sorted
  queries needs at most. A kernel trims the tiles with the truth, so the plan only has to cover it;
- the memory: `retained(is_causal)`, how many of the last keys a cache must hold.

Places count the tokens of one text from 0, padding before it left out; packed documents are texts of their own.
Legend: n tokens in a text.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin

import torch

# Queries in a tile. A tile of a narrow window is smaller, or most of what it computes would be hidden
WIDE_TILE, NARROW_TILE = 128, 64

Range = tuple[int, int]  # from the first to before the second
Places = int | torch.Tensor


class Text(NamedTuple):
    """One text, as far as patterns look at it."""

    length: int  # tokens
    is_causal: bool
    marked: tuple[int, ...] = ()  # places that the caller's `global_attention_mask` marks, in rising order
    prefix: int = 0  # how many first tokens see each other both ways, in a prefix language model


class Pairs(NamedTuple):
    """Pairs of places that broadcast against each other, and what there is to know of the texts that they are in."""

    query: torch.Tensor
    key: torch.Tensor
    length: Places
    is_causal: bool
    query_marked: bool | torch.Tensor = False
    key_marked: bool | torch.Tensor = False
    prefix: Places = 0


class Tile(NamedTuple):
    """A range of sorted queries and the ranges of sorted keys that they need at most."""

    queries: Range
    keys: list[Range]


@dataclass(frozen=True)
class Pattern:
    """What one layer's queries may see. Values compare and hash by their fields.

    Subclasses say it in `sees`, both ways; in a causal stack the future is hidden on top of that.
    """

    name: ClassVar[str]

    def sees(self, pairs: Pairs) -> torch.Tensor:
        """Boolean, of the broadcast shape of the pairs: what is seen where the future is not hidden."""
        raise NotImplementedError

    def visible(self, pairs: Pairs) -> torch.Tensor:
        """The truth: what is seen, boolean, of the broadcast shape of the pairs."""
        seen = self.sees(pairs)
        return seen & (pairs.key <= pairs.query) if pairs.is_causal else seen

    def repeats(self, pairs: Pairs) -> torch.Tensor | None:
        """How often each visible key counts in the softmax; None where each counts once."""
        return None

    def order(self, text: Text) -> torch.Tensor | None:
        """`(n,)`: the places in sorted order; None where they stay as they are."""
        return None

    def tiles(self, text: Text) -> list[Tile]:
        """Tiles, in sorted order, that cover the truth and every query once."""
        raise NotImplementedError

    def parts(self, is_causal: bool) -> tuple["Pattern", ...]:
        """Patterns of one order each that show no pair twice and together all that this one shows."""
        return (self,)

    def by_head(self, num_heads: int) -> dict["Pattern", list[int]]:
        """The heads of each pattern, where the heads of a layer differ."""
        return {self: list(range(num_heads))}

    def at_layer(self, layer_idx: int) -> "Pattern":
        """The pattern of one layer, where the layers of a stack differ."""
        return self

    def retained(self, is_causal: bool) -> int | None:
        """How many of the last keys, the query's own with them, a later query can see; None for all."""
        return None

    def longest_whole(self, is_causal: bool) -> float:
        """The length up to which texts are seen whole, as `full` sees them."""
        raise NotImplementedError

    def check(self, is_causal: bool, max_length: int, num_heads: int) -> None:
        """Raises `ValueError` for values that make no sense in a stack, naming the mend."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            at_least = field.metadata.get("at_least")
            for number in value if isinstance(value, tuple) else (value,):
                self.refuse(
                    at_least is not None and number < at_least,
                    f"`{field.name}={number}` must be at least {at_least}{field.metadata.get('unit', '')}.",
                )
                self.refuse(
                    field.metadata.get("is_reach", False) and number > max_length,
                    f"`{field.name}={number}` is wider than `max_position_embeddings={max_length}`; use 'full'.",
                )

    def refuse(self, condition: bool, message: str) -> None:
        """Raises `ValueError`, naming the pattern, if `condition` holds."""
        if condition:
            raise ValueError(f"`attention_patterns` entry '{self}': {message}")

    def to_dict(self) -> dict[str, Any]:
        """The entry of a config: the name, and each field that has no default or differs from it."""
        entry: dict[str, Any] = {"name": self.name}
        for field in public_fields(type(self)):
            value = getattr(self, field.name)
            if value != field.default:
                entry[field.name] = list(value) if isinstance(value, tuple) else value
        return entry

    def __str__(self) -> str:
        """The entry as a string, the shortest that means the same."""
        entry = self.to_dict()
        del entry["name"]
        first = next(iter(public_fields(type(self))), None)
        words = []
        for name, value in entry.items():
            text = "/".join(map(str, value)) if isinstance(value, list) else str(value).lower()
            words.append(text if first is not None and name == first.name else f"{name}={text}")
        return self.name + (":" + ",".join(words) if words else "")


def count(at_least: int = 1, unit: str = "", is_reach: bool = False, **options: Any) -> Any:
    """A field that counts something. `is_reach`: a number of tokens that must not exceed the longest text."""
    metadata = {"at_least": at_least, "unit": unit, "is_reach": is_reach}
    return dataclasses.field(metadata=metadata, **options)


def hidden(default: Any) -> Any:
    """A field that the stack fills in, and no config entry."""
    return dataclasses.field(default=default, metadata={"is_hidden": True})


def public_fields(pattern: type[Pattern]) -> list[dataclasses.Field]:
    """The fields that a config entry may give."""
    return [field for field in dataclasses.fields(pattern) if not field.metadata.get("is_hidden")]


def tile_size(reach: int) -> int:
    """How many queries to take together where each sees about `reach` keys on a side."""
    return WIDE_TILE if reach >= WIDE_TILE else NARROW_TILE


def split(start: int, end: int, size: int) -> Iterator[Range]:
    """The range in pieces of `size`, the last one shorter."""
    return ((first, min(end, first + size)) for first in range(start, end, size))


def union(ranges: list[Range]) -> list[Range]:
    """Ranges that may be empty or overlap, as ranges in rising order that do neither."""
    merged: list[Range] = []
    for start, end in sorted(span for span in ranges if span[0] < span[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def band(start: int, end: int, before: int, after: int, size: int) -> list[Tile]:
    """Tiles of a band within sorted places `start` to `end`: each query with keys `before` to `after` it."""
    spans = split(start, end, size)
    return [Tile((a, b), [(max(start, a - before), min(end, b + after))]) for a, b in spans]


@dataclass(frozen=True)
class Full(Pattern):
    """Everything: `full`."""

    name: ClassVar[str] = "full"

    def sees(self, pairs: Pairs) -> torch.Tensor:
        return (pairs.query == pairs.query) & (pairs.key == pairs.key)

    def tiles(self, text: Text) -> list[Tile]:
        return [Tile((a, b), [(0, b if text.is_causal else text.length)]) for a, b in split(0, text.length, WIDE_TILE)]

    def longest_whole(self, is_causal: bool) -> float:
        return math.inf


@dataclass(frozen=True)
class PrefixLm(Full):
    """Everything before, and within the first `prefix_lengths` tokens everything both ways (T5, arXiv:1910.10683, sec.
    3.2.1): `prefix_lm`, in causal stacks."""

    name: ClassVar[str] = "prefix_lm"

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return (pairs.key <= pairs.query) | ((pairs.query < pairs.prefix) & (pairs.key < pairs.prefix))

    def tiles(self, text: Text) -> list[Tile]:
        return [Tile((a, b), [(0, max(b, text.prefix))]) for a, b in split(0, text.length, WIDE_TILE)]

    def longest_whole(self, is_causal: bool) -> float:
        return 0  # with a prefix, more is seen than in `full`

    def check(self, is_causal: bool, max_length: int, num_heads: int) -> None:
        self.refuse(not is_causal, "an encoder sees all of its text both ways already; use 'full'.")


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


def residues(length: int, gap: int) -> tuple[torch.Tensor, list[Range]]:
    """The places sorted by remainder of division by `gap`, and the range of each remainder in that order."""
    classes = [torch.arange(start, length, gap) for start in range(min(gap, length))]
    ends = torch.tensor([len(places) for places in classes]).cumsum(0).tolist()
    return torch.cat(classes), list(zip([0, *ends], ends))


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
        n, last = text.length, (text.length - 1) // self.block
        if self.placement == "first" and n <= self._whole():
            return Full().tiles(text)
        rows = torch.arange(last + 1)
        drawn = range(self.random if self.placement == "random" else 0)
        randoms = [self._random_block(rows, number, n, text.is_causal).tolist() for number in drawn]
        tiles = []
        for row in range(last + 1):
            blocks = {0, row - 1, row, row + 1, *(of_rows[row] for of_rows in randoms)} - {-1}
            blocks |= set() if text.is_causal else {last}
            keys = union([(block * self.block, min(n, (block + 1) * self.block)) for block in blocks])
            span = (row * self.block, min(n, (row + 1) * self.block))
            sees_all = row == 0 or (row == last and not text.is_causal)
            tiles += [Tile(part, [(0, n)] if sees_all else keys) for part in split(*span, WIDE_TILE)]
        return tiles

    def at_layer(self, layer_idx: int) -> Pattern:
        return dataclasses.replace(self, layer=layer_idx if self.placement == "random" else 0)

    def check(self, is_causal: bool, max_length: int, num_heads: int) -> None:
        super().check(is_causal, max_length, num_heads)
        self.refuse(
            is_causal and self.placement == "first",
            "`placement=first` sees short texts whole, so what a token sees depends on what follows; use it in an encoder.",
        )

    def _random_block(self, row: torch.Tensor, number: int, length: Places, is_causal: bool) -> torch.Tensor:
        """The block that each row draws from its stretch `number` of the candidates; -1 where there is none."""
        last = (length - 1) // self.block
        before = (row - 2).clamp(min=0)  # candidates 1 to row - 2
        after = torch.zeros_like(row) if is_causal else (last - 2 - row).clamp(min=0)  # row + 2 to last - 1
        candidates = before + after
        start, end = number * candidates // self.random, (number + 1) * candidates // self.random
        drawn = start + scramble(row, self.seed, self.layer, number) % (end - start).clamp(min=1)
        block = torch.where(drawn < before, drawn + 1, drawn - before + row + 2)
        return torch.where(end > start, block, -1)

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


PATTERNS: dict[str, type[Pattern]] = {
    pattern.name: pattern
    for pattern in (Full, SlidingWindow, Dilated, Chunked, LocalGlobal, Strided, Fixed, BigBird, Lsh, PrefixLm)
}


def parse(spec: str | dict[str, Any]) -> Pattern:
    """The pattern of a config entry: `"dilated:64,gap=2"` and `{"name": "dilated", "window": 64, "gap": 2}` are the same.

    In a string, a value without a name belongs to the first field, and numbers of a list are parted by "/".

    Raises:
        ValueError: for an unknown name or field, or a value of a wrong type, naming the choices.
    """
    if not isinstance(spec, (str, dict)):
        raise ValueError(f"`attention_patterns` entry {spec!r} is neither a string nor a dict.")
    name = spec.partition(":")[0] if isinstance(spec, str) else spec.get("name")
    if name not in PATTERNS:
        near = difflib.get_close_matches(str(name), PATTERNS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`attention_patterns={name!r}` is not one of {sorted(PATTERNS)}.{hint}")
    fields = read_string(spec) if isinstance(spec, str) else spec
    entry = {key: value for key, value in fields.items() if key != "name"}
    allowed = {field.name: field for field in public_fields(PATTERNS[name])}
    needed = [key for key, field in allowed.items() if field.default is dataclasses.MISSING]
    if not set(needed) <= entry.keys() <= allowed.keys():
        optional = [key for key in allowed if key not in needed]
        raise ValueError(
            f"`attention_patterns` entry {spec!r}: '{name}' needs {needed or 'nothing'} and may have {optional or 'no more'}."
        )
    return PATTERNS[name](**{key: read_value(spec, allowed[key], value) for key, value in entry.items()})


def read_string(spec: str) -> dict[str, Any]:
    """The fields that a string gives, values still strings where they are no numbers."""
    name, _, arguments = spec.partition(":")
    entry: dict[str, Any] = {}
    fields = public_fields(PATTERNS[name])
    for number, argument in enumerate(arguments.split(",") if arguments else []):
        key, _, text = argument.rpartition("=")
        if not key:
            if number or not fields:
                raise ValueError(f"`attention_patterns` entry {spec!r}: {argument!r} is not `name=value`.")
            key = fields[0].name
        words: list[Any] = [int(word) if word.lstrip("-").isdigit() else word for word in text.split("/")]
        entry[key] = words if len(words) > 1 else {"true": True, "false": False}.get(text, words[0])
    return entry


def read_value(spec: Any, field: dataclasses.Field, value: Any) -> Any:
    """The value of a pattern's field, checked for its type."""
    kind: Any = field.type
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if kind is bool:
        fits, wanted = isinstance(value, bool), "true or false"
    elif kind is int:
        fits, wanted = is_number, "a whole number"
    elif get_origin(kind) is Literal:
        fits, wanted = value in get_args(kind), f"one of {list(get_args(kind))}"
    else:
        numbers = value if isinstance(value, (list, tuple)) else [value]
        fits = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        wanted = "a whole number or a list of them"
        value = value if is_number else tuple(numbers)
    if not fits:
        raise ValueError(f"`attention_patterns` entry {spec!r}: `{field.name}={value!r}` must be {wanted}.")
    return value


def pairs_of(text: Text, query: torch.Tensor, key: torch.Tensor) -> Pairs:
    """The pairs of places of one text."""
    marked = torch.zeros(text.length, dtype=torch.bool)
    marked[list(text.marked)] = True
    return Pairs(query, key, text.length, text.is_causal, marked[query], marked[key], text.prefix)


def visible_matrix(pattern: Pattern, text: Text) -> torch.Tensor:
    """`(n, n)` boolean, queries down and keys across: the truth of one text, for tests and pictures."""
    places = torch.arange(text.length)
    return pattern.visible(pairs_of(text, places[:, None], places[None, :]))


def count_visible(pattern: Pattern, text: Text, num_heads: int = 1) -> float:
    """How many (query, key) pairs of a text are seen, a head on average; takes as long as there are pairs."""
    total = 0
    for of_heads, heads in pattern.by_head(num_heads).items():
        for part in of_heads.parts(text.is_causal):
            order = part.order(text)
            order = torch.arange(text.length) if order is None else order
            for (first, end), ranges in part.tiles(text):
                keys = torch.cat([order[a:b] for a, b in ranges])
                seen = part.visible(pairs_of(text, order[first:end, None], keys[None, :]))
                total += int(seen.sum()) * len(heads)
    return total / num_heads
