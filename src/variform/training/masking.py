"""Masked tokens: anew each time an example is seen in training, once and for all where a model is judged."""

from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

IGNORED = -100


class MaskingCollator:
    """Masks examples as BERT does (arXiv:1810.04805), or only pads those that `mask_once` has masked already.

    Masks are drawn from torch's global generator, whose state is part of a checkpoint: a run that is resumed sees the masks
    that it would have seen.

    Args:
        tokenizer: with a mask token.
        masked: the part of the tokens to be predicted: 80 % of them are hidden, 10 % replaced, 10 % left as they are.

    Raises:
        ValueError: for a tokenizer without a mask token, or a part that is not above 0 and at most 1.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, masked: float):
        if tokenizer.mask_token is None:
            raise ValueError(
                "`tokenizer` has no mask token: train one with finetune/tokenizer.py, or add one and resize."
            )
        if not 0 < masked <= 1:
            raise ValueError(f"`masked={masked}` must be above 0 and at most 1.")
        self.pad = DataCollatorForTokenClassification(tokenizer)
        self.mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=masked)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return self.pad(examples) if "labels" in examples[0] else self.mask(examples)


def mask_once(data: Dataset, tokenizer: PreTrainedTokenizerBase, masked: float, seed: int) -> Dataset:
    """The examples of `tokenize_masked`, masked by a seed, so that models are judged on the same tokens."""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=masked, seed=seed)

    def mask(example: dict[str, Any]) -> dict[str, Any]:
        batch = collator([{name: example[name] for name in ("input_ids", "special_tokens_mask")}])
        return {"input_ids": batch["input_ids"][0].tolist(), "labels": batch["labels"][0].tolist()}

    # Never from a cache: the generator's state is not part of its key
    return data.map(mask, remove_columns=["special_tokens_mask"], load_from_cache_file=False)


def count_hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`preprocess_logits_for_metrics` for a Trainer: logits become what `masked_scores` needs of them.

    Args:
        logits: `(batch, seq, vocab_size)`. labels: `(batch, seq)`, -100 where nothing is predicted.

    Returns:
        `(batch, 3)` float32: the surprise at the labelled tokens in nats, how many were guessed, and how many there are.
    """
    nats = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    is_labelled = labels != IGNORED
    hits = (logits.argmax(-1) == labels) & is_labelled
    return torch.stack((nats.sum(1), hits.sum(1).to(nats), is_labelled.sum(1).to(nats)), dim=1)


def masked_scores(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for a Trainer: the part of the masked tokens that the model guesses, in %, and its perplexity."""
    nats, hits, count = prediction.predictions.astype("float64").sum(axis=0)
    return {"accuracy": float(100 * hits / count), "perplexity": float(torch.exp(torch.tensor(nats / count)))}
