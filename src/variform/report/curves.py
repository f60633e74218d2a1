"""The curves of a run, drawn from its log: loss, and whatever was measured on held-out data, over the steps."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LOG_FILE = "log.jsonl"  # as `variform.training.logs.RunLog` writes it
# What is drawn of a training step, and what it is called; each thing that is evaluated gets a panel of its own
TRAINING = {
    "loss": "loss",
    "grad_norm": "norm of the gradient",
    "learning_rate": "learning rate",
    "expert_max_load": "busiest expert, even is 1",
}
# Of an evaluation, what says nothing of the model
UNDRAWN = ("runtime", "per_second", "model_preparation_time", "_bytes")
INK, GREY, SEEN, HELD_OUT = "#22303c", "#66747f", "#1d4f7c", "#b8451f"
WIDTH, HEIGHT, COLUMNS = 3.4, 2.3, 3


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`, or of the one in a run's folder; none where there is no such file.

    A last line that a killed process left half written is left out.
    """
    path = Path(path)
    path = path / LOG_FILE if path.is_dir() else path
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines[:-1]]  # what follows the last line break is not whole


def read_curves(log: list[dict[str, Any]]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """`{panel: {"training" or "held out": (steps, values)}}` of the lines of a log; loss on both is one panel."""
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for line in log:
        for name, value in line.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            if name in TRAINING:
                panel, side = TRAINING[name], "training"
            elif name.startswith("eval_") and not any(word in name for word in UNDRAWN):
                panel, side = name.removeprefix("eval_").replace("_", " "), "held out"
            else:
                continue
            steps, values = panels.setdefault(panel, {}).setdefault(side, ([], []))
            steps.append(line["step"])
            values.append(float(value))
    return panels


def is_curve(sides: dict[str, tuple[list[float], list[float]]]) -> bool:
    """Whether a panel has more to show than what was measured once, at the end: that is a figure of the card."""
    return any(len(set(steps)) > 1 for steps, _ in sides.values())


def draw_curves(folder: str | Path) -> Path | None:
    """Draw `plots/curves.png` in the folder of a run from its `log.jsonl`.

    Returns:
        The picture, or None where matplotlib is not installed or nothing was logged twice.
    """
    panels = {name: sides for name, sides in read_curves(read_log(folder)).items() if is_curve(sides)}
    if find_spec("matplotlib") is None or not panels:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # an extra; no window, whatever the backend
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, sides) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        for side, (steps, values) in sides.items():
            mark = "o" if side == "held out" else ""
            axes.plot(
                steps, values, color=HELD_OUT if side == "held out" else SEEN, marker=mark, ms=3, lw=1.2, label=side
            )
        axes.set_title(name, fontsize=9, color=INK, loc="left")
        axes.tick_params(labelsize=7, colors=GREY)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.set_xlabel("step", fontsize=7, color=GREY)
        if len(sides) > 1:
            axes.legend(fontsize=7, frameon=False)
    target = Path(folder) / "plots" / "curves.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=130)
    return target
