"""Data from files, folders and packages: what is read, how it is split, and how each fault is named."""

import hashlib
import json
import re
from pathlib import Path

import datasets
import pytest
from transformers import HfArgumentParser

from variform.training.data import files
from variform.training.data.arguments import DataArguments
from variform.training.data.splits import facts, load_data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What `datasets` keeps, it keeps in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, content) -> str:
    """Bytes, text, or rows of JSON lines; returns the path."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def rows(number: int) -> list[dict]:
    return [{"text": f"text {i}", "label": ["bad", "good"][i % 2]} for i in range(number)]


class TestFormats:
    TABLE = [{"text": "one", "label": "a"}, {"text": "two, or more", "label": "b"}, {"text": "three", "label": "a"}]

    def load(self, path, **more):
        data = load_data(DataArguments(dataset=path, held_out=1, **more), ("text", "label"))
        names = data["train"].features["label"].names
        return sorted((row["text"], names[row["label"]]) for part in data.values() for row in part)

    def expected(self):
        return sorted((row["text"], row["label"]) for row in self.TABLE)

    def test_json_lines(self, tmp_path):
        assert self.load(write(tmp_path / "a.jsonl", self.TABLE)) == self.expected()

    @pytest.mark.parametrize("suffix, delimiter", [("csv", ","), ("tsv", "\t")])
    def test_tables(self, tmp_path, suffix, delimiter):
        lines = ["text,label", "one,a", '"two, or more",b', "three,a"]
        if delimiter == "\t":
            lines = ["text\tlabel", "one\ta", "two, or more\tb", "three\ta"]
        assert self.load(write(tmp_path / f"a.{suffix}", "\n".join(lines))) == self.expected()

    def test_a_field_may_hold_a_line_end(self, tmp_path):
        path = write(tmp_path / "a.csv", 'text,label\n"one\ntwo",a\nthree,b\n')
        assert self.load(path) == [("one\ntwo", "a"), ("three", "b")]

    def test_parquet(self, tmp_path):
        datasets.Dataset.from_list(self.TABLE).to_parquet(tmp_path / "a.parquet")
        assert self.load(str(tmp_path / "a.parquet")) == self.expected()

    @pytest.mark.parametrize(
        "sample_by, expected",
        [
            ("line", ["one", "two", "three"]),
            ("paragraph", ["one\ntwo", "three"]),
            ("document", ["one\ntwo\n\n\nthree"]),
        ],
    )
    def test_text(self, tmp_path, sample_by, expected):
        train = write(tmp_path / "a.txt", "one\ntwo\n\n\nthree")
        held_out = write(tmp_path / "b.txt", "four")
        arguments = DataArguments(train_files=[train], eval_files=[held_out], sample_by=sample_by)
        data = load_data(arguments)
        assert list(data["train"]["text"]) == expected
        assert list(data["validation"]["text"]) == ["four"]

    def test_a_glob_names_many_files_in_the_order_of_their_names(self, tmp_path):
        for name in "cab":
            write(tmp_path / f"{name}.txt", name)
        arguments = DataArguments(train_files=[f"{tmp_path}/[ab].txt"], eval_files=[f"{tmp_path}/c.txt"])
        assert list(load_data(arguments)["train"]["text"]) == ["a", "b"]

    def test_a_byte_order_mark_is_no_text(self, tmp_path):
        path = write(
            tmp_path / "a.jsonl", b"\xef\xbb\xbf" + json.dumps({"text": "one"}).encode() + b'\n{"text": "two"}'
        )
        data = load_data(DataArguments(dataset=path, held_out=1))
        assert {*data["train"]["text"], *data["validation"]["text"]} == {"one", "two"}

    def test_a_changed_file_is_read_again(self, tmp_path):
        path = write(tmp_path / "a.txt", "one\ntwo\n")
        load_data(DataArguments(dataset=path, held_out=1))
        data = load_data(DataArguments(dataset=write(tmp_path / "a.txt", "one\nten\n"), held_out=1))
        assert {*data["train"]["text"], *data["validation"]["text"]} == {"one", "ten"}


GOOD = b'{"text": "fine", "label": "a"}\n{"text": "good", "label": "b"}\n'
FAULTS = {
    "bad_json": ("a.jsonl", GOOD + b'{"text": oops}\n', ":3: not valid JSON at column 10"),
    "no_object": ("a.jsonl", GOOD + b'["text"]\n', ":3: a row is an object on one line, this is a list"),
    "latin_1": ("a.jsonl", GOOD + '{"text": "é"}\n'.encode("latin-1"), r":3: not UTF-8 at column 11 \(byte 0xe9\)"),
    "nul": ("a.jsonl", GOOD + b'{"text": "\0"}\n', ":3: NUL byte at column 11"),
    "lost_key": ("a.jsonl", GOOD + b'{"txt": "x", "label": "a"}\n', ":3: there is no `text`.*did you mean `txt`"),
    "null": ("a.jsonl", GOOD + b'{"text": null, "label": "a"}\n', ":3: `text` is missing"),
    "blank": ("a.jsonl", GOOD + b'{"text": " ", "label": "a"}\n', ":3: `text` is empty"),
    "number": ("a.jsonl", GOOD + b'{"text": 7, "label": "a"}\n', ":3: `text` must be text, not int"),
    "other_kind": (
        "a.jsonl",
        GOOD + b'{"text": "x", "label": 1}\n',
        ":3: `label` is a whole number.*first row has text",
    ),
    "no_label": (
        "a.jsonl",
        b'{"text": "x", "label": 1}\n{"text": "y", "label": 0}\n{"text": "z", "label": -1}\n',
        ":3: `label` is -1, which stands for no label",
    ),
    "ragged": ("a.csv", b"text,label\nx,a\ny,b\nz\n", ":4: 1 fields, where the header has 2"),
    "open_quote": ("a.csv", b'text,label\nx,a\ny,b\n"z,a\n', ":4: unexpected end of data"),
    "csv_latin_1": ("a.csv", "text,label\nx,a\ny,b\né,a\n".encode("latin-1"), ":4: not UTF-8 at column 1"),
}


class TestFaults:
    @pytest.mark.parametrize("name, content, message", FAULTS.values(), ids=FAULTS)
    def test_the_message_names_file_line_and_reason(self, tmp_path, name, content, message):
        path = write(tmp_path / name, content)
        with pytest.raises(ValueError, match=f"^{re.escape(path)}{message}"):
            load_data(DataArguments(dataset=path), ("text", "label"))

    @pytest.mark.parametrize("name, content, message", FAULTS.values(), ids=FAULTS)
    def test_so_many_bad_rows_can_be_left_out(self, tmp_path, name, content, message):
        path = write(tmp_path / name, content)
        data = load_data(DataArguments(dataset=path, skip_bad_rows=1, held_out=1), ("text", "label"))
        assert len(data["train"]) + len(data["validation"]) == 2
        assert "1 rows that could not be used were left out" in facts(data)["split"]

    def test_one_more_is_refused_and_the_message_names_the_number(self, tmp_path):
        path = write(tmp_path / "a.jsonl", GOOD + b"oops\n" * 7)
        with pytest.raises(ValueError, match=r"(?s):3: .*and 2 more.*`skip_bad_rows: 7`"):
            load_data(DataArguments(dataset=path, skip_bad_rows=6), ("text", "label"))

    def test_a_line_without_end(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "MAX_LINE_BYTES", 1000)
        path = write(tmp_path / "a.txt", b"short\n" + b"x" * 5000 + b"\nlast\n")
        with pytest.raises(ValueError, match=":2: the line is longer than 1,000 bytes"):
            load_data(DataArguments(dataset=path))
        data = load_data(DataArguments(dataset=path, skip_bad_rows=1, held_out=1))
        assert {*data["train"]["text"], *data["validation"]["text"]} == {"short", "last"}

    def test_the_longest_line_is_ten_megabytes(self, tmp_path):
        path = write(tmp_path / "a.txt", b"x" * 10_000_001)
        with pytest.raises(ValueError, match=":1: the line is longer than 10,000,000 bytes"):
            load_data(DataArguments(dataset=path))

    @pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet"])
    def test_an_empty_file(self, tmp_path, suffix):
        with pytest.raises(ValueError, match=rf"a\.{suffix}:1: the file is empty"):
            load_data(DataArguments(dataset=write(tmp_path / f"a.{suffix}", b"")))

    def test_a_file_of_blank_lines(self, tmp_path):
        with pytest.raises(ValueError, match="There is no row in"):
            load_data(DataArguments(dataset=write(tmp_path / "a.txt", b"\n\n \n")))

    def test_no_parquet(self, tmp_path):
        with pytest.raises(ValueError, match=r"a\.parquet:1: not a parquet file that can be read"):
            load_data(DataArguments(dataset=write(tmp_path / "a.parquet", b"PAR1 but no more")))

    def test_a_column_twice(self, tmp_path):
        with pytest.raises(ValueError, match=r"a\.csv:1: the header names the column `text` twice"):
            load_data(DataArguments(dataset=write(tmp_path / "a.csv", "text,text\na,b\n")))

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ValueError, match=r"`train_files`: there is no file .*missing\.txt"):
            load_data(DataArguments(train_files=[str(tmp_path / "missing.txt")]))

    def test_a_folder_among_files(self, tmp_path):
        with pytest.raises(ValueError, match="is a folder; name its files"):
            load_data(DataArguments(train_files=[str(tmp_path)]))


class TestColumns:
    def load(self, tmp_path, needs, row, **arguments):
        other = {name: f"{value} too" if isinstance(value, str) else value for name, value in row.items()}
        path = write(tmp_path / "a.jsonl", [row, other])
        return load_data(DataArguments(dataset=path, held_out=1, **arguments), needs)

    @pytest.mark.parametrize("name", ["text", "sentence", "review"])
    def test_an_obvious_column_is_found(self, tmp_path, name):
        data = self.load(tmp_path, ("text", "label"), {name: "one", "class": "a", "other": 3})
        assert data["train"].column_names == ["text", "label"]

    def test_a_single_column_needs_no_name(self, tmp_path):
        assert self.load(tmp_path, ("text",), {"whatever": "one"})["train"].column_names == ["text"]

    def test_more_than_one_may_be_meant(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"no column `text`, and more than one may be meant \(sentence, review\); it has"
        ):
            self.load(tmp_path, ("text", "label"), {"sentence": "a", "review": "b", "label": "c"})
        data = self.load(tmp_path, ("text",), {"sentence": "a", "review": "b"}, text_column="review")
        assert data["train"]["text"][0].startswith("b")

    def test_a_misspelt_column_is_refused_with_the_nearest(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"`text_column`: .* has no column `txet`; it has `text`, `n`; did you mean `text`"
        ):
            self.load(tmp_path, ("text",), {"text": "a", "n": 1}, text_column="txet")

    def test_a_missing_column_is_refused_with_those_there_are(self, tmp_path):
        with pytest.raises(ValueError, match=r"has no column `label`; it has `text`, `n`: say `label_column`"):
            self.load(tmp_path, ("text", "label"), {"text": "a", "n": 1})

    def test_two_columns_can_change_places(self, tmp_path):
        places = {"text_column": "target", "target_column": "text"}
        data = self.load(tmp_path, ("text", "target"), {"text": "a", "target": "b"}, **places)
        assert data["train"]["text"][0].startswith("b")

    def test_tags_must_be_as_many_as_tokens(self, tmp_path):
        good, bad = {"tokens": ["a", "b"], "tags": ["X", "Y"]}, {"tokens": ["a", "b"], "tags": ["X"]}
        path = write(tmp_path / "a.jsonl", [good, bad])
        with pytest.raises(ValueError, match=r"a\.jsonl:2: 2 tokens and 1 tags"):
            load_data(DataArguments(dataset=path), ("tokens", "tags"))

    @pytest.mark.parametrize(
        "answers, message",
        [
            ({"text": ["b"], "answer_start": [1]}, "the answer 'b' does not stand at character 1"),
            ({"text": ["b"], "answer_start": []}, "lists of one length, as in SQuAD"),
            ("b", "lists of one length, as in SQuAD"),
        ],
    )
    def test_an_answer_must_stand_where_it_is_said_to(self, tmp_path, answers, message):
        row = {"question": "q", "context": "a b", "answers": {"text": ["b"], "answer_start": [2]}}
        path = write(tmp_path / "a.jsonl", [row, {**row, "answers": answers}])
        with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{message}"):
            load_data(DataArguments(dataset=path), ("question", "context", "answers"))


class TestLabels:
    def load(self, tmp_path, labels, **arguments):
        table = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
        path = write(tmp_path / "a.jsonl", table)
        return load_data(DataArguments(dataset=path, held_out=1, **arguments), ("text", "label"))

    @pytest.mark.parametrize(
        "labels, names",
        [(["b", "a", "b"], ["a", "b"]), ([10, 9, 2], ["2", "9", "10"]), ([True, False, True], ["False", "True"])],
    )
    def test_classes_have_names_in_order(self, tmp_path, labels, names):
        data = self.load(tmp_path, labels)
        assert data["train"].features["label"].names == names
        everything = {row["text"]: row["label"] for rows in data.values() for row in rows}
        assert [names[everything[f"text {i}"]] for i in range(3)] == [str(label) for label in labels]

    def test_a_number_with_a_fraction_stays_one(self, tmp_path):
        data = self.load(tmp_path, [0.5, 1, 2.25])
        assert {*data["train"]["label"], *data["validation"]["label"]} == {0.5, 1.0, 2.25}


class TestSplits:
    def load(self, tmp_path, table, **arguments):
        return load_data(DataArguments(dataset=write(tmp_path / "a.jsonl", table), **arguments), ("text", "label"))

    @pytest.mark.parametrize("held_out, expected", [(None, 10), (0.25, 25), (7, 7)])
    def test_a_part_or_a_number_is_held_out(self, tmp_path, held_out, expected):
        data = self.load(tmp_path, rows(100), held_out=held_out)
        assert (len(data["train"]), len(data["validation"])) == (100 - expected, expected)

    def test_equal_texts_stay_on_one_side(self, tmp_path):
        data = self.load(tmp_path, rows(20) * 3, held_out=5)
        assert len(data["validation"]) == 15
        assert not {*data["train"]["text"]} & {*data["validation"]["text"]}

    def test_the_split_is_that_of_the_seed(self, tmp_path):
        texts = [list(self.load(tmp_path, rows(50), split_seed=seed)["validation"]["text"]) for seed in (0, 0, 1)]
        assert texts[0] == texts[1] != texts[2]

    def test_something_must_be_left_to_train_on(self, tmp_path):
        with pytest.raises(ValueError, match="`held_out=3` leaves nothing to train on: there are 3 different"):
            self.load(tmp_path, rows(3), held_out=3)

    def test_the_first_examples_are_taken(self, tmp_path):
        data = self.load(tmp_path, rows(100), max_train_examples=5, max_eval_examples=2)
        assert (len(data["train"]), len(data["validation"])) == (5, 2)

    def files(self, tmp_path, train, judged, **arguments):
        paths = {
            "train_files": [write(tmp_path / "train.jsonl", train)],
            "eval_files": [write(tmp_path / "eval.jsonl", judged)],
        }
        return load_data(DataArguments(**paths, **arguments), ("text", "label"))

    def test_files_make_the_two_sides(self, tmp_path):
        data = self.files(tmp_path, rows(4), [{"text": "another", "label": "good"}])
        assert (len(data["train"]), list(data["validation"]["text"])) == (4, ["another"])
        with pytest.raises(ValueError, match="`held_out` has no effect"):
            self.files(tmp_path, rows(4), [{"text": "another", "label": "good"}], held_out=0.1)

    def test_a_text_on_both_sides_is_refused_with_both_places(self, tmp_path):
        with pytest.raises(ValueError, match=r"train\.jsonl:3: the same text is held out, at .*eval\.jsonl:1"):
            self.files(tmp_path, rows(4), rows(3)[2:])

    def test_or_left_out_of_the_training(self, tmp_path):
        data = self.files(tmp_path, rows(4), rows(3)[2:], skip_bad_rows=1)
        assert list(data["train"]["text"]) == ["text 0", "text 1", "text 3"]
        assert list(data["validation"]["text"]) == ["text 2"]

    def test_lines_of_text_may_recur(self, tmp_path):
        train = write(tmp_path / "a.txt", "one\ntwo\nExeunt.\n")
        held_out = write(tmp_path / "b.txt", "three\nfour\nExeunt.\n")
        assert len(load_data(DataArguments(train_files=[train], eval_files=[held_out]))["train"]) == 3

    def test_but_not_most_of_them(self, tmp_path):
        paths = [write(tmp_path / f"{name}.txt", "one\ntwo\nExeunt.\n") for name in "ab"]
        with pytest.raises(ValueError, match=r"a\.txt:1: the same text is held out, at .*b\.txt:1"):
            load_data(DataArguments(train_files=paths[:1], eval_files=paths[1:]))


class TestHub:
    """A folder is laid out like a repository of the Hub, and read by the same function."""

    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "reviews"
        folder.mkdir()
        for split, first in (("train", 0), ("test", 6)):
            write(folder / f"{split}.jsonl", rows(9)[first : first + 6])
        return folder

    def test_a_folder_has_splits_by_the_names_of_its_files(self, folder):
        data = load_data(DataArguments(dataset=str(folder)), ("text", "label"))
        assert list(data["validation"]["text"]) == ["text 6", "text 7", "text 8"]
        assert data["train"].features["label"].names == ["bad", "good"]

    def test_a_readme_names_configurations(self, folder):
        write(folder / "more.jsonl", rows(20))
        write(
            folder / "README.md",
            "---\nconfigs:\n- config_name: a\n  data_files: train.jsonl\n"
            "- config_name: b\n  data_files: more.jsonl\n---\n",
        )
        data = load_data(DataArguments(dataset=str(folder), dataset_config="b", held_out=2), ("text", "label"))
        assert len(data["train"]) == 18
        with pytest.raises(ValueError, match=r"(?i)`dataset`: .*config"):
            load_data(DataArguments(dataset=str(folder)), ("text",))

    def test_a_split_that_is_not_there_is_refused_with_those_there_are(self, folder):
        with pytest.raises(ValueError, match=r"`eval_split`: .* has no split `dev`; it has train, test"):
            load_data(DataArguments(dataset=str(folder), eval_split="dev"), ("text",))

    def test_a_field_of_a_column_is_a_column(self, folder):
        write(folder / "train.jsonl", [{"translation": {"en": f"house {i}", "it": f"casa {i}"}} for i in range(5)])
        (folder / "test.jsonl").unlink()
        arguments = DataArguments(
            dataset=str(folder), text_column="translation.en", target_column="translation.it", held_out=1
        )
        data = load_data(arguments, ("text", "target"))
        assert data["train"][0].keys() == {"text", "target"}
        assert data["train"][0]["text"].startswith("house")

    def test_a_bad_line_is_named(self, folder):
        write(folder / "train.jsonl", b'{"text": "a"}\n{"text": oops}\n')
        with pytest.raises(ValueError, match=r"train\.jsonl:2: not valid JSON at column 10"):
            load_data(DataArguments(dataset=str(folder)))

    def test_a_missing_value_is_named_by_its_row(self, folder):
        write(folder / "train.jsonl", [*rows(3), {"text": None, "label": "bad"}])
        with pytest.raises(ValueError, match=r"reviews:train:4: `text` is missing"):
            load_data(DataArguments(dataset=str(folder)), ("text", "label"))
        assert len(load_data(DataArguments(dataset=str(folder), skip_bad_rows=1), ("text", "label"))["train"]) == 3

    def test_texts_that_are_held_out_too_are_named(self, folder):
        write(folder / "test.jsonl", rows(2))
        with pytest.raises(ValueError, match=r"reviews:train:1: the same text is held out, at .*reviews:test:1"):
            load_data(DataArguments(dataset=str(folder)), ("text", "label"))

    def test_what_is_nowhere_is_refused_with_what_there_is(self, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(
            ValueError, match=r"'movie_review' is neither a set of the registry .*did you mean `movie_reviews`"
        ):
            load_data(DataArguments(dataset="movie_review"))


class TestFacts:
    def test_digests_are_of_the_held_out_rows_and_of_the_files(self, tmp_path):
        path = write(tmp_path / "a.jsonl", rows(10))
        told = facts(load_data(DataArguments(dataset=path, held_out=2), ("text", "label")))
        assert told["examples"] == "8 to train on, 2 held out"
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() in told["SHA-256 of the files"]
        assert "2 of 10 different examples held out by a shuffle with seed 0" in told["split"]

    def test_many_files_have_one_digest(self, tmp_path):
        for number in range(9):
            write(tmp_path / f"{number}.txt", f"line {number}")
        told = facts(load_data(DataArguments(train_files=[str(tmp_path / "*.txt")], held_out=2)))
        lines = [
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
            for path in sorted(tmp_path.glob("*.txt"))
        ]
        digest = hashlib.sha256("".join(lines).encode()).hexdigest()
        assert told["SHA-256 of the files"] == f"`{digest}` of the list of 9 that `sha256sum` makes"

    def test_the_digest_tells_other_rows_apart_and_not_the_training_part(self, tmp_path):
        def digest(train, held_out):
            paths = [write(tmp_path / f"{name}.jsonl", table) for name, table in (("a", train), ("b", held_out))]
            data = load_data(DataArguments(train_files=paths[:1], eval_files=paths[1:]), ("text", "label"))
            return facts(data)["SHA-256 of the held-out examples"]

        first = digest(rows(4), rows(9)[7:])
        assert digest(rows(6), rows(9)[7:]) == first
        assert digest(rows(4), rows(9)[6:]) != first


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "One of `dataset` and `train_files`"),
        ({"dataset": "a", "train_files": ["b"]}, "One of `dataset` and `train_files`"),
        ({"dataset": "a", "sample_by": "word"}, "`sample_by` must be one of line, paragraph, document, got 'word'"),
        ({"dataset": "a", "skip_bad_rows": -1}, "`skip_bad_rows` counts rows, got -1"),
        ({"dataset": "a", "held_out": 0}, "`held_out` is a part below 1 or a number"),
        ({"dataset": "a", "held_out": 2.5}, "`held_out` is a part below 1 or a number"),
        ({"dataset": "a", "max_train_examples": 0}, "`max_train_examples` must be at least 1"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**arguments)


def test_eval_files_go_with_train_files(tmp_path):
    with pytest.raises(ValueError, match="`eval_files` go with `train_files`"):
        load_data(DataArguments(dataset=str(tmp_path), eval_files=["a.txt"]))


def test_arguments_are_flags(tmp_path):
    parser = HfArgumentParser(DataArguments)
    (arguments,) = parser.parse_args_into_dataclasses(
        ["--train_files", "a", "b", "--held_out", "0.2", "--text_column", "x"]
    )
    assert (arguments.train_files, arguments.held_out, arguments.columns()["text"]) == (["a", "b"], 0.2, "x")
