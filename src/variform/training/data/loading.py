"""Rows under the names of their roles, from a package, from files, and from what `datasets` knows to load."""

import glob
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from . import columns as column_rules
from . import files as file_formats
from .arguments import DataArguments
from .columns import features_of, nearest, resolve_columns, row_problem
from .files import SUFFIXES, BadRow, file_digest, read_rows
from .sources import SOURCES

logger = logging.getLogger(__name__)

SHOWN = 5  # bad rows in a message
CODE = (__file__, column_rules.__file__, file_formats.__file__)  # what decides how a file is read
PLACE = "_place"  # "file:line" of a row, until all of it is checked


class BadRows:
    """The rows that cannot be used, of which `allowed` may be left out."""

    def __init__(self, allowed: int):
        self.allowed = allowed
        self.rows: list[BadRow] = []

    def check(self) -> None:
        """Refuse more of them than are allowed."""
        if len(self.rows) > self.allowed:
            more = len(self.rows) - SHOWN
            shown = [*map(str, self.rows[:SHOWN]), *([f"and {more:,} more"] if more > 0 else [])]
            raise ValueError(
                "\n".join(shown) + f"\nMend them, or leave {'it' if len(self.rows) == 1 else 'them'} out with "
                f"`skip_bad_rows: {len(self.rows)}`."
            )

    def report(self) -> str:
        """What a card says of those left out."""
        for row in self.rows[:SHOWN]:
            logger.warning("left out: %s", row)
        return f"{len(self.rows):,} rows that could not be used were left out" if self.rows else ""


def load_source(arguments: DataArguments, needs: Sequence[str]) -> DatasetDict:
    """A set of the registry."""
    name = str(arguments.dataset)
    source = SOURCES[name]
    config = arguments.dataset_config or next(iter(source.configs))
    if config not in source.configs:
        raise ValueError(
            f"`dataset_config` of {name} must be one of {', '.join(source.configs)}, got {config!r}"
            f"{nearest(config, source.configs)}"
        )
    columns = resolve_columns(needs, source.configs[config], arguments.columns(), where=f"{name} ({config})")
    splits = source.load(config)
    data = DatasetDict()
    for split, rows in splits.items():
        chosen = [{role: row[column] for role, column in columns.items()} for row in rows]
        places = [f"{name}:{split}:{number}" for number in range(1, len(rows) + 1)]
        data[split] = Dataset.from_list(chosen, features=features_of(chosen[0])).add_column(PLACE, places)
    info = data["train"].info
    info.description, info.license, info.citation = source.split, source.licence, source.citation
    info.dataset_name, info.config_name, info.homepage = name, config, source.homepage
    info.download_checksums = _checksums(source.files())
    return data


def local_patterns(arguments: DataArguments) -> dict[str, list[str]]:
    """`{split: patterns}` where the data are files that this module reads itself."""
    if arguments.train_files:
        patterns = {"train": arguments.train_files}
    elif arguments.dataset and (Path(arguments.dataset).is_file() or glob.has_magic(arguments.dataset)):
        patterns = {"train": [arguments.dataset]}
    else:
        if arguments.eval_files:
            raise ValueError("`eval_files` go with `train_files`; a set has a split of its own (`eval_split`).")
        return {}
    return {**patterns, **({"validation": arguments.eval_files} if arguments.eval_files else {})}


def load_files(
    arguments: DataArguments, needs: Sequence[str], patterns: Mapping[str, list[str]], budget: BadRows
) -> DatasetDict:
    """Local files. They are read twice: once to find what is wrong with them, once to keep them as Arrow files."""
    data = DatasetDict()
    for split, given in patterns.items():
        files = _find_files("eval_files" if split == "validation" else "train_files", given)
        columns, example = _first_row(files, arguments, needs)
        reading: dict[str, Any] = {
            "files": files,
            "columns": columns,
            "example": example,
            "sample_by": arguments.sample_by,
        }
        budget.rows += [row for row in _role_rows(**reading) if isinstance(row, BadRow)]
        budget.check()
        checksums = _checksums(files)
        features = features_of({**example, PLACE: ""})
        # An argument, so that other files or another way to read them are another entry of the cache. As text: `datasets`
        # takes the members of a list for shards, and runs the generator for each.
        contents = str([checksums, *map(file_digest, CODE)])
        data[split] = Dataset.from_generator(
            _good_rows, features=features, gen_kwargs={"reading": reading, "contents": contents}
        )
        data[split].info.download_checksums = checksums
        data[split].info.dataset_name, data[split].info.config_name = ", ".join(given), None
    return data


def _find_files(name: str, patterns: Sequence[str]) -> list[Path]:
    """The files of all patterns, each once, in order of their names."""
    found: set[str] = set()
    for pattern in patterns:
        if Path(pattern).is_dir():
            raise ValueError(
                f"`{name}`: {pattern} is a folder; name its files ({pattern}/*), or give it as `dataset`."
            )
        matches = [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]
        if Path(pattern).is_file():  # its name may hold what globs read as signs
            matches = [pattern]
        if not matches:
            raise ValueError(f"`{name}`: there is no file {pattern}.")
        found.update(matches)
    return sorted(map(Path, found))


