"""How many named spans are right, by seqeval."""

import evaluate
from seqeval import metrics

from .base import TEXTS, metric_info


class Seqeval(evaluate.Metric):
    """`precision`, `recall`, `f1` of whole spans of B- and I- tags, and `accuracy` of the tags, 0 to 1.

    Parts of speech are no spans: take `accuracy`.
    """

    def _info(self):
        return metric_info("F1 of spans.", "Nakayama 2018, seqeval; Tjong Kim Sang and De Meulder 2003", TEXTS, TEXTS)

    def _compute(self, predictions, references):
        options = {"zero_division": 0}
        return {
            "precision": float(metrics.precision_score(references, predictions, **options)),
            "recall": float(metrics.recall_score(references, predictions, **options)),
            "f1": float(metrics.f1_score(references, predictions, **options)),
            "accuracy": float(metrics.accuracy_score(references, predictions)),
        }
