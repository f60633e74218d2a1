"""Pictures of patterns: which query sees which key, as a PNG or in a terminal. Queries go down, keys across."""

import io
import os
import sys
import textwrap
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.panel import Panel
from rich.text import Text as Line
from transformers import PreTrainedConfig

from ..model.patterns import Full, Lsh, Pattern, PrefixLm, Text, pairs_of, parse
from .costs import seen_pairs, stacks_of

# Without a length, texts have so many tokens, or more where a pattern would hide nothing of them
SHORT_LENGTH = 64
# Of a layer whose form is not given
NUM_HEADS = 4
# A picture of a longer one would take more than seconds
LONGEST_LENGTH = 16384
# (query, key) pairs that are looked at together
PAIRS_AT_ONCE = 2**22
# Cells along a side: a longer text's stand for several tokens
CELLS_IN_A_TERMINAL, CELLS_IN_A_FIGURE = 64, 128
# Up to so many, a figure parts its cells by lines
CELLS_WITH_LINES = 40
# Half blocks by (upper, lower) cell: two rows of cells a line make them square
BLOCKS = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
# Of a panel, of what parts panels, and of a line of words, in inches
SIDE, GAP, LINE_HEIGHT = 2.0, 0.14, 0.135
COLOURS = 64
SEEN, HIDDEN, FUTURE, INK, GREY = "#1d4f7c", "#ffffff", "#eceff1", "#22303c", "#66747f"


class View(NamedTuple):
    """One picture: what the queries of some heads of some layers see."""

    title: str  # the pattern as a config writes it
    where: str  # which way it sees, and which stack, layers and heads it is of, where there are others
    pattern: Pattern  # of these heads
    text: Text
    note: str = ""  # what the picture does not say by itself


class Layers(NamedTuple):
    """Layers with one entry of `attention_patterns`, of which one is drawn."""

    entry: Pattern  # as the config writes it
    drawn: Pattern  # as the first of the layers has it
    is_causal: bool
    num_heads: int
    words: list[str]  # that tell these from others
    note: str = ""  # what the picture does not say by itself


class Seen(NamedTuple):
    """A pattern, looked at from far enough to fit a picture."""

    shares: torch.Tensor  # (C, C): of the pairs of each cell, how many are seen
    size: int  # tokens along a side of a cell
    counts: torch.Tensor  # (n,): how many keys each query sees


def views_of(
    subject: str | dict[str, Any] | Pattern | PreTrainedConfig | Sequence[str | dict[str, Any] | Pattern],
    *,
    length: int | None = None,
    is_causal: bool | None = None,
    num_heads: int | None = None,
    marked: Sequence[int] = (),
    prefix: int = 0,
) -> list[View]:
    """The pictures of patterns, or of a form's distinct layers: one for each group of heads that see alike.

    Args:
        subject: a pattern or several, as values or as a config's entries; or a config of any shape.
        length: of the text in tokens. Default: 64, or longer where a pattern would hide nothing, within what a form is made
            for.
        is_causal: draw only what a causal stack, or only what an encoder sees; for patterns. Default: both, where they can be.
        num_heads: of a layer, for patterns; default 4.
        marked: places that a `global_attention_mask` marks, for "local_global".
        prefix: how many first tokens see each other both ways, for "prefix_lm".

    Raises:
        ValueError: for a pattern that cannot be, or an option that nothing in the picture would read.
    """
    if isinstance(subject, PreTrainedConfig):
        if is_causal is not None or num_heads is not None:
            raise ValueError(
                "`is_causal` and `num_heads` are for patterns: the stacks of a form have their own; leave them out."
            )
        drawn = layers_of_form(subject)
        longest = min(stack.max_position_embeddings for stack in stacks_of(subject).values())
    else:
        entries = [subject] if isinstance(subject, (str, dict, Pattern)) else subject
        patterns = [entry if isinstance(entry, Pattern) else parse(entry) for entry in entries]
        num_heads = NUM_HEADS if num_heads is None else num_heads
        drawn = [layers for pattern in patterns for layers in layers_of_pattern(pattern, is_causal, num_heads)]
        longest = LONGEST_LENGTH
    if length is None:
        length = enough_length(drawn, min(longest, LONGEST_LENGTH))
    check_text({layers.entry.name for layers in drawn}, length, marked, prefix)
    places = tuple(sorted(set(marked)))
    return [view for layers in drawn for view in views_by_head(layers, Text(length, layers.is_causal, places, prefix))]


