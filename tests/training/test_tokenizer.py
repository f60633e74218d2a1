"""One vocabulary for letters and phonemes, used by plain tokenizer calls."""

import pytest
from transformers import PreTrainedTokenizerFast

from variform.training.tokenizer import DOCUMENT_START_ID, byte_tokenizer, letters_and_symbols_tokenizer


@pytest.fixture
def tokenizer():
    return letters_and_symbols_tokenizer("cat'", ["K", "AE", "T"])


def test_a_word_is_its_letters(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("cat's")["input_ids"]) == ["c", "a", "t", "'", "<unk>", "</s>"]


def test_a_pronunciation_is_its_symbols(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("K AE T")["input_ids"]) == ["K", "AE", "T", "</s>"]


def test_symbols_decode_to_the_text_they_came_from(tokenizer):
    assert tokenizer.decode(tokenizer("K AE T")["input_ids"], skip_special_tokens=True) == "K AE T"


def test_the_vocabulary_does_not_depend_on_the_order_it_is_given_in(tokenizer):
    assert letters_and_symbols_tokenizer("'tac", ["T", "K", "AE"]).get_vocab() == tokenizer.get_vocab()


def test_padding_is_masked(tokenizer):
    batch = tokenizer(["cat", "a"], padding=True)
    assert batch["attention_mask"] == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["input_ids"][1][2:] == [tokenizer.pad_token_id] * 2


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded("cat")["input_ids"] == tokenizer("cat")["input_ids"]
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "</s>", "<pad>")


def test_a_byte_is_its_own_number():
    ids = byte_tokenizer()("".join(map(chr, range(128))) + "\u00e9")["input_ids"]
    assert ids == [DOCUMENT_START_ID, *range(128), 195, 169]


def test_the_vocabulary_has_every_byte_once():
    vocabulary = byte_tokenizer().get_vocab()
    assert sorted(vocabulary.values()) == list(range(257))


def test_bytes_decode_to_the_text_they_came_from(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "Who's there?\r\n\tna\u00efve \U0001f600 \x00"
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
    assert loaded(["ab", "c"], padding=True)["attention_mask"] == [[1, 1, 1], [0, 1, 1]]