def _first_row(
    files: Sequence[Path], arguments: DataArguments, needs: Sequence[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """The columns of the first row that can be used, by role, and that row."""
    found: list[BadRow] = []
    for path in files:
        for place, row in islice(read_rows(path, sample_by=arguments.sample_by), arguments.skip_bad_rows + 1):
            if isinstance(row, BadRow):
                found.append(row)
                continue
            columns = resolve_columns(needs, list(row), arguments.columns(), where=str(path))
            example = {role: row[column] for role, column in columns.items()}
            if problem := row_problem(example, example):
                found.append(BadRow(place, problem))
            else:
                return columns, example
    if not found:
        raise ValueError(f"There is no row in {', '.join(map(str, files[:SHOWN]))}.")
    raise ValueError("\n".join(map(str, found[:SHOWN])))


def _role_rows(
    files: Sequence[Path], columns: Mapping[str, str], example: Mapping[str, Any], sample_by: str
) -> Iterator[dict[str, Any] | BadRow]:
    """The rows of all files as `{role: value}`."""
    for path in files:
        for place, row in read_rows(path, sample_by=sample_by):
            if isinstance(row, BadRow):
                yield row
                continue
            missing = [column for column in columns.values() if column not in row]
            if missing:
                yield BadRow(
                    place, f"there is no `{missing[0]}`; the row has {', '.join(row)}{nearest(missing[0], row)}"
                )
                continue
            chosen = {role: row[column] for role, column in columns.items()}
            problem = row_problem(chosen, example)
            yield BadRow(place, problem) if problem else {**chosen, PLACE: place}


def _good_rows(reading: dict, contents: str) -> Iterator[dict[str, Any]]:
    return (row for row in _role_rows(**reading) if not isinstance(row, BadRow))


def _checksums(files: Sequence[Path]) -> dict[str, dict]:
    return {str(path): {"num_bytes": path.stat().st_size, "checksum": file_digest(path)} for path in files}


def load_hub(arguments: DataArguments, needs: Sequence[str], budget: BadRows) -> DatasetDict:
    """A folder or a Hub id, by `datasets.load_dataset`, which knows both."""
    name = str(arguments.dataset)
    try:
        loaded = datasets.load_dataset(name, arguments.dataset_config, revision=arguments.dataset_revision)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(_blame_file(name, arguments, error)) from error
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        known = f"a set of the registry ({', '.join(SOURCES)}), a file or a folder, nor a Hub id that can be reached"
        what = reason if Path(name).is_dir() else f"{name!r} is neither {known}: {reason}{nearest(name, SOURCES)}"
        raise ValueError(f"`dataset`: {what}") from error
    splits = {"train": arguments.train_split}
    judged = arguments.eval_split or next((split for split in ("validation", "test") if split in loaded), None)
    if judged:
        splits["validation"] = judged
    data = DatasetDict()
    for split, called in splits.items():
        if called not in loaded:
            argument = "train_split" if split == "train" else "eval_split"
            raise ValueError(f"`{argument}`: {name} has no split `{called}`; it has {', '.join(loaded)}.")
        rows = loaded[called]
        if any("." in column for column in arguments.columns().values() if column):
            rows = rows.flatten()  # `translation.en` is a field of the column `translation`
        columns = resolve_columns(needs, rows.column_names, arguments.columns(), where=name)
        rows = rows.select_columns(list(columns.values()))
        rows = rows.rename_columns({column: role for role, column in columns.items() if column != role})
        rows = rows.add_column(PLACE, [f"{name}:{called}:{number}" for number in range(1, len(rows) + 1)])
        data[split] = _usable(rows, budget)
        data[split].info.dataset_name = name
    return data


def _blame_file(folder: str, arguments: DataArguments, error: Exception) -> str:
    """Which line of a folder's files `datasets` could not read; its own words where this module finds nothing wrong."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and path.suffix.lower() in SUFFIXES and path.name != "README.md":
            bad = next(
                (row for _, row in read_rows(path, sample_by=arguments.sample_by) if isinstance(row, BadRow)), None
            )
            if bad:
                return f"{bad}\nMend it, or name the files as `train_files`, where `skip_bad_rows` can leave rows out."
    return f"{folder} cannot be read: {error.__cause__ or error}"


def _usable(rows: Dataset, budget: BadRows) -> Dataset:
    """The rows of which every value can play its role."""
    example = next((row for row in rows if not any(value is None for value in row.values())), None)
    if example is None:
        raise ValueError(f"{rows[0][PLACE] if len(rows) else 'the data'}: no row has all of {rows.column_names}.")
    kept = []
    for number, row in enumerate(rows):
        problem = row_problem({role: value for role, value in row.items() if role != PLACE}, example)
        if problem:
            budget.rows.append(BadRow(row[PLACE], problem))
        else:
            kept.append(number)
    return rows if len(kept) == len(rows) else rows.select(kept)
