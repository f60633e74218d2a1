"""How surprised a model is by a text."""

import math

import evaluate

from .base import FRACTION, NUMBER, metric_info


class Perplexity(evaluate.Metric):
    """`perplexity`, and `bits_per_byte` where `bytes` is given, of the corpus.

    A prediction is the surprise at the scored tokens of an example, in nats and added up; a reference is their number. A mean
    of means would weigh short examples more.
    """

    def _info(self):
        return metric_info("Perplexity of the corpus.", "Jelinek et al. 1977, Perplexity", FRACTION, NUMBER)

    def _compute(self, predictions, references, bytes: int | None = None):
        """`bytes`: those of the text that the tokens stand for."""
        nats, tokens = math.fsum(predictions), sum(references)
        result = {"perplexity": math.exp(nats / tokens), "tokens": tokens}
        return result if bytes is None else {**result, "bits_per_byte": nats / bytes / math.log(2)}
