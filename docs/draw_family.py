"""Draws docs/family.svg, the picture of the family: one block, one stack, three shapes.

python docs/draw_family.py [another.svg or .png]
"""

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

INK, GREY, FIELD, LINE = "#22303c", "#66747f", "#0a6b62", "#8a97a1"
ATTENTION, CROSS, FEED_FORWARD = "#f8c9a4", "#fbe3b0", "#b9d6f2"
NORM, EMBEDDING, POSITION, HEAD = "#e9e6f0", "#c9e6c3", "#f3c6d3", "#d9cdf0"
PANEL, STACK, CELL = "#f6f8f9", "#dfe8ee", "#4a86b8"

ENCODER_HEADS = (
    "ForMaskedLM\nForSequenceClassification\nForTokenClassification\nForQuestionAnswering\nForMultipleChoice"
)
DECODER_HEADS = "ForCausalLM\nForSequenceClassification\nForTokenClassification\nForQuestionAnswering"


class Canvas:
    """Boxes, arrows and words on one pair of axes, in inches."""

    def __init__(self, width: float, height: float):
        self.figure = Figure(figsize=(width, height), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def text(self, x, y, words, size=8.5, color=INK, align="center", **options):
        self.axes.text(x, y, words, fontsize=size, color=color, ha=align, va="center", linespacing=1.45, **options)

    def fields(self, x, y, words, align="left", baseline="center"):
        """Names of config fields and classes."""
        font = {"fontsize": 7.3, "color": FIELD, "family": "DejaVu Sans Mono", "linespacing": 1.45}
        self.axes.text(x, y, words, ha=align, va=baseline, **font)

    def box(self, x, y, width, height, words="", fill="white", size=9, dashed=False, edge=INK, rounding=0.07):
        """A box around the centre (x, y)."""
        corner = (x - width / 2, y - height / 2)
        style = f"round,pad=0,rounding_size={rounding}"
        line = {"edgecolor": edge, "linewidth": 1.0, "linestyle": (0, (3, 2)) if dashed else "-"}
        self.axes.add_patch(FancyBboxPatch(corner, width, height, style, facecolor=fill, **line))
        self.text(x, y, words, size=size)

    def panel(self, across, up, title, subtitle):
        (left, right), (bottom, top) = across, up
        centre, middle = (left + right) / 2, (bottom + top) / 2
        self.box(centre, middle, right - left, top - bottom, fill=PANEL, edge="#d9e0e4", rounding=0.12)
        self.text(left + 0.2, top - 0.3, title, size=13, align="left", weight="bold")
        self.text(left + 0.2, top - 0.58, subtitle, size=8.5, color=GREY, align="left")

    def arrow(self, *points, layer=1):
        """A line through the points, with a head at the last."""
        for start, end in pairwise(points):
            style = "-|>" if end == points[-1] else "-"
            line = {"shrinkA": 0, "shrinkB": 0, "linewidth": 1.0, "color": INK, "mutation_scale": 8, "zorder": layer}
            self.axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, joinstyle="miter", **line))

    def shape_title(self, left, name, forms):
        self.text(left, 2.64, name, size=10.5, align="left", weight="bold")
        self.axes.text(left, 2.52, forms, fontsize=8, color=GREY, va="top", style="italic", linespacing=1.3)

    def plus(self, x, y):
        self.axes.add_patch(Circle((x, y), 0.11, facecolor="white", edgecolor=INK, linewidth=1.0, zorder=3))
        self.text(x, y - 0.005, "+", size=10, zorder=4)

    def mask(self, x, y, rows, columns, sight, side=0.095):
        """What each query (row) sees of the keys (columns); (x, y) is the middle of the upper edge."""
        for row in range(rows):
            for column in range(columns):
                corner = (x + (column - columns / 2) * side, y - (row + 1) * side)
                fill = CELL if sight == "both ways" or column <= row else "white"
                self.axes.add_patch(Rectangle(corner, side, side, facecolor=fill, edgecolor="white", linewidth=0.7))
        frame = (x - columns * side / 2, y - rows * side)
        self.axes.add_patch(Rectangle(frame, columns * side, rows * side, fill=False, edgecolor=LINE, linewidth=0.6))


