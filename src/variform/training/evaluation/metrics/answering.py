"""How near an answer is to one of those accepted, as SQuAD counts it (Rajpurkar et al., arXiv:1606.05250)."""

import re
import string
from collections import Counter

import evaluate

from .base import TEXT, TEXTS, metric_info


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, English articles and spare spaces."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words that both have, as often as both have them; 1 where both are empty."""
    predicted, expected = normalise_answer(prediction).split(), normalise_answer(reference).split()
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))


class Squad(evaluate.Metric):
    """`exact_match` and `f1`, 0 to 100: the mean over the questions of the best accepted answer.

    A prediction is a text, a reference the list of the accepted texts; an empty list accepts the empty answer only.
    """

    def _info(self):
        return metric_info("Exact match and F1 of answers.", "Rajpurkar et al. 2016, arXiv:1606.05250", TEXT, TEXTS)

    def _compute(self, predictions, references):
        exact = score = 0.0
        for prediction, accepted in zip(predictions, references):
            texts = accepted or [""]
            exact += max(normalise_answer(prediction) == normalise_answer(text) for text in texts)
            score += max(token_f1(prediction, text) for text in texts)
        return {"exact_match": 100 * exact / len(predictions), "f1": 100 * score / len(predictions)}
