"""Name tables: which foreign tensor is which of ours, and how to get from one to the other, in both directions."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

# What a placeholder in a name stands for
PLACES = {
    "i": r"\d+",
    "p": "weight|bias",
    "side": "encoder|decoder",
    "qkv": "[qkv]",
    "query_key_value": "query|key|value",
    "mlp": "gate|up|down",
}


class Operation(NamedTuple):
    """A reversible operation on tensors: `apply` from the foreign layout to ours, `revert` back.

    Both take and return a list; the second argument is the number of tensors to make.
    """

    apply: Callable[[list[torch.Tensor], int], list[torch.Tensor]]
    revert: Callable[[list[torch.Tensor], int], list[torch.Tensor]]


OPERATIONS = {
    # GPT-2 keeps its matrices as (in, out)
    "transpose": Operation(lambda tensors, _: [t.T for t in tensors], lambda tensors, _: [t.T for t in tensors]),
    # One fused tensor is several of ours, of equal size, one after another along the first dimension
    "split": Operation(lambda tensors, count: list(tensors[0].chunk(count)), lambda tensors, _: [torch.cat(tensors)]),
    # A vector that is stored as a matrix of one row
    "squeeze": Operation(lambda tensors, _: [tensors[0][0]], lambda tensors, _: [tensors[0][None]]),
    # ... or of one column
    "squeeze_second": Operation(lambda tensors, _: [tensors[0][:, 0]], lambda tensors, _: [tensors[0][:, None]]),
    # One tensor of all experts (experts, out, in) is a matrix each
    "unstack": Operation(lambda tensors, _: list(tensors[0]), lambda tensors, _: [torch.stack(tensors)]),
    # ... or two, the gate's and the other's, one above the other
    "unstack_pairs": Operation(
        lambda tensors, _: [half for matrix in tensors[0] for half in matrix.chunk(2)],
        lambda tensors, _: [torch.stack([torch.cat(pair) for pair in zip(tensors[::2], tensors[1::2])])],
    ),
    # One tensor of all experts (experts, in, out) is (experts, out, in)
    "transpose_each": Operation(
        lambda tensors, _: [t.mT for t in tensors], lambda tensors, _: [t.mT for t in tensors]
    ),
    # Of each expert, rows (or entries) that belong to a gate and to what it scales in turn: first all of the one kind
    "unzip": Operation(
        lambda tensors, _: [torch.cat((tensors[0][:, ::2], tensors[0][:, 1::2]), dim=1)],
        lambda tensors, _: [torch.stack(tensors[0].chunk(2, dim=1), dim=2).flatten(1, 2)],
    ),
    # Their matrices are one tensor of ours
    "stack": Operation(lambda tensors, _: [torch.stack(tensors)], lambda tensors, _: list(tensors[0])),
}


class Row(NamedTuple):
    """One line of a name table: `foreign` is `ours` after `operations`, applied from left to right.

    Names hold placeholders (`PLACES`), such as `{i}` for a layer's number; both sides hold the same ones. Either side may be
    several names, where a tensor of the other one is split.
    """

    foreign: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    operations: tuple[str, ...] = ()

    @property
    def foreign_parts(self) -> tuple[str, ...]:
        return (self.foreign,) if isinstance(self.foreign, str) else self.foreign

    @property
    def parts(self) -> tuple[str, ...]:
        """Our names."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def prefixed(self, foreign: str, ours: str) -> "Row":
        """The row with a prefix on either side, as under a head."""
        theirs = tuple(foreign + part for part in self.foreign_parts)
        return Row(theirs, tuple(ours + part for part in self.parts), self.operations)


class Move(NamedTuple):
    """One step of a conversion: `sources`, taken together, become `targets`."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    convert: Callable[[list[torch.Tensor]], list[torch.Tensor]]


def plan(rows: Sequence[Row], names: Iterable[str], *, outwards: bool) -> tuple[list[Move], list[str]]:
    """How to convert the tensors called `names`.

    Args:
        rows: the table; where several rows match a name, the first counts.
        names: what there is: foreign names, or ours if `outwards`.
        outwards: from ours to the foreign names.

    Returns:
        The moves, in the order of `names`, and the names that no row matches.
    """
    patterns = [
        (re.compile(as_pattern(template)), row)
        for row in rows
        for template in (row.parts if outwards else row.foreign_parts)
    ]
    moves: dict[tuple[str, ...], Move] = {}
    taken: set[str] = set()  # of hundreds of experts that make one tensor, the first has found the others
    unmatched = []
    for name in names:
        if name in taken:
            continue
        for pattern, row in patterns:
            match = pattern.fullmatch(name)
            if match:
                move = make_move(row, match.groupdict(), outwards)
                moves.setdefault(move.targets, move)
                taken.update(move.sources)
                break
        else:
            unmatched.append(name)
    return list(moves.values()), unmatched


def make_move(row: Row, places: Mapping[str, str], outwards: bool) -> Move:
    """The move that a row describes, with its placeholders filled in."""
    foreign, ours = (tuple(part.format(**places) for part in parts) for parts in (row.foreign_parts, row.parts))
    count = len(foreign if outwards else ours)

    def convert(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        for name in reversed(row.operations) if outwards else row.operations:
            operation = OPERATIONS[name]
            tensors = (operation.revert if outwards else operation.apply)(tensors, count)
        # Of their own memory: neither a view of the original nor of the file that it is read from
        return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]

    return Move(ours, foreign, convert) if outwards else Move(foreign, ours, convert)


def as_pattern(template: str) -> str:
    """The regular expression that a name with placeholders stands for."""
    return re.sub(r"\\\{(\w+)\\\}", lambda place: f"(?P<{place[1]}>{PLACES[place[1]]})", re.escape(template))
