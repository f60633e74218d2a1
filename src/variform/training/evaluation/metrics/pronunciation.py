"""How far predicted pronunciations are from the dictionary."""

from collections.abc import Sequence

import jiwer


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