def layers_of_form(config: PreTrainedConfig) -> list[Layers]:
    """The distinct entries of each stack, with the numbers of their layers, counted from 0."""
    stacks, found = stacks_of(config), []
    for side, stack in stacks.items():
        entries = [parse(entry) for entry in stack.attention_patterns]
        numbers: dict[Pattern, list[int]] = {}
        for layer_idx in range(stack.num_hidden_layers):
            numbers.setdefault(entries[layer_idx % len(entries)], []).append(layer_idx)
        for entry, own in numbers.items():
            first, others = entry.at_layer(own[0]), [entry.at_layer(layer_idx) for layer_idx in own[1:]]
            note = f"Each layer draws its own blocks; these are layer {own[0]}'s." if {*others} - {first} else ""
            words = [side] * (len(stacks) > 1) + [way_of(stack.is_causal_stack), spans("layer", own)]
            found.append(Layers(entry, first, stack.is_causal_stack, stack.num_attention_heads, words, note))
    return found


def layers_of_pattern(pattern: Pattern, is_causal: bool | None, num_heads: int) -> list[Layers]:
    """A layer for each way in which a pattern can see, or for the one that is given.

    Raises:
        ValueError: if there is none, with the reason that a config would give.
    """
    if num_heads < 1:
        raise ValueError(f"`num_heads={num_heads}` must be at least 1.")
    found, refusals = [], []
    for way in [False, True] if is_causal is None else [is_causal]:
        try:
            pattern.check(way, sys.maxsize, num_heads)
        except ValueError as error:
            refusals.append(error)
        else:
            found.append(Layers(pattern, pattern, way, num_heads, [way_of(way)]))
    if not found:
        raise refusals[-1]
    return found


def way_of(is_causal: bool) -> str:
    return "causal" if is_causal else "both ways"


def hides_later(pattern: Pattern, is_causal: bool) -> bool:
    """Whether there is a longest text that a pattern shows whole, and more than one token of it."""
    return not isinstance(pattern, Full) and pattern.longest_whole(is_causal) > 1


def enough_length(drawn: Sequence[Layers], longest: int) -> int:
    """A length at which each pattern shows its shape: 64 times a power of two, or the longest."""
    wholes = [part.entry.longest_whole(part.is_causal) for part in drawn if hides_later(part.entry, part.is_causal)]
    length = SHORT_LENGTH
    while length < min(longest, 3 * max(wholes, default=0)):
        length *= 2
    return min(length, longest)


def check_text(names: set[str], length: int, marked: Sequence[int], prefix: int) -> None:
    """Refuses a text that cannot be drawn, and marks and prefixes that no pattern reads.

    Raises:
        ValueError: naming the argument.
    """
    if not 1 <= length <= LONGEST_LENGTH:
        raise ValueError(f"`length={length}` must lie between 1 and {LONGEST_LENGTH} tokens.")
    if marked and "local_global" not in names:
        raise ValueError("`marked` places are read by 'local_global', which nothing here has: leave them out.")
    outside = [place for place in marked if not 0 <= place < length]
    if outside:
        raise ValueError(f"`marked={outside[0]}` is no place of a text of {length} tokens, counted from 0.")
    if prefix != 0 and "prefix_lm" not in names:
        raise ValueError(f"`prefix={prefix}` is read by 'prefix_lm', which nothing here has: leave it out.")
    if not 0 <= prefix <= length:
        raise ValueError(f"`prefix={prefix}` must lie between 0 and the {length} tokens of the text.")


def views_by_head(layers: Layers, text: Text) -> list[View]:
    """The pictures of one layer, one for each group of heads."""
    groups, views = layers.drawn.by_head(layers.num_heads), []
    for pattern, heads in groups.items():
        words = layers.words + [spans("head", heads)] * (len(groups) > 1)
        views.append(View(str(layers.entry), ", ".join(words), pattern, text, layers.note or note_on(pattern, text)))
    return views


