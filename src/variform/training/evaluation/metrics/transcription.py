"""How many edits turn a transcription into its reference, by jiwer."""

import evaluate
import jiwer

from .base import TEXT, TEXTS, metric_info
from .pronunciation import pronunciation_errors

CITATION = "jiwer, word and character error rate as edit distance over length (Levenshtein 1966)"


class WordErrorRate(evaluate.Metric):
    """`wer`: edits of words for each 100 of the references; above 100 where much is inserted."""

    def _info(self):
        return metric_info("Word error rate of the corpus.", CITATION, TEXT, TEXT)

    def _compute(self, predictions, references):
        return {"wer": 100 * jiwer.wer(references, predictions)}


class CharacterErrorRate(evaluate.Metric):
    """`cer`: edits of characters for each 100 of the references."""

    def _info(self):
        return metric_info("Character error rate of the corpus.", CITATION, TEXT, TEXT)

    def _compute(self, predictions, references):
        return {"cer": 100 * jiwer.cer(references, predictions)}


class Pronunciation(evaluate.Metric):
    """`per` and `wer` of `pronunciation_errors`; a reference is the list of the accepted pronunciations."""

    def _info(self):
        return metric_info("Phoneme and word error rate against the closest variant.", CITATION, TEXT, TEXTS)

    def _compute(self, predictions, references):
        return pronunciation_errors(predictions, references)
