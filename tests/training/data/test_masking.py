"""Masked tokens: as many as asked for, the same ones wherever a model is judged, and scores that a loop gives too."""

import math

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import EvalPrediction

from variform import VariformEncoderConfig
from variform.training.data.masking import MaskingCollator, count_hits, mask_once, masked_scores
from variform.training.data.packing import PackingCollator
from variform.training.tokenizer import byte_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to begin with"] * 3, 300)


@pytest.fixture(scope="module")
def examples(tokenizer):
    texts = [f"words {number} to hide some of " * 6 for number in range(40)]
    return Dataset.from_dict(dict(tokenizer(texts, return_special_tokens_mask=True)))


def test_judged_examples_are_masked_by_the_seed_and_only_padded_afterwards(tokenizer, examples):
    first, second, other = (mask_once(examples, tokenizer, 0.15, seed) for seed in (1, 1, 2))
    assert first[:] == second[:] and first[:] != other[:]
    rows = [first[0], first[1]]
    torch.manual_seed(0)
    batch = MaskingCollator(tokenizer, 0.15)(rows)
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"]):
        length = len(row["input_ids"])
        assert ids[:length].tolist() == row["input_ids"] and labels[:length].tolist() == row["labels"]


def test_so_many_tokens_are_masked_and_no_special_one(tokenizer, examples):
    collator = MaskingCollator(tokenizer, 0.3)
    torch.manual_seed(0)
    batch = collator([examples[index] for index in range(40)])
    is_real = batch["attention_mask"].bool()
    part = (batch["labels"] != -100).sum() / is_real.sum()
    assert 0.25 < part < 0.35
    assert set(batch["labels"][batch["labels"] != -100].tolist()).isdisjoint(tokenizer.all_special_ids)


def test_masks_are_those_of_seed_epoch_and_batch_whatever_else_was_drawn(tokenizer, examples):
    """So a run that goes on sees the masks it would have seen, although its first batch was fetched before it was saved."""
    rows = [examples[0], examples[1]]
    first = MaskingCollator(tokenizer, 0.5, seed=1)
    ids = first(rows)["input_ids"]
    state = torch.get_rng_state()
    again = MaskingCollator(tokenizer, 0.5, seed=1)
    again([examples[2]])
    assert torch.equal(again(rows)["input_ids"], ids) and torch.equal(torch.get_rng_state(), state)
    first.set_epoch(1)
    for other in (first(rows), MaskingCollator(tokenizer, 0.5, seed=2)(rows), again(rows[::-1])):
        assert not torch.equal(other["input_ids"], ids)


def test_packed_rows_are_masked_alike(tokenizer, examples):
    rows = [examples[0], examples[1]]
    packed = PackingCollator(VariformEncoderConfig(), 512, masking=MaskingCollator(tokenizer, 0.3, seed=1).hide)
    batch, again = packed([rows]), packed([rows])
    plain = PackingCollator(VariformEncoderConfig(), 512, masking=lambda ids, **_: (ids, ids))([rows])["input_ids"]
    assert torch.equal(batch["input_ids"], again["input_ids"])
    is_hidden = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_hidden], plain[is_hidden])
    assert torch.equal(batch["input_ids"][~is_hidden], plain[~is_hidden])
    assert 0.2 < is_hidden.sum() / sum(len(row["input_ids"]) for row in rows) < 0.4
    assert set(batch["labels"][is_hidden].tolist()).isdisjoint(tokenizer.all_special_ids)


def test_scores_are_those_of_a_loop():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    labels[torch.rand(3, 7) < 0.5] = -100
    scores = masked_scores(EvalPrediction(predictions=count_hits(logits, labels).numpy(), label_ids=None))
    nats, hits, count = 0.0, 0, 0
    for row, truth in zip(logits.reshape(-1, 11), labels.flatten().tolist()):
        if truth != -100:
            nats -= F.log_softmax(row, dim=0)[truth].item()
            hits, count = hits + (row.argmax().item() == truth), count + 1
    assert scores["accuracy"] == pytest.approx(100 * hits / count)
    assert scores["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)


def test_a_tokenizer_without_a_mask_and_a_part_of_nothing_are_refused(tokenizer):
    with pytest.raises(ValueError, match="has no mask token"):
        MaskingCollator(byte_tokenizer(), 0.15)
    with pytest.raises(ValueError, match="`masked=0` must be above 0"):
        MaskingCollator(tokenizer, 0)
