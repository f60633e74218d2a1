"""What Trainers measure of answers, in the form that each of them asks for."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import List
from transformers import EvalPrediction, PreTrainedTokenizerBase

from ..data.masking import count_hits
from .metrics import load_metric

# What each metric says, and which of its scores count
SCORES = {
    "bleu": ("bleu",),
    "chrf": ("chrf",),
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "wer": ("wer",),
    "cer": ("cer",),
    "pronunciation": ("wer", "per"),
}


class TextScores:
    """`compute_metrics` for a Seq2SeqTrainer that generates.

    Args:
        tokenizer: decodes the answers.
        references: the right answer of each judged example, or a list of several, in the order of the examples.
        metrics: names in `SCORES`.

    Raises:
        ValueError: for an unknown name, or several right answers where a metric takes one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, references: Sequence[Any], metrics: Sequence[str]):
        unknown = [name for name in metrics if name not in SCORES]
        if unknown:
            raise ValueError(f"`metrics` must be among {', '.join(SCORES)}, got {unknown[0]!r}.")
        self.tokenizer, self.references = tokenizer, list(references)
        self.metrics = {name: load_metric(name) for name in metrics}
        self.single: set[str] = set()  # metrics that take lists, where an example has one right answer
        self.names = [score for name in metrics for score in SCORES[name]]
        has_several = bool(self.references) and not isinstance(self.references[0], str)
        for name, metric in self.metrics.items():
            taken = [isinstance(features["references"], List) for features in metric.info.features]
            if has_several and not any(taken):
                raise ValueError(f"The metric {name!r} holds an answer to one reference, and an example has several.")
            if not has_several and all(taken):
                self.single.add(name)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        # Behind the last example there are some that come again, so that all processes have equally many
        ids: Any = prediction.predictions[: len(self.references)]
        ids[ids == -100] = self.tokenizer.pad_token_id  # Trainer's own filler between batches
        answers = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        measured: dict[str, float] = {}
        for name, metric in self.metrics.items():
            references = [[only] for only in self.references] if name in self.single else self.references
            measured |= metric.compute(predictions=answers, references=references)
        return {name: float(measured[name]) for name in self.names}


def count_answers(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """`preprocess_logits_for_metrics` for an encoder-decoder, whose outputs hold more than logits; then `masked_scores`."""
    return count_hits(outputs[0] if isinstance(outputs, tuple) else outputs, labels)


def class_scores(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for a Trainer of classes: accuracy, and the mean of the classes' F1, in %."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    answers, truth = logits.argmax(axis=-1), prediction.label_ids
    right = load_metric("accuracy").compute(predictions=answers, references=truth)
    f1 = load_metric("f1").compute(predictions=answers, references=truth, average="macro")
    return {"accuracy": 100 * right["accuracy"], "f1": 100 * f1["f1"]}