def note_on(pattern: Pattern, text: Text) -> str:
    """A sentence on a picture that would mislead without one; else an empty text."""
    if isinstance(pattern, Lsh):
        return "What it shows depends on the states: a query sees the keys that hash as it does."
    if isinstance(pattern, PrefixLm) and text.prefix == 0:
        return "Without a prefix, as full."
    if hides_later(pattern, text.is_causal) and text.length <= pattern.longest_whole(text.is_causal):
        return f"Texts of up to {pattern.longest_whole(text.is_causal)} tokens are seen whole."
    return ""


def spans(noun: str, numbers: Sequence[int]) -> str:
    """`("layer", [0, 1, 2, 5])` as "layers 0-2, 5"; the numbers rise."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(words)}"


def look(view: View, most_cells: int) -> Seen | None:
    """What a pattern shows, in at most `most_cells` cells along a side; None where that depends on the states."""
    pattern, text = view.pattern, view.text
    if isinstance(pattern, Lsh):
        return None
    size = -(-text.length // most_cells)
    places = torch.arange(text.length)
    shares, counts = [], []
    for rows in places.split(max(1, PAIRS_AT_ONCE // (text.length * size)) * size):
        seen = pattern.visible(pairs_of(text, rows[:, None], places[None, :]))
        counts.append(seen.sum(-1))
        padded = torch.nn.functional.pad(seen.float(), (0, -text.length % size, 0, -len(rows) % size))
        shares.append(padded.unflatten(1, (-1, size)).unflatten(0, (-1, size)).mean((1, 3)))
    return Seen(torch.cat(shares), size, torch.cat(counts))


def legend(seen: Seen, text: Text) -> list[str]:
    """The share of the pairs of `full` that are seen, and how many keys a query sees."""
    share = int(seen.counts.sum()) / seen_pairs(text.length, None, text.is_causal)
    least, most = int(seen.counts.min()), int(seen.counts.max())
    average = "" if least == most else f", mean {seen.counts.float().mean():.3g}"
    span = f"{most}" if least == most else f"{least} to {most}"
    lines = [f"{100 * share:.3g}% of full", f"{span} key{'s' if most > 1 else ''} a query{average}"]
    if seen.size > 1:
        lines.append(f"a cell is {seen.size} x {seen.size} pairs")
    return lines


def as_text(pattern: Pattern, text: Text, most_cells: int = CELLS_IN_A_TERMINAL) -> Line:
    """What the queries of a text see, in half blocks: two queries a line, a key a column.

    Args:
        pattern: of heads that see alike (`by_head`). most_cells: columns at most; a cell of a longer text is marked where any
            of its pairs is seen.

    Raises:
        ValueError: for `lsh`, whose pattern depends on the states.
    """
    seen = look(View(str(pattern), "", pattern, text), most_cells)
    if seen is None:
        raise ValueError(f"'{pattern}' has no picture of its own: {note_on(pattern, text)}")
    return draw_cells(seen.shares > 0)


def draw_cells(cells: torch.Tensor) -> Line:
    """`(rows, columns)` booleans in half blocks."""
    rows = torch.nn.functional.pad(cells, (0, 0, 0, len(cells) % 2)).tolist()
    lines = ["".join(BLOCKS[pair] for pair in zip(upper, lower)) for upper, lower in zip(rows[::2], rows[1::2])]
    return Line("\n".join(lines), no_wrap=True)


def show(views: Sequence[View]) -> RenderableType:
    """Pictures for a terminal, side by side as far as it is wide."""
    return Columns([show_one(view) for view in views], padding=(1, 3))


def show_one(view: View) -> RenderableType:
    seen = look(view, CELLS_IN_A_TERMINAL)
    parts: list[RenderableType] = [Line(view.title, "bold"), Line(view.where, "dim")]
    if seen is not None:
        parts.append(Panel(draw_cells(seen.shares > 0), expand=False, padding=0, border_style="dim"))
        parts.append(Line("; ".join(legend(seen, view.text)), "dim"))
    if view.note:
        parts.append(Line(view.note, "dim"))
    return Constrain(Group(*parts), CELLS_IN_A_TERMINAL + 2)


def draw_patterns(
    patterns_or_config: str | dict[str, Any] | Pattern | PreTrainedConfig | Sequence[str | dict[str, Any] | Pattern],
    *,
    path: str | os.PathLike | None = None,
    columns: int = 4,
    **options: Any,
) -> Any:
    """A figure of patterns, or of a form's distinct layers: a panel for each group of heads that see alike.

    Args:
        patterns_or_config: as `views_of` takes it.
        path: of a PNG to write.
        columns: panels side by side.
        options: `length`, `is_causal`, `num_heads`, `marked` and `prefix`, as for `views_of`.

    Returns:
        A matplotlib `Figure`.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a path that is no PNG, or as `views_of` does.
    """
    return draw_views(views_of(patterns_or_config, **options), path=path, columns=columns)


def draw_views(views: Sequence[View], *, path: str | os.PathLike | None = None, columns: int = 4) -> Any:
    """`draw_patterns` of pictures that are chosen already."""
    if path is not None and Path(path).suffix != ".png":
        raise ValueError(f"`path={str(path)!r}` must end in '.png'.")
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
    width = columns * (SIDE + GAP)
    height = (sum(above + below) + 2) * LINE_HEIGHT + len(rows) * (SIDE + 2 * GAP)
    figure = Figure(figsize=(width, height), facecolor="white")
    top = height
    for row, over, under in zip(rows, above, below):
        top -= over * LINE_HEIGHT + GAP + SIDE
        for column, (view, seen) in enumerate(row):
            left = column * (SIDE + GAP) + GAP / 2
            draw_panel(figure.add_axes((left / width, top / height, SIDE / width, SIDE / height)), view, seen)
        top -= under * LINE_HEIGHT + GAP
    key = "queries down, keys across; dark: seen" + "; grey: the future" * any(view.text.is_causal for view in views)
    lines = textwrap.wrap(key, 38 * columns)
    figure.text(0.5, 0.5 * GAP / height, "\n".join(lines), fontsize=7, color=GREY, ha="center", va="bottom")
    if path is not None:
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=160)
        # A palette: a third of the bytes
        Image.open(drawn).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    return figure


def title_lines(view: View) -> list[str]:
    """The pattern in lines as wide as a panel, broken after commas."""
    return [line.replace(", ", ",") for line in textwrap.wrap(view.title.replace(",", ", "), 26)]


def word_lines(view: View, seen: Seen | None) -> list[str]:
    """What stands below a panel, in lines as wide as it."""
    words = [view.where] if seen is None else [view.where, *legend(seen, view.text), view.note]
    return [line for word in words for line in textwrap.wrap(word, 38)]


def draw_panel(axes: Any, view: View, seen: Seen | None) -> None:
    """One picture with its names and its legend."""
    from matplotlib.colors import LinearSegmentedColormap

    font = {"weight": "bold", "color": INK, "family": "DejaVu Sans Mono"}
    axes.set_title("\n".join(title_lines(view)), fontsize=8.5, pad=4, **font)
    axes.set_xlabel("\n".join(word_lines(view, seen)), fontsize=7, color=INK, labelpad=4)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=GREY, linewidth=0.6)
    if seen is None:
        inside = {"fontsize": 7, "color": INK, "ha": "center", "va": "center", "transform": axes.transAxes}
        axes.text(0.5, 0.5, textwrap.fill(view.note, 28), **inside)
        return
    shares, places = seen.shares, torch.arange(len(seen.shares))
    is_future = (places[None, :] > places[:, None]) & view.text.is_causal & (shares == 0)
    # Where a cell stands for many pairs, one of them is enough to be noticed
    shades = torch.where(shares > 0, 0.4 + 0.6 * shares, 0).masked_fill(is_future, -1)
    colours = LinearSegmentedColormap.from_list("seen", [HIDDEN, SEEN])
    colours.set_under(FUTURE)
    axes.imshow(shades.numpy(), cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    if len(places) <= CELLS_WITH_LINES:
        edges = (places[1:] - 0.5).tolist()
        axes.set_xticks(edges, minor=True)
        axes.set_yticks(edges, minor=True)
        axes.grid(which="minor", color="#d5dbdf", linewidth=0.35)
        axes.tick_params(which="minor", length=0)
