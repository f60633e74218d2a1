"""Metrics that need no network: `evaluate.Metric` classes over the libraries that define them.

load_metric("bleu").compute(predictions=["a b"], references=["a b"])
evaluate.combine([load_metric("bleu"), load_metric("chrf")])
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .pronunciation import closest_variant, pronunciation_errors

if TYPE_CHECKING:
    from evaluate import Metric

# {metric: (module, class, library)}. A module is imported when one of its metrics is asked for, as each wants another library.
METRICS = {
    "accuracy": ("classification", "Accuracy", "scikit-learn"),
    "f1": ("classification", "F1", "scikit-learn"),
    "bleu": ("translation", "Bleu", "sacrebleu"),
    "chrf": ("translation", "Chrf", "sacrebleu"),
    "rouge": ("summarisation", "Rouge", "rouge-score"),
    "wer": ("transcription", "WordErrorRate", "jiwer"),
    "cer": ("transcription", "CharacterErrorRate", "jiwer"),
    "pronunciation": ("transcription", "Pronunciation", "jiwer"),
    "seqeval": ("tagging", "Seqeval", "seqeval"),
    "squad": ("answering", "Squad", "evaluate"),
    "perplexity": ("surprise", "Perplexity", "evaluate"),
}


def load_metric(name: str) -> "Metric":
    """The metric of this name, which keeps what it is given in memory.

    Raises:
        ValueError: an unknown name, or a library that is not installed.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(METRICS)}.")
    module, class_name, library = METRICS[name]
    try:
        metric_class = getattr(import_module(f".{module}", __name__), class_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"The metric {name!r} needs {error.name}: pip install evaluate {library}") from error
    return metric_class(keep_in_memory=True)


__all__ = ["METRICS", "closest_variant", "load_metric", "pronunciation_errors"]
