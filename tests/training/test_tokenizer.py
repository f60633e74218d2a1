"""One vocabulary for letters and phonemes, used by plain tokenizer calls."""

import pytest
from transformers import PreTrainedTokenizerFast

from variform.training.tokenizer import letters_and_symbols_tokenizer


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
