"""Metrics that need no network: `evaluate.Metric` classes over the libraries that define them.

load_metric("bleu").compute(predictions=["a b"], references=["a b"])
evaluate.combine([load_metric("bleu"), load_metric("chrf")])
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def import_evaluate() -> Any:
    """The library `evaluate`, whatever lies beside the script that runs.

    Python looks for a module in the folder of the script first, and finetune/ has an evaluate.py. Called before anything that
    says `import evaluate`, this makes that mean the library.
    """
    found: Any = sys.modules.get("evaluate")
    if hasattr(found, "Metric"):
        return found
    sys.modules.pop("evaluate", None)
    everywhere = list(sys.path)
    sys.path[:] = [folder for folder in everywhere if not Path(folder, "evaluate.py").is_file()]
    try:
        return import_module("evaluate")
    finally:
        sys.path[:] = everywhere


def load_metric(name: str) -> "Metric":
    """The metric of this name, which keeps what it is given in memory.

    Raises:
        ValueError: an unknown name, or a library that is not installed.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(METRICS)}.")
    module, class_name, library = METRICS[name]
    try:
        import_evaluate()
        metric_class = getattr(import_module(f".{module}", __name__), class_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"The metric {name!r} needs {error.name}: pip install evaluate {library}") from error
    return metric_class(keep_in_memory=True)


__all__ = ["METRICS", "closest_variant", "import_evaluate", "load_metric", "pronunciation_errors"]
