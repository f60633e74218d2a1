"""English inflection: a word and the form asked for in, the inflected word out. From the package `lemminflect`."""

import csv
import gzip
import hashlib
from pathlib import Path

from .base import Rows, Source, package_folder

# The columns of the table after word and kind; the participle stands there only where it is not the past form
FORMS = {
    "noun": ("plural",),
    "verb": ("past", "past participle", "present participle", "third person"),
    "adj": ("comparative", "superlative"),
    "adv": ("comparative", "superlative"),
}
HELD_OUT_EVERY = 10


def file() -> Path:
    return package_folder("lemminflect", "lemminflect==0.2.3") / "resources" / "infl_lu.csv.gz"


def load(config: str) -> dict[str, Rows]:
    """Rows `{"text", "target", "variants"}`, such as "dive: past", "dived" and ["dived", "dove"]; the first is learnt."""
    splits: dict[str, Rows] = {"train": [], "validation": []}
    with gzip.open(file(), "rt", encoding="utf-8", newline="") as lines:
        for word, kind, *cells in csv.reader(lines):
            side = (
                "validation" if int(hashlib.sha256(word.encode()).hexdigest(), 16) % HELD_OUT_EVERY == 0 else "train"
            )
            if kind == "verb" and not cells[1]:
                cells[1] = cells[0]
            for form, cell in zip(FORMS[kind], cells):
                if cell:
                    variants = cell.split("/")
                    splits[side].append({"text": f"{word}: {form}", "target": variants[0], "variants": variants})
    return splits


SOURCE = Source(
    configs={"forms": ("text", "target", "variants")},
    load=load,
    files=lambda: [file()],
    split="by word: one in ten held out, by the SHA-256 of the word, with all of its forms",
    licence="MIT (package `lemminflect` 0.2.3), from the SPECIALIST lexicon of the US National Library of Medicine",
    citation="Jascob 2019, LemmInflect; NIH SPECIALIST Lexicon",
    homepage="https://github.com/bjascob/LemmInflect",
)
