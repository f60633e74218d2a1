"""How much of a reference a summary has, by rouge-score."""

import evaluate
from rouge_score import rouge_scorer

from .base import TEXT, metric_info

TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(evaluate.Metric):
    """`rouge1`, `rouge2`, `rougeL`, `rougeLsum`: F-scores, 0 to 100, the mean over the examples (Lin 2004)."""

    def _info(self):
        return metric_info("F-scores of shared n-grams and sequences.", "Lin 2004, ROUGE (rouge-score)", TEXT, TEXT)

    def _compute(self, predictions, references, use_stemmer: bool = False):
        """`use_stemmer`: count words that share a Porter stem as equal; English only."""
        scorer = rouge_scorer.RougeScorer(TYPES, use_stemmer=use_stemmer)
        pairs = [scorer.score(reference, prediction) for prediction, reference in zip(predictions, references)]
        return {name: 100 * sum(pair[name].fmeasure for pair in pairs) / len(pairs) for name in TYPES}
