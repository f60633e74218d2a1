"""Masked tokens: anew each time an example is seen in training, once and for all where a model is judged."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy
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

    Masks are decided by the seed, the epoch and the batch, and by nothing else: a run that is resumed sees those that it would
    have seen. The state of torch's own generator, in a checkpoint, is no help: Trainer has fetched the next batch by then.
    Add `callbacks=[SetEpoch(collator)]`.

    Args:
        tokenizer: with a mask token.
        masked: the part of the tokens to be predicted: 80 % of them are hidden, 10 % replaced, 10 % left as they are.
        seed: other seeds give other masks.

    Raises:
        ValueError: for a tokenizer without a mask token, or a part that is not above 0 and at most 1.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, masked: float, seed: int = 0):
        if tokenizer.mask_token is None:
            raise ValueError(
                "`tokenizer` has no mask token: train one with finetune/tokenizer.py, or add one and resize."
            )
        if not 0 < masked <= 1:
            raise ValueError(f"`masked={masked}` must be above 0 and at most 1.")
        self.pad = DataCollatorForTokenClassification(tokenizer)
        self.mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=masked)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Mask other tokens."""
        self.epoch = epoch

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "labels" in examples[0]:
            return self.pad(examples)
        self._seed_by(example["input_ids"] for example in examples)
        return self.mask(examples)

    def hide(
        self, input_ids: torch.Tensor, special_tokens_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for rows that are packed already, as the `masking` of a `PackingCollator`: ids and labels."""
        self._seed_by(input_ids)
        return self.mask.torch_mask_tokens(input_ids, special_tokens_mask=special_tokens_mask)

    def _seed_by(self, rows: Iterable[Any]) -> None:
        digest = hashlib.blake2b(f"{self.seed} {self.epoch}".encode(), digest_size=8)
        for row in rows:
            digest.update(numpy.asarray(row, dtype=numpy.int64).tobytes())
        self.mask.generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big") >> 1)


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
