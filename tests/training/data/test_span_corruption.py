"""Span corruption: nothing of a text is lost, as much of it is cut out as asked, and a resumed run cuts out the same."""

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import variform
from variform.training.data.span_corruption import SetEpoch, SpanCorruption, noise_mask, sentinel_ids

SENTINELS = 30
FIRST = 3  # ids of texts in these tests: from here on, sentinels after them
WORDS = 200


@pytest.fixture(scope="module")
def tokenizer():
    names = [
        "<pad>",
        "</s>",
        "<unk>",
        *(f"w{i}" for i in range(WORDS)),
        *(f"<extra_id_{i}>" for i in range(SENTINELS)),
    ]
    model = WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    extra = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), additional_special_tokens=extra, **special)


def rows(*lengths: int) -> Dataset:
    generator = np.random.default_rng(0)
    return Dataset.from_list(
        [{"input_ids": [*(FIRST + generator.integers(WORDS, size=n)).tolist(), 1]} for n in lengths]
    )


def put_back(example: dict, tokenizer) -> list[int]:
    """The text, from the input with each sentinel replaced by what the labels say after it."""
    sentinels = sentinel_ids(tokenizer)
    spans: dict[int, list[int]] = {}
    for token in example["labels"][:-1]:
        if token in sentinels:
            spans[token] = current = []
        else:
            current.append(token)
    return [piece for token in example["input_ids"][:-1] for piece in spans.get(token, [token])]


@pytest.mark.parametrize("length", [2, 3, 7, 20, 101, 500])
def test_nothing_is_lost(tokenizer, length):
    data = rows(length)
    example = SpanCorruption(data, tokenizer)[0]
    assert put_back(example, tokenizer) == data[0]["input_ids"][:-1]
    assert example["input_ids"][-1] == example["labels"][-1] == tokenizer.eos_token_id


def test_sentinels_come_in_their_order_on_both_sides(tokenizer):
    example = SpanCorruption(rows(101), tokenizer)[0]
    sentinels = sentinel_ids(tokenizer)
    for side in ("input_ids", "labels"):
        assert [token for token in example[side] if token in sentinels] == sentinels[:5]  # 15 tokens in spans of 3


@pytest.mark.parametrize("length, noise, spans", [(100, 15, 5), (512, 77, 26), (2, 1, 1), (10, 2, 1)])
def test_as_much_is_cut_out_as_in_t5(length, noise, spans):
    for seed in range(50):
        mask = noise_mask(length, density=0.15, mean_span=3.0, generator=np.random.default_rng(seed))
        assert len(mask) == length
        assert mask.sum() == noise
        assert (np.diff(mask.astype(int)) == 1).sum() == spans  # each begins after a token that is kept
        assert mask[-1] and not mask[0]


def test_every_place_but_the_ends_is_cut_out_about_equally_often():
    masks = [noise_mask(40, density=0.3, mean_span=2.0, generator=np.random.default_rng(seed)) for seed in range(3000)]
    often = np.mean(masks, axis=0)[5:-5]
    assert often.min() > 0.2
    assert often.max() < 0.4


def test_an_example_depends_on_seed_epoch_and_number_only(tokenizer):
    data = rows(50, 60, 70)
    first, second = SpanCorruption(data, tokenizer), SpanCorruption(data, tokenizer)
    second[0], second[1]  # another history
    for epoch in (0, 3):
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        assert first[2] == second[2]
    first.set_epoch(0)
    assert first[2] != second[2]
    assert SpanCorruption(data, tokenizer, seed=1)[2] != first[2]


def test_texts_too_short_to_cut_are_left_out(tokenizer):
    assert len(SpanCorruption(rows(1, 5, 0, 2), tokenizer)) == 2


def test_more_spans_than_sentinels_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"700 tokens has 35 spans cut out, but the tokenizer has 30 sentinels"):
        SpanCorruption(rows(700), tokenizer)


def test_a_tokenizer_without_sentinels_is_refused():
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(
        ValueError, match=r"no sentinels, tokens `<extra_id_0>`.*finetune/tokenizer\.py --sentinels 100"
    ):
        SpanCorruption(rows(5), plain)


@pytest.mark.parametrize("options", [{"noise_density": 0.0}, {"noise_density": 1.0}, {"mean_span": 0.5}])
def test_impossible_parts_are_refused(tokenizer, options):
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        SpanCorruption(rows(5), tokenizer, **options)


def test_a_trainer_tells_the_epoch(tokenizer, tmp_path):
    class Watched(SpanCorruption):
        seen: list[int] = []

        def __getitem__(self, index):
            self.seen.append(self.epoch)
            example = super().__getitem__(index)
            return {"input_ids": example["input_ids"][:4], "labels": example["input_ids"][:4]}

    data = Watched(rows(50, 60), tokenizer)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = variform.from_config({"model_type": "variform_decoder", "vocab_size": len(tokenizer), **sizes})
    arguments = TrainingArguments(
        tmp_path,
        num_train_epochs=3,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[SetEpoch(data)]).train()
    assert data.seen == [0, 0, 1, 1, 2, 2]
