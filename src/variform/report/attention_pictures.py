"""Pictures of one text in a model: attention weights of a head, and the experts of each token; in a terminal or as a PNG."""

import os
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text as Line

from .pictures import FUTURE, GREY, HIDDEN, INK, SEEN, check_path
from .readings import Attended, Taken

NOT_EXPLANATION = (
    "Attention is not explanation: weights say where a head reads, not why the model answers as it does "
    "(Jain & Wallace 2019, arXiv:1902.10186; Wiegreffe & Pinter 2019, arXiv:1908.04626)."
)
LEGEND = "queries down, keys across; the darkest: the largest weight of a panel; grey: weight 0"
NOT_MEANING = (
    "Weights are shares of a layer's output; that an expert takes a token does not say what the expert is for."
)
# From no weight to all of it; hidden pairs and the smallest weights are blank
SHADES = " ░▒▓█"
# A token in a margin or on an axis, in letters
LONGEST_WORD = 14
# More panels than this would be too small to be read: then each layer's heads are averaged
MOST_PANELS = 64
# Up to so many tokens on the longer side, a single panel names them
MOST_NAMED = 64
# And where there are several, that are smaller
MOST_NAMED_SMALL = 16
# Of a panel among others, of a cell of a panel that is alone, its least side, and of the words around, in inches
SMALL_SIDE, CELL, LEAST_SIDE, ROOM, LINE_HEIGHT = 1.25, 0.17, 2.2, 1.5, 0.14


class Panel(NamedTuple):
    """One matrix of weights that is drawn."""

    title: str
    attended: Attended
    weights: torch.Tensor  # (queries, keys)


def panels_of(found: Sequence[Attended], layer: int | None = None, head: int | None = None) -> list[Panel]:
    """The matrices of a layer and a head; without a number those of all, and the mean of heads where they are too many.

    Args:
        layer, head: from 0; negative ones count from the end.

    Raises:
        ValueError: for a number that no kind of attention has.
    """
    panels = []
    for attended in found:
        num_layers, num_heads = attended.weights.shape[:2]
        layers = numbers("layer", layer, num_layers, attended.kind)
        heads = numbers("head", head, num_heads, attended.kind)
        has_room = len(found) * len(layers) * len(heads) <= MOST_PANELS
        for number in layers:
            where = f"{attended.kind} layer {number}"
            if has_room:
                panels += [Panel(f"{where} head {h}", attended, attended.weights[number, h]) for h in heads]
            else:
                words = f"{where}, mean of {len(heads)} heads" if len(heads) > 1 else f"{where} head {heads[0]}"
                panels.append(Panel(words, attended, attended.weights[number, heads].mean(0)))
    return panels


def numbers(name: str, number: int | None, count: int, kind: str) -> list[int]:
    if number is None:
        return list(range(count))
    if not -count <= number < count:
        raise ValueError(f"`{name}={number}` (--{name}): the {kind} has {name}s 0 to {count - 1}.")
    return [number % count]


def show_attention(found: Sequence[Attended], layer: int | None = None, head: int | None = None) -> RenderableType:
    """For a terminal: of each kind of attention one matrix, of the last layer and the mean of its heads by default."""
    parts: list[RenderableType] = []
    for attended in found:
        number = numbers("layer", -1 if layer is None else layer, len(attended.weights), attended.kind)[0]
        heads = numbers("head", head, attended.weights.shape[1], attended.kind)
        words = f"head {heads[0]}" if len(heads) == 1 else f"mean of {len(heads)} heads"
        weights = attended.weights[number, heads].mean(0)
        parts += [Line(f"{attended.kind} layer {number}, {words}", "bold"), matrix_lines(attended, weights)]
        parts += [Line(note, "dim") for note in attended.notes]
    legend = f"Queries down, keys across; {' '.join(SHADES[1:])}: a larger share of the row's largest weight."
    return Group(*parts, Line(legend, "dim"), Line(NOT_EXPLANATION, "dim"))


def matrix_lines(attended: Attended, weights: torch.Tensor) -> Line:
    """A matrix in shades, two columns a key, with the queries' tokens before it and the largest key behind it."""
    most = weights.amax(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    steps = (weights / most * (len(SHADES) - 1)).ceil().long().clamp(max=len(SHADES) - 1)
    lines = []
    for word, row, levels in zip(attended.queries, weights, steps.tolist()):
        cells = "".join(SHADES[level] * 2 for level in levels)
        best = int(row.argmax())
        most_read = f"  {float(row[best]):.2f} {short(attended.keys[best])}" if float(row[best]) > 0 else ""
        lines.append(f"{short(word):>{LONGEST_WORD}} │{cells}│{most_read}")
    return Line("\n".join(lines), no_wrap=True)


def short(word: str) -> str:
    return word if len(word) <= LONGEST_WORD else word[: LONGEST_WORD - 1] + "…"


def draw_attention(
    found: Sequence[Attended], *, path: str | os.PathLike, layer: int | None = None, head: int | None = None
) -> Any:
    """A PNG: a panel for each layer and head, or one that names its tokens where a layer and a head are given.

    Args:
        path: where the picture goes. layer, head: as for `panels_of`.

    Returns:
        A matplotlib `Figure`.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a path that is no PNG, or a number that there is not.
    """
    check_path(path)
    panels = panels_of(found, layer, head)
    kinds = {panel.attended.kind: panel.attended for panel in panels}
    if len(panels) == len(kinds) and max(map(longest_side, kinds.values())) <= MOST_NAMED:
        figure = draw_named(panels)
    else:
        # A row of panels is a layer, unless each layer has one
        of_layers = Counter(panel.title.partition(" head")[0] for panel in panels)
        figure = draw_small(panels, columns=max(of_layers.values()) if len(of_layers) < len(panels) else 8)
    notes = [note for attended in kinds.values() for note in attended.notes]
    return finish(figure, path, [LEGEND, *notes, NOT_EXPLANATION])


def longest_side(attended: Attended) -> int:
    return max(len(attended.queries), len(attended.keys))


def draw_named(panels: Sequence[Panel]) -> Any:
    """Panels below each other, with the tokens along their sides."""
    heights = [max(LEAST_SIDE, CELL * len(panel.attended.queries)) for panel in panels]
    width = max(max(LEAST_SIDE, CELL * len(panel.attended.keys)) for panel in panels)
    figure = new_figure(max(width + 2 * ROOM, 5), sum(heights) + ROOM * len(panels) + 0.8)
    axes = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights}).flat
    for place, panel in zip(axes, panels):
        draw_matrix(place, panel.weights)
        place.set_title(panel.title, fontsize=8.5, weight="bold", color=INK)
        name_ticks(place, panel.attended.queries, panel.attended.keys)
    return figure


