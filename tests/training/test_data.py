"""Data from files, folders and packages: what is read, how it is split, and how each fault is named."""

import json
import re
from pathlib import Path

import datasets
import pytest

from variform.training import files
from variform.training.data import DataArguments, facts, load_data


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
