"""Texts as token ids for each task: what is labelled, what is cut, dropped, refused and cached."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from variform.training.data import tokenizing
from variform.training.data.tokenizing import (
    best_answers,
    check_ids,
    tokenize_blocks,
    tokenize_classes,
    tokenize_documents,
    tokenize_masked,
    tokenize_pairs,
    tokenize_questions,
    tokenize_words,
)
from variform.training.data.windows import encode
from variform.training.tokenizer import byte_tokenizer, letters_and_symbols_tokenizer, train_tokenizer

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "##a", "##b", "##c", "?"]


def word_pieces(vocabulary=PIECES) -> PreTrainedTokenizerFast:
    """BERT's kind of tokenizer, for words of the letters a, b and c."""
    tokenizer = Tokenizer(WordPiece({token: number for number, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    special = [(token, vocabulary.index(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def splits(rows: list[dict], **features) -> DatasetDict:
    types = Features(features) if features else None
    return DatasetDict({split: Dataset.from_list(rows, features=types) for split in ("train", "validation")})


class TestDocuments:
    def test_a_text_that_fits_ends_and_one_that_does_not_is_cut_and_counted(self):
        data, report = tokenize_documents(
            splits([{"text": "abc"}, {"text": "abcdefgh"}]), byte_tokenizer(), max_length=6
        )
        assert data["train"][0] == {
            "input_ids": [256, 97, 98, 99, 256],
            "attention_mask": [1] * 5,
            "labels": [256, 97, 98, 99, 256],
        }
        assert data["train"][1]["input_ids"] == [256, 97, 98, 99, 100, 101]
        assert report == {f"{s} {w}": n for s in data for w, n in (("truncated", 1), ("dropped", 0))}

    def test_a_special_token_of_the_tokenizer_s_own_is_end_enough(self):
        data, _ = tokenize_documents(splits([{"text": "a b"}]), word_pieces(), max_length=9)
        assert data["train"][0]["input_ids"] == [2, 5, 6, 3]

    @pytest.mark.parametrize("frame", ["both", "end", "none", "start"])
    def test_a_text_to_write_starts_and_ends_as_a_stream_has_it(self, frame):
        """Rows that are trained on began without the start that the judged text has, where no tokenizer puts it there."""
        tokenizer, texts = train_tokenizer(["abc"] * 3, 262, frame=frame), ["bac", "bacbac"]
        data, report = tokenize_documents(
            splits([{"text": text} for text in texts]), tokenizer, max_length=6, starts=True
        )
        fitting, cut = data["train"]["input_ids"]
        assert fitting == encode(texts[:1], tokenizer, ends=True).tolist()
        assert len(cut) == 6 and cut[:5] == encode(texts[1:], tokenizer).tolist()[:5]
        assert report["train truncated"] == 1

    def test_a_tokenizer_without_a_start_begins_with_the_text(self):
        data, _ = tokenize_documents(splits([{"text": "a b"}]), word_pieces(), max_length=9, starts=True)
        assert data["train"][0]["input_ids"] == [2, 5, 6, 3]

    def test_blocks_lose_nothing(self):
        texts = ["hello", "you", "there"]
        data, report = tokenize_blocks(splits([{"text": text} for text in texts]), byte_tokenizer(), block_size=4)
        blocks = data["train"]["input_ids"]
        assert [len(block) for block in blocks] == [4, 4, 4, 4, 3]
        assert [token for block in blocks for token in block] == [
            i for text in texts for i in (256, *text.encode(), 256)
        ]
        assert data["train"]["labels"] == blocks
        assert report["train dropped"] == 0

    def test_a_block_of_one_token_is_dropped(self):
        data, report = tokenize_blocks(splits([{"text": "abc"}]), byte_tokenizer(), block_size=4)
        assert data["train"]["input_ids"] == [[256, 97, 98, 99]]
        assert report["train dropped"] == 1

    def test_where_nothing_is_trained_on_the_data_are_refused(self):
        with pytest.raises(ValueError, match="None of the 1 examples of `train` has a token to train on: 0 %"):
            tokenize_masked(splits([{"text": "abc"}]), word_pieces(), max_length=2)

    def test_a_length_without_room_is_refused(self):
        with pytest.raises(ValueError, match="`max_length=1` must be at least 2"):
            tokenize_documents(splits([{"text": "abc"}]), byte_tokenizer(), max_length=1)


class TestMasked:
    def test_special_tokens_are_marked(self):
        data, report = tokenize_masked(splits([{"text": "ab c"}, {"text": "a a a a"}]), word_pieces(), max_length=5)
        assert data["train"][0]["input_ids"] == [2, 5, 9, 7, 3]
        assert data["train"][1]["input_ids"] == [2, 5, 5, 5, 3]
        assert data["train"]["special_tokens_mask"] == [[1, 0, 0, 0, 1]] * 2
        assert report["train truncated"] == 1

    def test_in_blocks(self):
        data, _ = tokenize_masked(splits([{"text": "a b"}, {"text": "c"}]), word_pieces(), max_length=5, blocks=True)
        assert data["train"]["input_ids"] == [[2, 5, 6, 3, 2], [7, 3]]
        assert data["train"]["special_tokens_mask"] == [[1, 0, 0, 1, 1], [0, 1]]


def test_pairs_are_encoded_apart():
    tokenizer = letters_and_symbols_tokenizer("cat", ["K", "AE", "T"])
    data, report = tokenize_pairs(
        splits([{"text": "cat", "target": "K AE T"}]), tokenizer, max_source_length=3, max_target_length=9
    )
    row = data["train"][0]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["c", "a", "</s>"]
    assert tokenizer.convert_ids_to_tokens(row["labels"]) == ["K", "AE", "T", "</s>"]
    assert report["train truncated"] == 1


def test_a_prefix_stands_before_the_text():
    tokenizer = letters_and_symbols_tokenizer("cat", ["K"])
    lengths = {"max_source_length": 9, "max_target_length": 9}
    data, _ = tokenize_pairs(splits([{"text": "at", "target": "K"}]), tokenizer, prefix="c", **lengths)
    assert tokenizer.convert_ids_to_tokens(data["train"][0]["input_ids"]) == ["c", "a", "t", "</s>"]


def test_classes_of_texts_and_of_pairs():
    rows = [{"text": "a", "text_pair": "b c", "label": 1}]
    row = tokenize_classes(splits(rows), word_pieces(), max_length=9).data["train"][0]
    assert (row["input_ids"], row["labels"]) == ([2, 5, 3, 6, 7, 3], 1)
    assert row["token_type_ids"] == [0, 0, 0, 1, 1, 1]
    rows = [{"text": "a", "label": 1}]
    assert tokenize_classes(splits(rows), word_pieces(), max_length=9).data["train"][0]["input_ids"] == [2, 5, 3]


class TestWords:
    FEATURES = {"tokens": List(Value("string")), "tags": List(ClassLabel(names=["X", "Y"]))}

    def test_the_first_piece_of_a_word_is_labelled(self):
        data = splits([{"tokens": ["abc", "b"], "tags": [1, 0]}], **self.FEATURES)
        row = tokenize_words(data, word_pieces(), max_length=9).data["train"][0]
        assert row["input_ids"] == [2, 5, 9, 10, 6, 3]
        assert row["labels"] == [-100, 1, -100, -100, 0, -100]

    def test_words_are_the_tokens_that_they_are_inside_a_text(self):
        tokenizer = train_tokenizer(["an ant and an ant"] * 3, 275)
        data = splits([{"tokens": ["an", "ant", "ran"], "tags": [1, 0, 1]}], **self.FEATURES)
        row = tokenize_words(data, tokenizer, max_length=20).data["train"][0]
        assert row["input_ids"] == tokenizer("an ant ran")["input_ids"]
        assert row["input_ids"] != tokenizer(["an", "ant", "ran"], is_split_into_words=True)["input_ids"]
        assert [label for label in row["labels"] if label != -100] == [1, 0, 1]

    def test_words_that_are_cut_off_have_no_label(self):
        data = splits([{"tokens": ["abc", "b"], "tags": [1, 0]}], **self.FEATURES)
        tokenized = tokenize_words(data, word_pieces(), max_length=4)
        assert tokenized.data["train"]["labels"] == [[-100, 1, -100, -100]]
        assert tokenized.report["train truncated"] == 1


class TestQuestions:
    # The answer is "c", at character 8; the words of the context begin at 0, 2, 4, 6, 8, 10
    ROWS = [{"question": "b ?", "context": "a b a b c a", "answers": {"text": ["c"], "answer_start": [8]}}]

    def tokenize(self, rows=ROWS, max_length=9, stride=1):
        return tokenize_questions(splits(rows), word_pieces(), max_length=max_length, stride=stride).data["train"]

    def test_a_long_context_goes_on_in_the_next_window(self):
        windows = self.tokenize()
        assert windows["input_ids"] == [[2, 6, 11, 3, 5, 6, 5, 6, 3], [2, 6, 11, 3, 6, 7, 5, 3]]
        assert windows["example"] == [0, 0]
        assert windows["offsets"][1] == [[-1, -1]] * 4 + [[6, 7], [8, 9], [10, 11]] + [[-1, -1]]

    def test_the_answer_is_where_it_stands_else_at_the_first_token(self):
        windows = self.tokenize()
        assert windows["start_positions"] == windows["end_positions"] == [0, 5]

    def test_an_answer_of_several_pieces_has_a_first_and_a_last(self):
        rows = [{"question": "b ?", "context": "a abc b", "answers": {"text": ["abc b"], "answer_start": [2]}}]
        (window,) = self.tokenize(rows, max_length=20)
        assert (window["start_positions"], window["end_positions"]) == (5, 8)

    def test_a_part_of_the_answer_is_none(self):
        rows = [{"question": "b ?", "context": "a b a b c a", "answers": {"text": ["b c"], "answer_start": [6]}}]
        assert self.tokenize(rows, stride=0)["start_positions"] == [0, 0]

    def test_the_best_answer_is_found_over_all_windows(self):
        windows = self.tokenize()
        start, end = np.zeros((2, 9)), np.zeros((2, 9))
        start[0, 1] = end[0, 1] = 99  # in the question
        start[0, 4], end[0, 4] = 1, 1
        start[1, 5], end[1, 6] = 3, 3
        data = Dataset.from_list(self.ROWS)
        assert best_answers(data, windows, start, end) == ["c a"]
        assert best_answers(data, windows, start, end, max_answer_tokens=1) in (["c"], ["a"])

    def test_the_labelled_places_give_the_answer_back(self):
        windows = self.tokenize()
        logits = [np.eye(9)[positions] for positions in (windows["start_positions"], windows["end_positions"])]
        assert best_answers(Dataset.from_list(self.ROWS), windows, *logits) == ["c"]

    def test_a_question_without_room_for_its_context_is_refused(self):
        with pytest.raises(ValueError, match="Question 0 has 2 tokens: `max_length=6` leaves no room"):
            self.tokenize(max_length=6)


class TestIds:
    def test_an_id_beyond_the_vocabulary_is_refused_by_its_place(self):
        with pytest.raises(
            ValueError, match=r"input_ids\[1, 2\] = 122, but `vocab_size` is 120 \(the tokenizer has 257\)"
        ):
            check_ids(Dataset.from_list([{"input_ids": [1, 2]}, {"input_ids": [1, 2, 122]}]), byte_tokenizer(), 120)

    def test_every_task_can_check_it(self):
        with pytest.raises(ValueError, match=r"input_ids\[0, 0\] = 256"):
            tokenize_documents(splits([{"text": "abc"}]), byte_tokenizer(), max_length=6, vocab_size=256)
        tokenize_documents(splits([{"text": "abc"}]), byte_tokenizer(), max_length=6, vocab_size=257)


class TestCache:
    """A tokenized data set is the same file only for the same rows, tokenizer and options."""

    @pytest.fixture
    def stored(self, tmp_path):
        data = splits([{"text": "a b c"}])
        data.save_to_disk(tmp_path / "data")
        return DatasetDict.load_from_disk(tmp_path / "data")

    def files(self, stored, tokenizer=None, max_length=8) -> str:
        done = tokenize_masked(stored, tokenizer or word_pieces(), max_length=max_length).data["train"]
        return done.cache_files[0]["filename"]

    def test_the_same_is_found_again(self, stored):
        first = self.files(stored)
        used = word_pieces()
        used(["a b", "a"], padding=True, truncation=True, max_length=3)  # a fast tokenizer remembers these
        assert self.files(stored, used) == first

    def test_another_tokenizer_is_tokenized_anew(self, stored):
        other = word_pieces([*PIECES[:5], "b", "a", *PIECES[7:]])  # of the same size and name
        assert self.files(stored, other) != self.files(stored)
        done = tokenize_masked(stored, other, max_length=8).data["train"]
        assert done[0]["input_ids"] == [2, 6, 5, 7, 3]

    def test_an_added_token_is_another_tokenizer(self, stored):
        more = word_pieces()
        more.add_tokens(["a b"])
        assert self.files(stored, more) != self.files(stored)

    def test_another_way_to_tokenize_is_tokenized_anew(self, stored, monkeypatch):
        first = self.files(stored)
        monkeypatch.setattr(tokenizing, "CODE", "another file")
        assert self.files(stored) != first

    def test_another_length_is_tokenized_anew(self, stored):
        assert self.files(stored, max_length=4) != self.files(stored)


def test_a_tokenizer_that_knows_no_places_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow does not tell which characters"):
        tokenizing.tokenize_words(splits([{"tokens": ["a"], "tags": [0]}]), Slow(), max_length=4)
