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
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

# Queries in a tile. A tile of a narrow window is smaller, or most of what it computes would be hidden
WIDE_TILE, NARROW_TILE = 128, 64
WIDEST_OF_NARROW_TILES = 512

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
    """How many queries to take together where each sees about `reach` keys on a side. Measured: up to 512, narrow tiles are
    as fast or faster, by 3 to 19 %."""
    return WIDE_TILE if reach > WIDEST_OF_NARROW_TILES else NARROW_TILE


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


def residues(length: int, gap: int) -> tuple[torch.Tensor, list[Range]]:
    """The places sorted by remainder of division by `gap`, and the range of each remainder in that order."""
    classes = [torch.arange(start, length, gap) for start in range(min(gap, length))]
    ends = torch.tensor([len(places) for places in classes]).cumsum(0).tolist()
    return torch.cat(classes), list(zip([0, *ends], ends))


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
