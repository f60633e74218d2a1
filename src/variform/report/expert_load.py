"""A heat map of who computed what while a model with experts trained: experts down, steps across, a panel a layer."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

LOAD_FILE = "expert_load.jsonl"  # as `variform.training.ExpertStatistics` writes it
# Colours span this factor either way of an even load
SPAN = 4.0
# Of a panel without its words, of the room around it and of the scale, in inches
WIDTH, ROW_HEIGHT, TALLEST, ROOM, SCALE = 2.6, 0.16, 2.4, 0.75, 0.9
LEAST_ROWS = 6
IDLE, EVEN, BUSY, INK, GREY = "#1d4f7c", "#f6f6f3", "#b8451f", "#22303c", "#66747f"


class LayerLoad(NamedTuple):
    """How the tokens of one layer were shared out, at each logging step."""

    name: str
    steps: list[int]
    load: torch.Tensor  # (steps, experts), float: multiples of the even share
    dropped: (
        torch.Tensor
    )  # (steps,): shares of the choices without room; with expert choice, of tokens that nobody took


def read_expert_load(source: str | os.PathLike) -> list[LayerLoad]:
    """What a training left behind.

    Args:
        source: the output folder of a training, or its file `expert_load.jsonl`.

    Raises:
        ValueError: without such a file, or without a line in it.
    """
    path = Path(source)
    path = path / LOAD_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"`{path}` does not exist: `ExpertStatistics` writes it where a model with experts is trained."
        )
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not lines:
        raise ValueError(f"`{path}` is empty: the training ended before its first logging step.")
    steps = [line["step"] for line in lines]
    found = []
    for name in lines[0]["load"]:
        load = torch.tensor([line["load"][name] for line in lines], dtype=torch.float64)
        dropped, choices = (
            torch.tensor([line[key][name] for line in lines], dtype=torch.float64) for key in ("dropped", "choices")
        )
        found.append(
            LayerLoad(name, steps, load / load.mean(1, keepdim=True).clamp(min=1e-9), dropped / choices.clamp(min=1))
        )
    return found


def draw_expert_load(
    source: str | os.PathLike, *, path: str | os.PathLike | None = None, columns: int = 4, title: str = ""
) -> Any:
    """Draws the load of every expert over the training, and writes a PNG where `path` is given.

    Args:
        source: as for `read_expert_load`.
        path: where the picture goes.
        columns: panels side by side, at most.
        title: above all of them.

    Returns:
        A matplotlib `Figure`.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a path that is no PNG, or as `read_expert_load` does.
    """
    if path is not None and Path(path).suffix.lower() != ".png":
        raise ValueError(f"`path={str(path)!r}` must end in .png.")
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap, LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture file needs matplotlib: `pip install 'variform[train]'`.") from error
    layers = read_expert_load(source)
    rows = -(-len(layers) // columns)
    columns = -(-len(layers) // rows)
    most = max(max(layer.load.shape[1] for layer in layers), LEAST_ROWS)
    height = min(most * ROW_HEIGHT, TALLEST)
    size = (columns * (WIDTH + ROOM) + SCALE, rows * (height + ROOM) + 0.45)
    figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
    norm = LogNorm(1 / SPAN, SPAN)
    colours = LinearSegmentedColormap.from_list("load", [IDLE, EVEN, BUSY])
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, layer in zip(panels.flat, layers):
        draw_layer(axes, layer, colours, norm)
    for axes in panels.flat[len(layers) :]:
        axes.set_visible(False)
    scale = figure.colorbar(ScalarMappable(norm, colours), ax=panels, aspect=16 * rows, pad=0.02)
    marks = [1 / SPAN, 1 / 2, 1, 2, SPAN]
    scale.set_ticks(marks, labels=["¼ or less", "½", "even", "2", "4 or more"], fontsize=7, color=INK)
    scale.minorticks_off()
    scale.outline.set_visible(False)
    figure.suptitle(title or "load of each expert, in even shares", fontsize=9, color=INK)
    if path is not None:
        figure.savefig(path)
    return figure


def save_heat_map(folder: str | os.PathLike) -> Path | None:
    """Draws `expert_load.png` beside the file of a training; None where there is nothing to draw, or no matplotlib."""
    if not (Path(folder) / LOAD_FILE).is_file() or find_spec("matplotlib") is None:
        return None
    path = Path(folder) / "expert_load.png"
    draw_expert_load(folder, path=path)
    return path


def draw_layer(axes: Any, layer: LayerLoad, colours: Any, norm: Any) -> None:
    """One panel."""
    count = layer.load.shape[1]
    shown = layer.load.clamp(norm.vmin, norm.vmax).T.numpy()
    axes.pcolormesh(
        edges_of(layer.steps), range(count + 1), shown, cmap=colours, norm=norm, linewidth=0, rasterized=True
    )
    axes.invert_yaxis()
    axes.set_title(layer.name, fontsize=8, color=INK, weight="bold", pad=4)
    note = f", at the end {layer.dropped[-1]:.0%} dropped" if layer.dropped.any() else ""
    axes.set_xlabel(f"step{note}", fontsize=7, color=INK)
    axes.set_ylabel("expert", fontsize=7, color=INK)
    every = -(-count // 16)
    axes.set_yticks([place + 0.5 for place in range(0, count, every)], labels=range(0, count, every))
    axes.tick_params(labelsize=6.5, length=2, color=GREY, labelcolor=INK)
    axes.spines[:].set(color=GREY, linewidth=0.6)


def edges_of(steps: list[int]) -> list[float]:
    """Where each logging step's column begins, and the end: it tells of the steps since the one before."""
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    return [max(first, 0), *steps]