def draw_small(panels: Sequence[Panel], columns: int) -> Any:
    """Many panels side by side; the outer ones name the tokens of a short text."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(max(columns * SMALL_SIDE, 5), rows * (SMALL_SIDE + 0.2) + 0.9)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place, panel in zip(axes, panels):
        draw_matrix(place, panel.weights)
        place.set_title(panel.title, fontsize=5, color=INK, pad=2)
        place.set_xticks([])
        place.set_yticks([])
    if len({id(panel.attended) for panel in panels}) == 1 and longest_side(panels[0].attended) <= MOST_NAMED_SMALL:
        for number, place in enumerate(axes[: len(panels)]):
            is_lowest, is_leftmost = number + columns >= len(panels), number % columns == 0
            queries, keys = panels[0].attended.queries, panels[0].attended.keys
            name_ticks(place, queries if is_leftmost else [], keys if is_lowest else [], size=4.5)
    for place in axes[len(panels) :]:
        place.set_visible(False)
    return figure


def new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture file needs matplotlib: `pip install 'variform[train]'`.") from error
    return Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")


def draw_matrix(axes: Any, weights: torch.Tensor) -> None:
    """Weights from 0 to the largest of the matrix; what has weight 0 is grey."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("weights", [HIDDEN, SEEN]).with_extremes(under=FUTURE)
    shown = weights.masked_fill(weights == 0, -1).numpy()
    axes.imshow(
        shown, cmap=colours, vmin=0, vmax=max(float(weights.max()), 1e-6), interpolation="nearest", aspect="auto"
    )
    axes.spines[:].set(color=GREY, linewidth=0.5)


def name_ticks(axes: Any, down: Sequence[str], across: Sequence[str], size: float = 6) -> None:
    words = {"fontsize": size, "color": INK, "family": "DejaVu Sans Mono"}
    axes.set_yticks(range(len(down)), [literal(short(word)) for word in down], **words)
    axes.set_xticks(range(len(across)), [literal(short(word)) for word in across], rotation=90, **words)
    axes.tick_params(length=0)


def literal(word: str) -> str:
    """A token that matplotlib does not take for mathematics."""
    return word.replace("$", r"\$")


def finish(figure: Any, path: str | os.PathLike, lines: Sequence[str]) -> Any:
    """Writes the words below a figure, and the file."""
    letters = int(figure.get_size_inches()[0] * 17)
    caption = [line for words in lines for line in textwrap.wrap(words, letters)]
    figure.supxlabel("\n".join(caption), fontsize=6.5, color=GREY)
    figure.savefig(path, format="png")
    return figure


def show_experts(found: Sequence[Taken]) -> RenderableType:
    """For a terminal: the tokens down, the layers across; in a cell the experts that a token took, with their weights."""
    parts: list[RenderableType] = []
    for side in dict.fromkeys(taken.layer.partition(" ")[0] for taken in found):
        layers = [taken for taken in found if taken.layer.startswith(side)]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(side, style="bold", no_wrap=True)
        for taken in layers:
            table.add_column(taken.layer.removeprefix(f"{side} "))
        for place, word in enumerate(layers[0].tokens):
            table.add_row(Line(short(word)), *(cell_of(taken, place) for taken in layers))
        parts.append(table)
    legend = "A cell: the expert, and the weight of its result; '-': none had room, and the token passes by."
    return Group(*parts, Line(legend, "dim"), Line(NOT_MEANING, "dim"))


def cell_of(taken: Taken, place: int) -> str:
    experts = taken.taken[:, place].nonzero()[:, 0].tolist()
    experts.sort(key=lambda expert: -float(taken.weights[expert, place]))
    return ", ".join(f"{expert} {float(taken.weights[expert, place]):.2f}" for expert in experts) or "-"


def draw_experts(found: Sequence[Taken], *, path: str | os.PathLike) -> Any:
    """A PNG: a panel a layer, experts down and tokens across.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a path that is no PNG.
    """
    check_path(path)
    heights = [max(1.0, CELL * len(taken.weights)) for taken in found]
    width = max(max(LEAST_SIDE, CELL * len(taken.tokens)) for taken in found)
    figure = new_figure(max(width + ROOM, 5), sum(heights) + 0.9 * len(found) + 0.8)
    axes = figure.subplots(len(found), squeeze=False, gridspec_kw={"height_ratios": heights}).flat
    for place, taken in zip(axes, found):
        draw_matrix(place, taken.weights)
        place.set_title(taken.layer, fontsize=8.5, weight="bold", color=INK)
        name_ticks(place, [str(number) for number in range(len(taken.weights))], taken.tokens)
    return finish(figure, path, ["experts down, tokens across; dark: a large weight; grey: not taken", NOT_MEANING])
