"""Shakespeare's plays and poems. Reading and splitting are in `variform.training.long_text`."""

from pathlib import Path

from .. import long_text
from .base import Rows, Source


def load(config: str) -> dict[str, Rows]:
    """Rows `{"text"}`: a play or a collection of poems each. These are not the 1.1 MB of other people's figures."""
    train, held_out = long_text.split_plays(long_text.play_files())
    return {"train": _rows(train), "validation": _rows(held_out)}


def _rows(files: list[Path]) -> Rows:
    return [{"text": text.decode(errors="replace")} for text in long_text.read_documents(files).values()]


SOURCE = Source(
    configs={"plays": ("text",)},
    load=load,
    files=long_text.play_files,
    split=f"whole plays: {', '.join(long_text.HELD_OUT)} held out.",
    licence="public domain",
    citation="William Shakespeare, texts of Project Gutenberg as in the package `shakespeare` 0.6",
    homepage="https://www.gutenberg.org",
)
