"""Pictures of patterns: which query sees which key, in a terminal or as a PNG. Queries go down, keys across."""

import io
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.panel import Panel
from rich.text import Text as Line

from ..model.lsh import OwnKeys, as_key, see_by_hash
from ..model.pattern_base import Pattern, Text, pairs_of, visible_matrix
from ..model.sparse_patterns import Lsh
from .pairs import seen_pairs
from .views import Subject, View, views_of

# The width of the random states that are hashed for an example
EXAMPLE_SIZE = 32
# (query, key) pairs that are looked at together
PAIRS_AT_ONCE = 2**22
# Cells along a side: a longer text's stand for several tokens
CELLS_IN_A_TERMINAL, CELLS_IN_A_FIGURE = 64, 128
# What stands beside a small picture in a terminal is wider than it
NARROWEST = 34
# Half blocks by (upper, lower) cell: two rows of cells a line make them square
BLOCKS = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
# Up to so many cells, a figure parts them by lines
CELLS_WITH_LINES = 48
# Of a panel, of what parts panels, and of a line of words, in inches
SIDE, GAP, LINE_HEIGHT = 2.0, 0.14, 0.135
COLOURS = 64
SEEN, HIDDEN, FUTURE, LINES, INK, GREY = "#1d4f7c", "#ffffff", "#eceff1", "#d5dbdf", "#22303c", "#66747f"


class Seen(NamedTuple):
    """A pattern, looked at from far enough to fit a picture."""

    shares: torch.Tensor  # (C, C): of the pairs of each cell, how many are seen
    size: int  # tokens along a side of a cell
    counts: torch.Tensor  # (n,): how many keys each query sees


