"""Which rows attend to which: the tiles of a pattern over the texts of a batch, in groups that are computed in one call.

The tokens of all texts lie end to end as rows, so that a batch, padding on either side and packed documents are one
thing: texts, each with the number of its first row. Tiles of one shape that hide the same form a group.
Legend: N rows, H heads, T tiles of a group, Q queries and K keys of a tile, S sequences, n tokens of a sequence.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import torch

from .pattern_base import Pattern, Range, Text, Tile, pairs_of, split, union

# Pairs of a query and a key whose truth is made at once: what that takes stays in a processor's cache
PAIRS_AT_ONCE = 2**18
# Pairs of a tile that is joined from several, at most
PAIRS_OF_A_TILE = 2**20
# Pairs of a group that is worth a call of its own, at least
PAIRS_OF_A_CALL = 2**14
# Rows that are sorted at once, at most: what is computed from them is to stay in a processor's cache
SORTED_ROWS_ON_CPU = 2**12


class Rows(NamedTuple):
    """T lists of row numbers: regular ones, `start + tile * step + place * stride`, are read as views; others are listed.

    The numbers of a list differ from each other; two lists may have some in common.
    """

    tiles: int  # T
    length: int  # of each list
    start: int = 0
    step: int = 0
    stride: int = 1
    listed: torch.Tensor | None = None  # (T, length)

    @staticmethod
    def of(numbers: torch.Tensor) -> "Rows":
        """From `(T, length)` row numbers."""
        count, length = numbers.shape
        start, last = int(numbers[0, 0]), int(numbers[-1, -1])
        step = int(numbers[1, 0]) - start if count > 1 else 0
        stride = int(numbers[0, 1]) - start if length > 1 else 1
        rows = Rows(count, length, start, step, stride)
        # The lists lie apart by a whole number of strides, or all of them between two rows of the first
        is_orderly = stride > 0 and step >= 0 and (step % stride == 0 or step * (count - 1) < stride)
        is_regular = is_orderly and last == start + step * (count - 1) + stride * (length - 1)
        if is_regular and torch.equal(rows.numbers(numbers.device), numbers):
            return rows
        return Rows.listing(numbers)

    @staticmethod
    def listing(numbers: torch.Tensor) -> "Rows":
        """From `(T, length)` row numbers that are not known to be regular."""
        return Rows(numbers.shape[0], numbers.shape[1], listed=numbers)

    def numbers(self, device: torch.device | None = None) -> torch.Tensor:
        """`(T, length)` row numbers."""
        if self.listed is not None:
            return self.listed
        numbers, places = torch.arange(self.tiles, device=device), torch.arange(self.length, device=device)
        return self.start + numbers[:, None] * self.step + places * self.stride

    def cut(self, first: int, end: int) -> "Rows":
        """Some of the lists."""
        listed = None if self.listed is None else self.listed[first:end]
        return self._replace(tiles=end - first, start=self.start + first * self.step, listed=listed)

    def move(self, shift: int, device: torch.device | str | None) -> "Rows":
        """The rows that lie `shift` behind."""
        listed = None if self.listed is None else (self.listed + shift).to(device)
        return self._replace(start=self.start + shift, listed=listed)

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """`(N, H, D)` -> `(T, H, length, D)`, a view where the rows are regular."""
        if self.listed is not None:
            taken = states.index_select(0, self.listed.flatten())
            return taken.unflatten(0, self.listed.shape).transpose(1, 2)
        row, head, element = states.stride()
        return states.as_strided(
            (self.tiles, states.shape[1], self.length, states.shape[2]),
            (self.step * row, head, self.stride * row, element),
            states.storage_offset() + self.start * row,
        )

    def put(self, states: torch.Tensor, values: torch.Tensor) -> None:
        """Writes `(T, H, length, D)` into `states`; no two lists may share a row."""
        if self.listed is None:
            self.take(states).copy_(values)
        else:
            states.index_copy_(0, self.listed.flatten(), values.transpose(1, 2).flatten(0, 1).to(states.dtype))

    def add(self, states: torch.Tensor, values: torch.Tensor) -> None:
        """Adds `(T, H, length, D)` to `states`; a row that lists share gets the sum."""
        shift = self.step // self.stride  # places from one list to the next
        if self.listed is not None:
            states.index_add_(0, self.listed.flatten(), values.transpose(1, 2).flatten(0, 1).to(states.dtype))
        elif self.tiles == 1 or 0 < self.step < self.stride or shift >= self.length:
            self.take(states).add_(values)
        elif shift == 0:
            self.cut(0, 1).take(states).add_(values.sum(0, keepdim=True))
        elif self.tiles * shift <= self.length:
            # Overlapping views may not be written at once: one list after the other
            for tile in range(self.tiles):
                self.cut(tile, tile + 1).take(states).add_(values[tile])
        else:
            # ... or, of all lists, as many places as do not overlap
            for first, end in split(0, self.length, shift):
                layer = self._replace(length=end - first, start=self.start + first * self.stride)
                layer.take(states).add_(values[:, :, first:end])


class Places(NamedTuple):
    """What hides, of tokens in an order of their own: a mask that each call makes for itself, in its cache.

    In float32, which is exact below 2**24 and faster to compare than whole numbers.
    """

    query: torch.Tensor  # (T, H, Q, 1): before which place a query's keys lie; or its own, and it sees all others
    key: torch.Tensor  # (T, H, 1, K)
    is_causal: bool

    def seen(self) -> torch.Tensor:
        """`(T, H, Q, K)`: 1 where seen, 0 where hidden."""
        ahead = self.query - self.key
        return (ahead if self.is_causal else ahead.abs_()).clamp_(0, 1)


class Group(NamedTuple):
    """Tiles that are computed together: the queries of each attend to its keys, where the mask lets them."""

    query: Rows
    key: Rows
    # (1 or T, 1, Q, K): boolean, True is seen, or what is added to the scores; None where all is seen
    mask: torch.Tensor | Places | None
    heads: slice = slice(0, 1)

    def pairs(self) -> int:
        """How many scores the group has, a head."""
        return self.query.tiles * self.query.length * self.key.length

    def cut(self, size: int) -> Iterator["Group"]:
        """The group in pieces of up to `size` tiles."""
        if self.query.tiles <= size:
            yield self
            return
        for first, end in split(0, self.query.tiles, size):
            mask = self.mask
            if isinstance(mask, Places):
                mask = Places(mask.query[first:end], mask.key[first:end], mask.is_causal)
            elif mask is not None and len(mask) > 1:
                mask = mask[first:end]
            yield self._replace(query=self.query.cut(first, end), key=self.key.cut(first, end), mask=mask)


class Sorted(NamedTuple):
    """Sequences of rows of one head, each in an order of its own: read side by side, they are the heads of plain groups.

    The rows are read and written once, however many of the groups' tiles share them.
    """

    query: torch.Tensor  # (n, S): the row at each place of each sequence
    key: torch.Tensor  # (m, S)
    groups: tuple[Group, ...]  # their rows are places, their heads sequences


class BlockPlan(NamedTuple):
    """What `block_attention` computes; tensors and numbers alone, so that it travels like any argument of a layer."""

    # A head has each query at most once in a round; the rounds' softmax sums are added
    rounds: tuple[tuple[Group | Sorted, ...], ...]
    # (2 * longest - 1,): the column of the bias table for each distance, key minus query, from 1 - longest on
    columns: torch.Tensor | None = None


def make_plan(
    pattern: Pattern,
    texts: list[tuple[Text, int]],
    *,
    num_heads: int,
    bias_index: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    device: torch.device | str | None = None,
) -> BlockPlan:
    """The plan of a pattern for the texts of a batch.

    Args:
        texts: each with its first row; its tokens are the rows from there on. Rows of no text come out as 0.
        bias_index: `(queries' places, keys' places)`, broadcast -> int64 columns of the table of score biases. They depend
            on the distance from query to key alone.
        device: of the states.
    """
    first_rows: dict[Text, list[int]] = {}
    for text, first in texts:
        if text.length > 0:
            first_rows.setdefault(text, []).append(first)
    is_causal = any(text.is_causal for text in first_rows)
    rounds: list[list[Group]] = []
    for own_pattern, own_heads in pattern.by_head(num_heads).items():
        for number, part in enumerate(own_pattern.parts(is_causal)):
            if number == len(rounds):
                rounds.append([])
            groups = list(groups_of_texts(part, first_rows, device))
            rounds[number] += [group._replace(heads=heads) for heads in slices(own_heads) for group in groups]
    columns = None
    if bias_index is not None:
        longest = max((text.length for text in first_rows), default=1)
        columns = columns_of_distances(bias_index, longest, device)
    return BlockPlan(tuple(map(tuple, rounds)), columns)


def columns_of_distances(bias_index: Callable, longest: int, device: torch.device | str | None) -> torch.Tensor:
    """`BlockPlan.columns` for texts of up to `longest` tokens. Args: bias_index: as in `make_plan`."""
    distance = torch.arange(1 - longest, longest, device=device)
    return bias_index((-distance).clamp(min=0), distance.clamp(min=0))


def make_sorted_plan(
    orders: torch.Tensor,
    tiles: list[Tile],
    key_orders: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
) -> BlockPlan:
    """The plan of sequences of one length that are sorted each in its own way: with Reformer's hashes, one a batch and head.

    Args:
        orders: `(rounds, S, n)` int64, the places of each sequence in sorted order. Place p of sequence s is row `s * n + p`,
            of one head. A pair that is seen in several rounds counts as often.
        tiles: in sorted order, the same for all sequences.
        key_orders: `(rounds, S, m)`, the same for the keys of the tiles, in which a place may stand twice; default: `orders`.
        ends: `(S, n)`, of its tile's keys a token sees those that lie before this place; default: all but itself.
    """
    num_sequences, length = orders.shape[1:]
    key_orders = orders if key_orders is None else key_orders
    rows_at_once = SORTED_ROWS_ON_CPU if orders.device.type == "cpu" else math.inf
    at_once = max(1, int(min(num_sequences, rows_at_once // length)))
    pieces = list(pieces_of_tiles(tiles, rows_at_once))
    rounds = []
    for order, key_order in zip(orders, key_orders):
        order_ends = order if ends is None else ends.gather(1, order)
        found = []
        for first, end in split(0, num_sequences, at_once):
            sequences = slice(first, end)
            first_rows = torch.arange(first, end, device=orders.device) * length
            for queries, keys, groups in pieces:
                own, own_keys = order[sequences, slice(*queries)].T, key_order[sequences, slice(*keys)].T
                own_ends = order_ends[sequences, slice(*queries)].T
                masked = (hide(group, own_ends, own_keys, is_causal=ends is not None) for group in groups)
                found.append(Sorted(own + first_rows, own_keys + first_rows, tuple(masked)))
        rounds.append(tuple(found))
    return BlockPlan(tuple(rounds))


def pieces_of_tiles(tiles: list[Tile], rows_at_once: float) -> Iterator[tuple[Range, Range, list[Group]]]:
    """Neighbouring tiles with up to so many queries together: the ranges of their queries and keys, and groups of places
    that are counted from the beginnings of those."""
    first = 0
    while first < len(tiles):
        end, start = first + 1, tiles[first].queries[0]
        while end < len(tiles) and tiles[end].queries[1] - start <= rows_at_once:
            end += 1
        own, first = tiles[first:end], end
        ranges = union([span for tile in own for span in tile.keys])
        queries, keys = (start, own[-1].queries[1]), (ranges[0][0], ranges[-1][1])
        places = torch.arange(max(queries[1] - queries[0], keys[1] - keys[0]))
        moved = (
            ([(a - queries[0], b - queries[0])], [(c - keys[0], d - keys[0]) for c, d in of_keys])
            for (a, b), of_keys in own
        )
        yield queries, keys, [Group(Rows.of(q), Rows.of(k), None) for q, k in by_shape(moved, places)]


def hide(group: Group, ends: torch.Tensor, places: torch.Tensor, is_causal: bool) -> Group:
    """A group of sorted tiles with its mask: `(n, S)` ends of queries and `(m, S)` places of keys, as `Places` has them."""
    of_queries, of_keys = (
        rows.take(side.float()[..., None]) for rows, side in ((group.query, ends), (group.key, places))
    )
    mask = Places(of_queries, of_keys.transpose(-1, -2), is_causal)
    return group._replace(mask=mask, heads=slice(0, ends.shape[1]))


@functools.lru_cache(maxsize=1024)
def planned_scores(pattern: Pattern, text: Text, num_heads: int) -> float:
    """How many scores a plan computes for a text, a head on average: the sizes of the tiles, before the truth trims them."""
    total = 0
    for own_pattern, heads in pattern.by_head(num_heads).items():
        for part in own_pattern.parts(text.is_causal):
            for (start, end), ranges in part.tiles(text):
                total += len(heads) * (end - start) * size_of(ranges)
    return total / num_heads


def groups_of_texts(part: Pattern, first_rows: dict[Text, list[int]], device) -> Iterator[Group]:
    """The groups of all texts. Small ones that are alike become one, large ones are moved to their rows as they are."""
    alike: dict[tuple, list[tuple[Group, list[int]]]] = {}
    for text, firsts in first_rows.items():
        for key, group in groups_of_text(part, text):
            alike.setdefault(key, []).append((group, firsts))
    for members in alike.values():
        mask = members[0][0].mask
        mask = None if mask is None else mask.to(device)
        small = [(group, firsts) for group, firsts in members if group.pairs() < PAIRS_OF_A_CALL]
        if sum(len(firsts) for _, firsts in small) > 1:
            query, key = (gather(small, side, device) for side in ("query", "key"))
            yield Group(query, key, mask)
            members = [(group, firsts) for group, firsts in members if group.pairs() >= PAIRS_OF_A_CALL]
        for group, firsts in members:
            for first in firsts:
                yield Group(group.query.move(first, device), group.key.move(first, device), mask)


def gather(members: list[tuple[Group, list[int]]], side: Literal["query", "key"], device) -> Rows:
    """The rows of one side of groups, each from all of its first rows on."""
    numbers = [getattr(group, side).numbers() + torch.tensor(firsts)[:, None, None] for group, firsts in members]
    return Rows.of(torch.cat([part.flatten(0, 1) for part in numbers])).move(0, device)


@functools.lru_cache(maxsize=64)
def groups_of_text(part: Pattern, text: Text) -> list[tuple[tuple, Group]]:
    """The groups of a text whose first row is 0, each with a key that is equal for equal shapes and masks."""
    order = part.order(text)
    order = torch.arange(text.length) if order is None else order
    alike: dict[tuple, list[TextTiles]] = {}
    for places in by_shape(join(part.tiles(text)), order):
        size = max(1, PAIRS_AT_ONCE // (places[0].shape[1] * places[1].shape[1]))
        for queries, keys in zip(*(side.split(size) for side in places)):
            for tiles in trim(part, text, queries, keys):
                alike.setdefault(tiles.key, []).append(tiles)
    groups = []
    for key, own in alike.items():
        queries, keys = torch.cat([tiles.queries for tiles in own]), torch.cat([tiles.keys for tiles in own])
        mask = None if own[0].mask is None else own[0].mask[None, None]
        groups += [(key, Group(of_queries, of_keys, mask)) for of_queries, of_keys in rows_of_tiles(queries, keys)]
    return groups


class TextTiles(NamedTuple):
    """Tiles with one mask, by the places of a text."""

    key: tuple  # equal for equal shapes and masks
    queries: torch.Tensor  # (T, Q)
    keys: torch.Tensor  # (T, K)
    mask: torch.Tensor | None  # (Q, K), as in `Group`


def trim(part: Pattern, text: Text, queries: torch.Tensor, keys: torch.Tensor) -> Iterator[TextTiles]:
    """The tiles `(T, Q)` and `(T, K)`, those with one mask together, without the keys that none of their queries sees."""
    pairs = pairs_of(text, queries[:, :, None], keys[:, None, :])
    # Bytes, whose extremes are found several times as fast as `any` and `all` of booleans
    counts, repeats = part.visible(pairs).view(torch.uint8), part.repeats(pairs)
    if repeats is not None:
        counts = counts * repeats
    rest = torch.arange(len(queries))
    while len(rest) > 0:
        own_counts = counts[rest[0]]
        is_alike = torch.ones(1, dtype=torch.bool)
        if len(rest) > 1:
            is_alike = (counts[rest] == own_counts).flatten(1).view(torch.uint8).amin(1).bool()
        own, rest = rest[is_alike], rest[~is_alike]
        own_queries, own_keys = queries[own], keys[own]
        is_used = own_counts.amax(0) > 0
        if not is_used.all():
            own_counts, own_keys = own_counts[:, is_used], own_keys[:, is_used]
        if own_keys.shape[1] == 0:
            continue
        mask, content = None, b""
        least, most = (int(extreme) for extreme in own_counts.aminmax())
        if (least, most) != (1, 1):
            mask = own_counts.float().log() if most > 1 else own_counts.bool()
            content = hashlib.sha256(mask.cpu().contiguous().numpy().tobytes()).digest()
        yield TextTiles((*own_counts.shape, content), own_queries, own_keys, mask)


def join(tiles: list[Tile]) -> Iterator[tuple[list[Range], list[Range]]]:
    """Queries and keys of the tiles, as ranges of sorted places; neighbouring tiles that need the same keys are one."""
    for keys, equal in itertools.groupby(tiles, key=lambda tile: tile.keys):
        queries = union([tile.queries for tile in equal])
        if size_of(queries) * size_of(keys) <= PAIRS_OF_A_TILE:
            yield queries, keys
        else:
            size = max(1, PAIRS_OF_A_TILE // size_of(keys))
            yield from (([piece], keys) for span in queries for piece in split(*span, size))


def by_shape(
    tiles: Iterable[tuple[list[Range], list[Range]]], order: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The places `(T, Q)` of queries and `(T, K)` of keys, of the tiles of one shape at a time."""
    shapes: dict[tuple[int, int], tuple[list[Range], list[Range]]] = {}
    for queries, keys in tiles:
        all_queries, all_keys = shapes.setdefault((size_of(queries), size_of(keys)), ([], []))
        all_queries += queries
        all_keys += keys
    for (num_queries, num_keys), (queries, keys) in shapes.items():
        # All the keys there are may as well come as they lie, which is a view
        key_order = order if num_keys < len(order) else order.sort().values
        yield order[numbers_in(queries)].view(-1, num_queries), key_order[numbers_in(keys)].view(-1, num_keys)


