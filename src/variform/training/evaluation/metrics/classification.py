"""How many classes are right, by scikit-learn."""

import evaluate
from sklearn.metrics import accuracy_score, f1_score

from .base import NUMBER, metric_info

CITATION = "Pedregosa et al. 2011, Scikit-learn: Machine Learning in Python"


class Accuracy(evaluate.Metric):
    """`accuracy`: the part of the classes that are right, 0 to 1."""

    def _info(self):
        return metric_info("The part of the classes that are right.", CITATION, NUMBER, NUMBER)

    def _compute(self, predictions, references):
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(evaluate.Metric):
    """`f1`: the harmonic mean of precision and recall, 0 to 1, by default the mean over the classes."""

    def _info(self):
        return metric_info("Harmonic mean of precision and recall.", CITATION, NUMBER, NUMBER)

    def _compute(self, predictions, references, average: str = "macro"):
        """`average`: as for scikit-learn's `f1_score`."""
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0))}
