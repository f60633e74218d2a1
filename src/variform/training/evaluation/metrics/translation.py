"""How near a translation is to a reference, by sacrebleu."""

import evaluate
import sacrebleu

from .base import TEXT, TEXTS, metric_info

CITATION = "Post 2018, A Call for Clarity in Reporting BLEU Scores (sacrebleu)"


def _signed(metric, name: str, predictions: list[str], references: list[str] | list[list[str]]) -> dict:
    """Score and signature; a reference may be one text or a list of as many as the others'."""
    several = [[reference] if isinstance(reference, str) else reference for reference in references]
    if len({len(accepted) for accepted in several}) > 1:
        raise ValueError("`references`: sacrebleu needs as many for each prediction.")
    score = metric.corpus_score(predictions, list(zip(*several)))
    return {name: score.score, f"{name}_signature": str(metric.get_signature())}


class Bleu(evaluate.Metric):
    """`bleu`: 0 to 100, of the corpus; with sacrebleu's signature, without which a BLEU says little."""

    def _info(self):
        return metric_info("BLEU of the corpus.", CITATION, TEXT, TEXT, TEXTS)

    def _compute(self, predictions, references, **options):
        """`options`: of `sacrebleu.BLEU`, such as `lowercase`."""
        return _signed(sacrebleu.BLEU(**options), "bleu", predictions, references)


class Chrf(evaluate.Metric):
    """`chrf`: F-score of character n-grams, 0 to 100, of the corpus (Popović 2015)."""

    def _info(self):
        return metric_info("Character n-gram F-score of the corpus.", CITATION, TEXT, TEXT, TEXTS)

    def _compute(self, predictions, references, **options):
        """`options`: of `sacrebleu.CHRF`; `word_order=2` is chrF++."""
        return _signed(sacrebleu.CHRF(**options), "chrf", predictions, references)