def size_of(ranges: list[Range]) -> int:
    """How many numbers are in the ranges."""
    return sum(end - start for start, end in ranges)


def numbers_in(ranges: list[Range]) -> torch.Tensor:
    """The numbers of the ranges, one range after the other."""
    starts, ends = torch.tensor(ranges).unbind(1)
    lengths = ends - starts
    ahead = starts - (lengths.cumsum(0) - lengths)  # of each range's numbers, over their places in the result
    return torch.arange(size_of(ranges)) + ahead.repeat_interleave(lengths)


def rows_of_tiles(queries: torch.Tensor, keys: torch.Tensor) -> Iterator[tuple[Rows, Rows]]:
    """The tiles `(T, Q)` and `(T, K)` in few parts: long runs at a regular distance, which are views, and the others."""
    rest: list[int] = []
    for first, end in runs(torch.stack((queries[:, 0], keys[:, 0]), dim=1)):
        rows = Rows.of(queries[first:end]), Rows.of(keys[first:end])
        is_view = rows[0].listed is None and rows[1].listed is None
        if is_view and (end - first) * queries.shape[1] * keys.shape[1] >= PAIRS_OF_A_CALL:
            yield rows
        else:
            rest += range(first, end)
    if rest:
        yield Rows.of(queries[rest]), Rows.of(keys[rest])


def runs(points: torch.Tensor) -> Iterator[Range]:
    """Ranges of `(number, dimensions)` points in which each is as far from the one before."""
    steps = points.diff(dim=0).tolist()
    first = 0
    for number in range(2, len(points)):
        if number - first > 1 and steps[number - 1] != steps[first]:
            yield first, number
            first = number
    yield first, len(points)


def slices(heads: list[int]) -> list[slice]:
    """Rising numbers of heads as slices, which are views."""
    found = []
    for first, end in runs(torch.tensor(heads)[:, None]):
        step = heads[first + 1] - heads[first] if end - first > 1 else 1
        found.append(slice(heads[first], heads[end - 1] + 1, step))
    return found