def draw_block(canvas: Canvas) -> None:
    """The layer: three residual branches, the middle one only where there is an encoder to attend to."""
    canvas.panel((0.1, 3.9), (3.65, 9.9), "One block", "drawn with norm_placement: pre, the default")
    middle, bypass, margin = 1.3, 0.38, 2.25
    branches = [
        ("self-attention", ATTENTION, "attention_patterns\nnum_attention_heads\nnum_key_value_heads\nqk_norm"),
        ("cross-attention", CROSS, ""),
        ("feed-forward", FEED_FORWARD, "intermediate_size\nhidden_act\ngated_mlp\nmlp_bias"),
    ]
    canvas.text(middle, 3.86, "hidden states", color=GREY)
    foot = 3.98
    for name, fill, fields in branches:
        norm, sublayer, plus = foot + 0.44, foot + 0.98, foot + 1.48
        canvas.arrow((middle, foot), (middle, norm - 0.14))
        canvas.arrow((middle, foot + 0.13), (bypass, foot + 0.13), (bypass, plus), (middle - 0.11, plus))
        canvas.box(middle, norm, 1.4, 0.28, "norm", NORM)
        canvas.arrow((middle, norm + 0.14), (middle, sublayer - 0.23))
        canvas.box(middle, sublayer, 1.4, 0.46, name, fill, dashed=fill == CROSS)
        canvas.arrow((middle, sublayer + 0.23), (middle, plus - 0.11))
        canvas.plus(middle, plus)
        canvas.fields(margin, sublayer, fields)
        foot = plus + 0.11
    canvas.arrow((middle, foot), (middle, foot + 0.22))
    canvas.text(middle, foot + 0.33, "hidden states", color=GREY)
    canvas.fields(margin, 4.42, "norm_type  norm_eps")
    canvas.text(margin, 6.55, "in the decoder of an\nencoder-decoder only", size=8, color=GREY, align="left")


def draw_stack(canvas: Canvas) -> None:
    """The stack: embeddings, positions through three hooks, masks, N layers, a norm."""
    canvas.panel((4.0, 7.9), (3.65, 9.9), "One stack", "positions and masks made once, then N blocks")
    middle, side, edge = 6.7, 4.95, 5.9
    canvas.text(middle, 3.86, "token ids", color=GREY)
    canvas.arrow((middle, 3.98), (middle, 4.2))
    canvas.box(middle, 4.4, 1.6, 0.4, "token table", EMBEDDING)
    canvas.fields(side, 4.4, "vocab_size\nembedding_size", align="center")
    canvas.arrow((middle, 4.6), (middle, 4.87))
    canvas.box(middle, 5.1, 1.6, 0.46, "embeddings", EMBEDDING)
    canvas.fields(4.9, 4.93, "embedding_scale\nembedding_norm", align="center")
    canvas.arrow((middle, 5.33), (middle, 5.85))
    for offset in (0.16, 0.08, 0.0):
        canvas.box(middle + offset, 6.78 + offset, 1.6, 1.86, "", "white")
    parts = [("feed-forward", FEED_FORWARD), ("cross-attention", CROSS), ("self-attention", ATTENTION)]
    for row, (name, fill) in enumerate(parts):
        canvas.box(middle, 7.34 - 0.56 * row, 1.34, 0.4, name, fill, size=8.5, dashed=fill == CROSS)
    canvas.arrow((middle, 7.71), (middle, 8.2), layer=3)
    canvas.fields(middle - 0.1, 8.05, "num_hidden_layers", align="right")
    canvas.box(middle, 8.34, 1.6, 0.28, "norm", NORM)
    canvas.fields(side, 8.34, "final_norm", align="center")
    canvas.arrow((middle, 8.48), (middle, 8.72))
    canvas.text(middle, 8.83, "last hidden states", color=GREY)

    canvas.box(side, 5.6, 1.56, 0.52, "", POSITION)
    canvas.text(side, 5.7, "positions", size=9)
    canvas.fields(side, 5.48, "position_embedding_type", align="center")
    canvas.arrow((5.6, 5.34), (5.6, 5.1), (edge, 5.1))
    canvas.text(5.52, 5.22, "add", size=7.5, color=GREY, align="right")
    for x, y, hook in ((5.3, 6.1, "rotate"), (4.8, 6.35, "bias")):
        canvas.arrow((x, 5.86), (x, y), (edge, y))
        canvas.text(edge - 0.12, y + 0.1, hook, size=7.5, color=GREY, align="right")
    canvas.box(4.85, 7.14, 1.3, 0.52, "", "white")
    canvas.text(4.85, 7.24, "masks", size=9)
    canvas.fields(4.85, 7.02, "attention_patterns", align="center")
    canvas.arrow((5.5, 7.14), (edge, 7.14))
    canvas.text(edge - 0.12, 7.24, "hide", size=7.5, color=GREY, align="right")


