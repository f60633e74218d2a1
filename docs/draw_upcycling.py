"""Draws the curves of "Upcycling" in docs/recipes.md: bits per byte of each checkpoint against tokens and against FLOPs.

python docs/draw_upcycling.py runs/dense runs/longer runs/upcycled [picture.png]

The first run is the one that the others start from.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM, PreTrainedModel

import variform  # noqa: F401  # registers the family
from variform.training.data.sources import SOURCES
from variform.training.data.windows import TokenWindows, encode, measure
from variform.training.tokenizer import byte_tokenizer

# Every so many windows of the held-out text: a sample, for curves. The table has the whole text
EVERY = 8


class Point(NamedTuple):
    """A checkpoint: what it has cost, the run before included, and what it reached."""

    tokens: int
    flops: float
    bits_per_byte: float


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """The steps and folders of a run's checkpoints, in order."""
    return sorted((int(folder.name.split("-")[1]), folder) for folder in run.glob("checkpoint-*"))


def judge(model: PreTrainedModel, context: int) -> float:
    """Bits per byte on the sample."""
    tokenizer = byte_tokenizer()
    streams = [encode([row["text"]], tokenizer) for row in SOURCES["shakespeare"].load("plays")["validation"]]
    windows = TokenWindows(streams, context=context, stride=context // 2)
    nats, scored = measure(model, Subset(windows, range(0, len(windows), EVERY)), batch_size=16)
    return nats / scored / math.log(2)


def points(run: Path, before: Point | None) -> Iterator[Point]:
    """A run's checkpoints, behind the last one of the run before."""
    facts = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    if before is not None:
        yield before
    for step, folder in checkpoints(run):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokens = step * facts["tokens_seen"] // facts["steps"]
        flops = tokens * facts["flops_per_token"]
        spent = (tokens, flops) if before is None else (before.tokens + tokens, before.flops + flops)
        yield Point(*spent, judge(model, facts["max_length"]))


def main(argv: list[str]) -> None:
    picture = Path(argv.pop()) if argv[-1].endswith(".png") else Path(__file__).with_name("upcycling.png")
    runs = [Path(run) for run in argv]
    first = list(points(runs[0], None))
    curves = {runs[0].name: first} | {run.name: list(points(run, first[-1])) for run in runs[1:]}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (field, label, unit) in zip(
        figure.subplots(1, 2, sharey=True),
        [("tokens", "tokens, millions", 1e6), ("flops", "FLOPs of training, 10^12", 1e12)],
    ):
        for name, curve in curves.items():
            spent = [getattr(point, field) / unit for point in curve]
            style = {"marker": "s", "color": "black", "zorder": 3} if name == runs[0].name else {"marker": "o"}
            axes.plot(spent, [point.bits_per_byte for point in curve], markersize=4, label=name, **style)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out bits per byte")
    figure.axes[0].legend()
    figure.savefig(picture, dpi=150)
    for name, curve in curves.items():
        for point in curve:
            print(
                f"{name:>10} {point.tokens:>10,} tokens {point.flops / 1e12:5.1f}e12 FLOPs {point.bits_per_byte:.3f}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
