"""What answers without a network get, in % or in points of a metric: what a model is to beat.

Each takes data as `load_data` gives it and returns `{what it is: figure}` on the held-out part.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from datasets import DatasetDict

from .metrics import load_metric
from .scores import SCORES

NAME = re.compile(r"\b[A-Z]\w+|\b\d[\d.]*\b")


def majority_accuracy(data: DatasetDict) -> dict[str, float]:
    """`label`: always the class that is most frequent in training."""
    label, _ = Counter(data["train"]["label"]).most_common(1)[0]
    held_out = list(data["validation"]["label"])
    return {"most frequent class": 100 * held_out.count(label) / len(held_out)}


def tfidf_accuracy(data: DatasetDict) -> dict[str, float]:
    """`text`, `label`: logistic regression on TF-IDF of words and pairs of words, by scikit-learn at its defaults."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000)
    )
    train, held_out = data["train"], data["validation"]
    classifier.fit(list(train["text"]), list(train["label"]))
    return {
        "TF-IDF, logistic regression": 100 * float(classifier.score(list(held_out["text"]), list(held_out["label"])))
    }


def frequent_tag_accuracy(data: DatasetDict) -> dict[str, float]:
    """`tokens`, `tags`: of each word the tag it has most often in training; of unknown words that of words seen once."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for row in data["train"]:
        for token, tag in zip(row["tokens"], row["tags"]):
            counts[token][tag] += 1
    once: Counter = sum((tags for tags in counts.values() if tags.total() == 1), Counter())
    # Where no word is seen once, the most frequent tag of all
    unknown, _ = (once or sum(counts.values(), Counter())).most_common(1)[0]
    best = {token: tags.most_common(1)[0][0] for token, tags in counts.items()}
    pairs = [pair for row in data["validation"] for pair in zip(row["tokens"], row["tags"])]
    return {"most frequent tag": 100 * sum(best.get(token, unknown) == tag for token, tag in pairs) / len(pairs)}


def copy_source(data: DatasetDict, metrics: Sequence[str]) -> dict[str, float]:
    """`text`, `target`: the text as it is."""
    return _judge("copy of the source", list(data["validation"]["text"]), data, metrics)


def lead_words(data: DatasetDict, metrics: Sequence[str], *, words: int | None = None) -> dict[str, float]:
    """`text`, `target`: the first words of the text, by default as many as targets of the training part have on average."""
    if words is None:
        lengths = [len(target.split()) for target in data["train"]["target"]]
        words = max(1, round(sum(lengths) / len(lengths)))
    texts = [" ".join(text.split()[:words]) for text in data["validation"]["text"]]
    return _judge(f"first {words} words", texts, data, metrics)


def _judge(name: str, predictions: list[str], data: DatasetDict, metrics: Sequence[str]) -> dict[str, float]:
    figures: dict[str, Any] = {}
    for metric in metrics:
        references = list(data["validation"]["target"])
        several = [[reference] for reference in references] if metric == "pronunciation" else references
        measured = load_metric(metric).compute(predictions=predictions, references=several)
        figures |= {figure: measured[figure] for figure in SCORES[metric]}
    return {f"{figure}, {name}": float(value) for figure, value in figures.items()}


def frequent_name_answers(data: DatasetDict) -> dict[str, float]:
    """`context`, `answers`: the name or number that the context has most often, the first of equals; exact matches."""
    names = [NAME.findall(context) for context in data["validation"]["context"]]
    answers = [Counter(found).most_common(1)[0][0] if found else "" for found in names]
    references = [answers["text"] for answers in data["validation"]["answers"]]
    score = load_metric("squad").compute(predictions=answers, references=references)
    return {"most frequent name": score["exact_match"]}