def look(view: View, most_cells: int) -> Seen:
    """What a pattern shows, in at most `most_cells` cells along a side."""
    length = view.text.length
    size = -(-length // most_cells)
    shares, counts = [], []
    for seen in truth_by_rows(view, rows=max(1, PAIRS_AT_ONCE // (length * size)) * size):
        counts.append(seen.sum(-1))
        # The last cells may reach beyond the text: they are shares of the pairs that there are
        of_rows = torch.nn.functional.pad(seen.float(), (0, -length % size, 0, -len(seen) % size))
        sums = of_rows.unflatten(1, (-1, size)).unflatten(0, (-1, size)).sum((1, 3))
        shares.append(sums / (sizes_of_cells(len(seen), size)[:, None] * sizes_of_cells(length, size)))
    return Seen(torch.cat(shares), size, torch.cat(counts))


def sizes_of_cells(length: int, size: int) -> torch.Tensor:
    """How many of `length` tokens each cell along a side stands for."""
    starts = torch.arange(0, length, size)
    return (length - starts).clamp(max=size)


def truth_by_rows(view: View, rows: int) -> Iterator[torch.Tensor]:
    """`(rows, n)` boolean, some rows at a time: which key each query sees; of `lsh`, in an example."""
    if view.documents:
        yield from truth_of_pack(view).split(rows)
        return
    if isinstance(view.pattern, Lsh):
        yield from example_of_hashing(view.pattern, view.text).split(rows)
        return
    places = torch.arange(view.text.length)
    for queries in places.split(rows):
        yield view.pattern.visible(pairs_of(view.text, queries[:, None], places[None, :]))


def truth_of_pack(view: View) -> torch.Tensor:
    """`(n, n)` boolean: each document sees itself alone, as a text of its own."""
    blocks, start = [], 0
    matrix_of = example_of_hashing if isinstance(view.pattern, Lsh) else visible_matrix
    for length in view.documents:
        marked = tuple(place - start for place in view.text.marked if start <= place < start + length)
        blocks.append(matrix_of(view.pattern, view.text._replace(length=length, marked=marked)))  # type: ignore[arg-type]
        start += length
    return torch.block_diag(*blocks)


def example_of_hashing(pattern: Lsh, text: Text) -> torch.Tensor:
    """`(n, n)` boolean: what the first head of the first layer sees of random states, the same in each call."""
    generator = torch.Generator().manual_seed(0)
    key = as_key(torch.randn(1, 1, text.length, EXAMPLE_SIZE, generator=generator))
    shown = torch.ones(1, 1, text.length, text.length, dtype=torch.bool)
    shown = shown.tril() if text.is_causal else shown
    seen, _ = see_by_hash(pattern, 0, OwnKeys(key, torch.arange(text.length)), key, shown)
    return seen[0, 0]


def legend(seen: Seen, text: Text) -> list[str]:
    """The share of the pairs of `full` that are seen, and how many keys a query sees."""
    share = int(seen.counts.sum()) / seen_pairs(text.length, None, text.is_causal)
    least, most = int(seen.counts.min()), int(seen.counts.max())
    average = "" if least == most else f", mean {seen.counts.float().mean():.1f}"
    span = f"{most}" if least == most else f"{least} to {most}"
    whole = "causal full" if text.is_causal else "full"
    lines = [f"{100 * share:.3g}% of {whole}", f"{span} key{'s' if most > 1 else ''} a query{average}"]
    if seen.size > 1:
        lines.append(f"a cell is {seen.size} x {seen.size} pairs")
    return lines


def as_text(pattern: Pattern, text: Text, most_cells: int = CELLS_IN_A_TERMINAL) -> Line:
    """What the queries of a text see, in half blocks: two queries a line, a key a column.

    Args:
        pattern: of heads that see alike (`by_head`).
        text: what is looked at.
        most_cells: columns at most; a cell of a longer text is filled where any of its pairs is seen.
    """
    return draw_cells(look(View(str(pattern), "", pattern, text), most_cells).shares > 0)


def draw_cells(cells: torch.Tensor) -> Line:
    """`(rows, columns)` booleans in half blocks."""
    rows = torch.nn.functional.pad(cells, (0, 0, 0, len(cells) % 2)).tolist()
    lines = ["".join(BLOCKS[pair] for pair in zip(upper, lower)) for upper, lower in zip(rows[::2], rows[1::2])]
    return Line("\n".join(lines), no_wrap=True)


def show(views: Sequence[View], width: int = CELLS_IN_A_TERMINAL + 2) -> RenderableType:
    """Pictures for a terminal, side by side as far as it is wide.

    Args:
        views: what is drawn.
        width: of the terminal in columns; a picture with its frame fits.
    """
    cells = max(1, min(CELLS_IN_A_TERMINAL, width - 2))
    return Group(
        Columns([show_one(view, cells) for view in views], padding=(1, 3)),
        Line("Queries down, keys across; filled: seen.", "dim"),
    )


def show_one(view: View, most_cells: int) -> RenderableType:
    """One picture with its names and its legend."""
    seen = look(view, most_cells)
    parts: list[RenderableType] = [Line(view.title, "bold"), Line(view.where, "dim")]
    parts.append(Panel(draw_cells(seen.shares > 0), expand=False, padding=0, border_style="dim"))
    parts += [Line(words, "dim") for words in [*legend(seen, view.text), view.note] if words]
    return Constrain(Group(*parts), max(len(seen.shares) + 2, NARROWEST))


def draw_patterns(
    patterns_or_config: Subject, *, path: str | os.PathLike | None = None, columns: int = 4, **options: Any
) -> Any:
    """A figure of patterns, or of a form's distinct layers: a panel for each group of heads that see alike.

    Args:
        patterns_or_config: as `views_of` takes it.
        path: of a PNG to write.
        columns: panels side by side.
        options: `length`, `is_causal`, `num_heads`, `marked`, `prefix` and `documents`, as for `views_of`.

    Returns:
        A matplotlib `Figure`.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a path that is no PNG, or as `views_of` does.
    """
    return draw_views(views_of(patterns_or_config, **options), path=path, columns=columns)


def draw_views(views: Sequence[View], *, path: str | os.PathLike | None = None, columns: int = 4) -> Any:
    """`draw_patterns` of pictures that are chosen already."""
    if path is not None:
        check_path(path)
    try:
        from matplotlib.figure import Figure
        from PIL import Image
    except ImportError as error:
        raise ImportError("A picture file needs matplotlib: `pip install 'variform[train]'`.") from error
    panels = [(view, look(view, CELLS_IN_A_FIGURE)) for view in views]
    columns = min(columns, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    above = [max(len(title_lines(view)) for view, _ in row) for row in rows]
    below = [max(len(word_lines(view, seen)) for view, seen in row) for row in rows]
    key = "queries down, keys across; dark: seen" + "; grey: the future" * any(view.text.is_causal for view in views)
    key_lines = textwrap.wrap(key, 38 * columns)
    width = columns * (SIDE + GAP)
    height = (sum(above + below) + len(key_lines) + 1) * LINE_HEIGHT + len(rows) * (SIDE + 2 * GAP)
    figure = Figure(figsize=(width, height), facecolor="white")
    top = height
    for row, over, under in zip(rows, above, below):
        top -= over * LINE_HEIGHT + GAP + SIDE
        for column, (view, seen) in enumerate(row):
            left = column * (SIDE + GAP) + GAP / 2
            draw_panel(figure.add_axes((left / width, top / height, SIDE / width, SIDE / height)), view, seen)
        top -= under * LINE_HEIGHT + GAP
    figure.text(0.5, 0.5 * GAP / height, "\n".join(key_lines), fontsize=7, color=GREY, ha="center", va="bottom")
    if path is not None:
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=160)
        # A palette: a third of the bytes
        Image.open(drawn).convert("RGB").quantize(COLOURS).save(path, format="png", optimize=True)
    return figure


def check_path(path: str | os.PathLike) -> None:
    """Refuses a path that no picture can be written to.

    Raises:
        ValueError: for another kind of file.
        FileNotFoundError: if its folder does not exist.
    """
    if Path(path).suffix != ".png":
        raise ValueError(f"`path={str(path)!r}` (--out) must end in '.png'.")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(
            f"`path={str(path)!r}` (--out): there is no folder {str(Path(path).parent)!r}; make it."
        )


def title_lines(view: View) -> list[str]:
    """The pattern in lines as wide as a panel, broken after commas."""
    return [line.replace(", ", ",") for line in textwrap.wrap(view.title.replace(",", ", "), 26)]


def word_lines(view: View, seen: Seen) -> list[str]:
    """What stands below a panel, in lines as wide as it."""
    words = [view.where, *legend(seen, view.text), view.note]
    return [line for word in words for line in textwrap.wrap(word, 38)]


def draw_panel(axes: Any, view: View, seen: Seen) -> None:
    """One picture with its names and its legend."""
    from matplotlib.colors import LinearSegmentedColormap

    font = {"weight": "bold", "color": INK, "family": "DejaVu Sans Mono"}
    axes.set_title("\n".join(title_lines(view)), fontsize=8.5, pad=4, **font)
    axes.set_xlabel("\n".join(word_lines(view, seen)), fontsize=7, color=INK, labelpad=4)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=GREY, linewidth=0.6)
    colours = LinearSegmentedColormap.from_list("seen", [HIDDEN, SEEN]).with_extremes(under=FUTURE)
    axes.imshow(shades_of(view, seen).numpy(), cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    cells = len(seen.shares)
    if cells <= CELLS_WITH_LINES:
        edges = [place - 0.5 for place in range(1, cells)]
        line = {"color": LINES, "linewidth": 0.35}
        axes.hlines(edges, -0.5, cells - 0.5, **line)
        axes.vlines(edges, -0.5, cells - 0.5, **line)


def shades_of(view: View, seen: Seen) -> torch.Tensor:
    """`(C, C)`: how dark each cell is, from 0 to 1; -1 for the future of a causal text."""
    places = torch.arange(len(seen.shares))
    is_future = (places[None, :] > places[:, None]) & view.text.is_causal & (seen.shares == 0)
    # Where a cell stands for many pairs, one of them is enough to be noticed
    return torch.where(seen.shares > 0, 0.4 + 0.6 * seen.shares, 0).masked_fill(is_future, -1)
