"""Draws the pictures of docs/patterns.md: which query of a text of 32 tokens sees which key, under each pattern.

python docs/draw_patterns.py [another folder]

What `lsh` shows depends on the states: its picture is an example, of random ones.
"""

import sys
from pathlib import Path

from variform import VariformDecoderConfig
from variform.report.pictures import draw_views
from variform.report.views import View, views_of

LENGTH = 32
# Of the documents of a pack, in tokens
DOCUMENTS = (12, 6, 14)
# Of each picture, the patterns with what is peculiar to their drawing: a length, the direction, marks, a prefix, a pack
PICTURES: dict[str, list[tuple[str, dict]]] = {
    "overview": [
        ("full", {"is_causal": False}),
        ("sliding_window:4", {"is_causal": False}),
        ("dilated:3,gap=3", {"is_causal": False}),
        ("chunked:8", {"is_causal": False}),
        ("local_global:3,tokens=1", {"is_causal": False, "marked": [17]}),
        ("strided:6", {"is_causal": False}),
        ("fixed:6", {"is_causal": False}),
        ("big_bird:3,random=1", {"is_causal": False}),
    ],
    "full": [("full", {})],
    "prefix_lm": [("prefix_lm", {"prefix": 10})],
    "sliding_window": [("sliding_window:4", {})],
    "dilated": [("dilated:3,gap=3", {}), ("dilated:3,gap=1/4", {"is_causal": True})],
    "chunked": [("chunked:8", {})],
    "local_global": [("local_global:3,tokens=1", {"marked": [17]})],
    "strided": [("strided:6", {}), ("strided:6,heads=split", {"is_causal": True})],
    "fixed": [("fixed:8,summary=2", {}), ("fixed:8,summary=2,groups=2", {"is_causal": True})],
    "big_bird": [("big_bird:4,random=1", {"length": 48}), ("big_bird:4,random=1,placement=first", {"length": 48})],
    "lsh": [("lsh:4", {}), ("lsh:4,chunked=true,chunk=8", {"is_causal": False})],
    "packed": [
        (pattern, {"documents": DOCUMENTS, "is_causal": is_causal, "length": None})
        for pattern, is_causal in (("full", False), ("full", True), ("sliding_window:4", False), ("strided:4", True))
    ],
}


def pictures() -> dict[str, list[View]]:
    """What stands in each picture."""
    drawn = {
        name: [view for pattern, options in parts for view in views_of(pattern, **{"length": LENGTH, **options})]
        for name, parts in PICTURES.items()
    }
    tiled = VariformDecoderConfig(
        num_hidden_layers=12, attention_patterns=["sliding_window:4", "dilated:4,gap=4", "full"]
    )
    return {**drawn, "layers": views_of(tiled, length=LENGTH)}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("patterns")
    folder.mkdir(parents=True, exist_ok=True)
    for name, views in pictures().items():
        draw_views(views, path=folder / f"{name}.png")


if __name__ == "__main__":
    main()
