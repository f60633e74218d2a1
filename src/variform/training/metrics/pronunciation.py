"""How far predicted pronunciations are from the dictionary."""

from collections.abc import Mapping, Sequence

import jiwer
from transformers import EvalPrediction, PreTrainedTokenizerBase


def closest_variant(prediction: str, variants: Sequence[str]) -> str:
    """The variant that takes the fewest phoneme edits to turn into `prediction`; the first of equals."""
    if len(variants) == 1 or prediction in variants:
        return prediction if prediction in variants else variants[0]
    return min(variants, key=lambda variant: jiwer.wer(variant, prediction) * len(variant.split()))


def pronunciation_errors(predictions: Sequence[str], variants: Sequence[Sequence[str]]) -> dict[str, float]:
    """Phoneme and word error rate, each word judged by its closest variant.

    Args:
        predictions: one pronunciation a word, phonemes separated by spaces.
        variants: the accepted pronunciations of each word, at least one.

    Returns:
        `per`: edits (substitutions, insertions, deletions) for each 100 phonemes of the closest variants.
        `wer`: words, of 100, whose pronunciation is none of the variants.
    """
    references = [closest_variant(prediction, accepted) for prediction, accepted in zip(predictions, variants)]
    wrong = sum(prediction != reference for prediction, reference in zip(predictions, references))
    return {"per": 100 * jiwer.wer(references, list(predictions)), "wer": 100 * wrong / len(references)}


class PronunciationMetrics:
    """`compute_metrics` for a Seq2SeqTrainer that generates; needs `include_for_metrics=["inputs"]`.

    A word is found again by its letters: the order of evaluation is free, and a word that two processes were given, so
    that each has equally many, counts once.

    Args:
        tokenizer: the one that encoded the words.
        pronunciations: `{word: accepted pronunciations}`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pronunciations: Mapping[str, Sequence[str]]):
        self.tokenizer = tokenizer
        self.pronunciations = pronunciations

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        words = ["".join(letters.split()) for letters in self._decode(prediction.inputs)]
        answers = dict(zip(words, self._decode(prediction.predictions)))
        return pronunciation_errors(list(answers.values()), [self.pronunciations[word] for word in answers])

    def _decode(self, ids) -> list[str]:
        ids[ids == -100] = self.tokenizer.pad_token_id  # Trainer's own filler between batches
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)