def draw_shapes(canvas: Canvas) -> None:
    """The three shapes: what each sees, its heads, and published forms of it."""
    canvas.panel(
        (0.1, 7.9), (0.1, 3.55), "Three shapes", "the same stack, told what it sees, under a head for each task"
    )
    shapes = [
        ("Encoder", "BERT, RoBERTa, ALBERT,\nModernBERT", "both ways", ENCODER_HEADS),
        ("Decoder", "GPT-2, Llama, Qwen3", "the past", DECODER_HEADS),
    ]
    bottom, sides = 1.46, 1.94
    for left, (name, forms, sight, heads) in zip((0.3, 2.62), shapes):
        canvas.shape_title(left, name, forms)
        canvas.box(left + 0.45, bottom, 0.9, 0.44, "stack", STACK)
        canvas.arrow((left + 0.45, bottom + 0.22), (left + 0.45, sides - 0.13))
        canvas.box(left + 0.45, sides, 0.9, 0.26, "head", HEAD, size=8.5)
        canvas.mask(left + 1.5, 2.07, 7, 7, sight)
        canvas.text(left + 1.5, 1.3, f"sees {sight}", size=8)
        canvas.fields(left, 1.04, heads, baseline="top")
    left = 4.94
    encoder, decoder = left + 0.45, left + 2.25
    canvas.shape_title(left, "Encoder-decoder", "Transformer, T5, BART,\nPEGASUS")
    canvas.box(encoder, bottom, 0.9, 0.44, "encoder", STACK)
    canvas.box(decoder, bottom, 0.9, 0.44, "decoder", STACK)
    canvas.arrow((encoder + 0.45, bottom), (decoder - 0.45, bottom))
    canvas.text((encoder + decoder) / 2, bottom + 0.1, "keys, values", size=7.5, color=GREY)
    canvas.arrow((decoder, bottom + 0.22), (decoder, sides - 0.13))
    canvas.box(decoder, sides, 0.9, 0.26, "head", HEAD, size=8.5)
    canvas.mask(encoder, 1.13, 7, 7, "both ways", side=0.085)
    canvas.mask((encoder + decoder) / 2, 1.13, 5, 7, "both ways", side=0.085)
    canvas.mask(decoder, 1.13, 5, 5, "the past", side=0.085)
    canvas.fields(left, 0.34, "ForConditionalGeneration")


def main() -> None:
    canvas = Canvas(8.0, 10.0)
    draw_block(canvas)
    draw_stack(canvas)
    draw_shapes(canvas)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("family.svg")
    # Fixed names and no date, so that drawing again changes nothing
    with matplotlib.rc_context({"svg.hashsalt": "variform"}):
        canvas.figure.savefig(target, dpi=130, metadata={"Date": None} if target.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
