"""One vocabulary for letters and phonemes, used by plain tokenizer calls."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from variform.training.tokenizer import (
    DOCUMENT_START_ID,
    byte_tokenizer,
    letters_and_symbols_tokenizer,
    train_tokenizer,
)


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


def test_a_trained_tokenizer_knows_every_text_and_gives_it_back(tmp_path):
    train_tokenizer(["the quick brown fox"] * 5, 320, sentinels=3, max_length=50).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the quick fox", "Zoë \u2603\n\ttabs  and  spaces ", "\U0001f600"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("the")["input_ids"]) == ["<s>", "the", "</s>"]
    assert (tokenizer.pad_token, tokenizer.mask_token, tokenizer.model_max_length) == ("<pad>", "<mask>", 50)
    assert tokenizer.convert_tokens_to_ids("<extra_id_2>") == 7
    pair = tokenizer("the", "fox")["input_ids"]
    assert tokenizer.decode(pair) == "<s>the</s>fox</s>"


@pytest.mark.parametrize(("frame", "tokens"), [("end", ["the", "</s>"]), ("start", ["<s>", "the"]), ("none", ["the"])])
def test_a_frame_for_each_shape(frame, tokens):
    tokenizer = train_tokenizer(["the"] * 3, 300, frame=frame)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the")["input_ids"]) == tokens
    assert tokenizer.padding_side == ("right" if frame == "end" else "left")


def test_a_vocabulary_without_room_is_refused():
    with pytest.raises(ValueError, match="`vocab_size=260` must be at least 261: 256 bytes and 5 special tokens"):
        train_tokenizer(["a"], 260)
