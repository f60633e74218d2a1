"""Local data files, read row by row: text, JSON lines, CSV and parquet. What is wrong is said as `file:line: reason`."""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow
from pyarrow import parquet

# A longer line is a file without line ends, or another kind of file
MAX_LINE_BYTES = 10_000_000
TEXT, JSON_LINES, TABLES = (".txt", ".md", ".text"), (".jsonl", ".json", ".ndjson"), {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*TEXT, *JSON_LINES, *TABLES, ".parquet")


class BadRow(NamedTuple):
    """A row that cannot be used."""

    at: str  # "file:line"
    reason: str

    def __str__(self) -> str:
        return f"{self.at}: {self.reason}"


class _Unreadable(ValueError):
    """A line that is no text."""


class _Lines:
    """The lines of a file as text; `number` is that of the last one, from 1.

    An iterator, not a generator: after a line that raises, it goes on with the next.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.number = file, 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.file.readline(MAX_LINE_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = self.file.readline(MAX_LINE_BYTES)
            raise _Unreadable(f"the line is longer than {MAX_LINE_BYTES:,} bytes")
        if b"\0" in line:
            raise _Unreadable(f"NUL byte at column {line.index(0) + 1}: this is not a text file, or a damaged one")
        try:
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _Unreadable(
                f"not UTF-8 at column {error.start + 1} (byte 0x{line[error.start]:02x}); "
                "convert it: iconv -f LATIN1 -t UTF-8"
            ) from None


def read_rows(path: Path, *, sample_by: str = "line") -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """`("file:line", row)` of each row of a file, a row that cannot be read being a `BadRow`.

    Args:
        path: its suffix says how it is read; a suffix that is not one of `SUFFIXES` is text.
        sample_by: what a row of a text file is, {"text": ...}: a `line`, a `paragraph` (what blank lines set apart) or the
            whole `document`. Blank lines are no rows.
    """
    suffix = path.suffix.lower()
    if path.stat().st_size == 0:
        yield f"{path}:1", BadRow(f"{path}:1", "the file is empty")
    elif suffix == ".parquet":
        yield from _parquet_rows(path)
    elif suffix in JSON_LINES:
        with path.open("rb") as file:
            yield from _json_rows(path, _Lines(file))
    elif suffix in TABLES:
        with path.open("rb") as file:
            yield from _table_rows(path, _Lines(file), TABLES[suffix])
    else:
        with path.open("rb") as file:
            yield from _text_rows(path, _Lines(file), sample_by)


def _text_rows(path: Path, lines: _Lines, sample_by: str) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    kept: list[str] = []
    begin, ended = 1, False
    while not ended:
        try:
            line = next(lines)
        except StopIteration:
            line, ended = "", True
        except _Unreadable as error:
            yield f"{path}:{lines.number}", BadRow(f"{path}:{lines.number}", str(error))
            continue
        begin = begin if kept else lines.number
        if line.strip() or (sample_by == "document" and kept):
            kept.append(line)
        if kept and (ended or sample_by == "line" or (sample_by == "paragraph" and not line.strip())):
            text = "".join(kept)
            kept = []
            yield f"{path}:{begin}", {"text": text.rstrip("\r\n") if sample_by != "document" else text}


def _json_rows(path: Path, lines: _Lines) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    while True:
        try:
            line = next(lines)
            at = f"{path}:{lines.number}"
            if not line.strip():
                continue
            row = json.loads(line)
        except StopIteration:
            return
        except json.JSONDecodeError as error:
            yield at, BadRow(at, f"not valid JSON at column {error.colno}: {error.msg}")
        except _Unreadable as error:
            at = f"{path}:{lines.number}"
            yield at, BadRow(at, str(error))
        else:
            kind = f"a row is an object on one line, this is a {type(row).__name__}"
            yield at, row if isinstance(row, dict) else BadRow(at, kind)


def _table_rows(path: Path, lines: _Lines, delimiter: str) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        first = lines.number + 1
        at = f"{path}:{first}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except (csv.Error, _Unreadable) as error:
            yield at, BadRow(at if isinstance(error, csv.Error) else f"{path}:{lines.number}", str(error))
            continue
        if not fields:
            continue
        if header is None:
            header = fields
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise ValueError(f"{at}: the header names the column `{twice[0]}` twice.")
        elif len(fields) != len(header):
            yield at, BadRow(at, f"{len(fields)} fields, where the header has {len(header)}")
        else:
            yield at, dict(zip(header, fields))


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    try:
        batches = parquet.ParquetFile(path).iter_batches()
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield f"{path}:{number}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        yield f"{path}:1", BadRow(f"{path}:1", f"not a parquet file that can be read: {str(error).splitlines()[0]}")


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()
