"""What Trainers measure of answers, in the form that each of them asks for."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import EvalPrediction, PreTrainedTokenizerBase

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
        ValueError: for an unknown name.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, references: Sequence[Any], metrics: Sequence[str]):
        unknown = [name for name in metrics if name not in SCORES]
        if unknown:
            raise ValueError(f"`metrics` must be among {', '.join(SCORES)}, got {unknown[0]!r}.")
        self.tokenizer, self.references = tokenizer, list(references)
        self.metrics = {name: load_metric(name) for name in metrics}
        self.names = [score for name in metrics for score in SCORES[name]]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        # Behind the last example there are some that come again, so that all processes have equally many
        ids: Any = prediction.predictions[: len(self.references)]
        ids[ids == -100] = self.tokenizer.pad_token_id  # Trainer's own filler between batches
        answers = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        measured: dict[str, float] = {}
        for metric in self.metrics.values():
            measured |= metric.compute(predictions=answers, references=self.references)
        return {name: float(measured[name]) for name in self.names}


def perplexity(measured: Mapping[str, float]) -> dict[str, float]:
    """Of a token, from the loss that a Trainer measured."""
    return {"perplexity": math.exp(measured["eval_loss"])}


def class_scores(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for a Trainer of classes: accuracy, and the mean of the classes' F1, in %."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    answers, truth = logits.argmax(axis=-1), prediction.label_ids
    right = load_metric("accuracy").compute(predictions=answers, references=truth)
    f1 = load_metric("f1").compute(predictions=answers, references=truth, average="macro")
    return {"accuracy": 100 * right["accuracy"], "f1": 100 * f1["f1"]}
