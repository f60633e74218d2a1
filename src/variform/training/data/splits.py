"""What a model learns from and what judges it: registered sets, local files, and the Hub, under the same few columns."""

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, List

from .arguments import HELD_OUT, DataArguments
from .columns import OUTPUTS
from .files import BadRow
from .loading import PLACE, BadRows, load_files, load_hub, load_source, local_patterns
from .sources import SOURCES

logger = logging.getLogger(__name__)

MOST_FILES = 6  # whose digests are told one by one


def load_data(arguments: DataArguments, needs: Sequence[str] = ("text",)) -> DatasetDict:
    """The splits `train` and `validation` with one column a role, checked.

    Args:
        needs: roles, as in `variform.training.data.columns.ALIASES`, or names of columns. Other columns are dropped.

    Returns:
        Texts as strings. `label` is a ClassLabel with the names sorted, or a number where it is one with a fraction
        (regression); `tags` are lists of a ClassLabel. `facts` tells where it is from.

    Raises:
        ValueError: for what there is not, what cannot be read, and more than `skip_bad_rows` bad rows, as `file:line: reason`.
    """
    budget = BadRows(arguments.skip_bad_rows)
    if arguments.dataset in SOURCES:
        data = load_source(arguments, needs)
    elif patterns := local_patterns(arguments):
        data = load_files(arguments, needs, patterns, budget)
    else:
        data = load_hub(arguments, needs, budget)
    if "validation" not in data:
        data = _hold_out(data["train"], arguments, needs)
    elif arguments.held_out is not None:
        raise ValueError("`held_out` has no effect: this data has a part of its own to judge by. Leave it out.")
    elif arguments.dataset not in SOURCES:  # their splits are their own: of Brown's sentences some recur
        data = _without_overlap(data, arguments, needs, budget)
    budget.check()
    for split, rows in data.items():
        if not len(rows):
            raise ValueError(f"No example is left for the split `{split}`.")
    info = data["train"].info
    info.description = "; ".join(filter(None, [info.description, budget.report()]))
    data = _encode_labels(data.remove_columns(PLACE))
    limits = {"train": arguments.max_train_examples, "validation": arguments.max_eval_examples}
    return DatasetDict({split: _first(rows, limits[split]) for split, rows in data.items()})


def facts(data: DatasetDict) -> dict[str, str]:
    """What a model card says about data as `load_data` gave it: source, licence, split, sizes, digests."""
    info, held_out = data["train"].info, data["validation"]
    digest = hashlib.sha256()
    for row in held_out:
        digest.update((json.dumps(row, sort_keys=True, ensure_ascii=False, default=str) + "\n").encode())
    files = {Path(path).name: entry["checksum"] for path, entry in (info.download_checksums or {}).items()}
    known = {
        "source": ", ".join(filter(None, [info.dataset_name, info.config_name, info.homepage])),
        "licence": info.license,
        "citation": info.citation,
        "split": info.description,
        "examples": f"{len(data['train']):,} to train on, {len(held_out):,} held out",
        "SHA-256 of the held-out examples": f"`{digest.hexdigest()}`",
        "SHA-256 of the files": _digests(files),
    }
    return {name: value for name, value in known.items() if value}


def _digests(files: dict[str, str]) -> str:
    """The digest of each file or, where they are many, that of their list, as `sha256sum * | sha256sum` has it."""
    if len(files) <= MOST_FILES:
        return ", ".join(f"{name} `{checksum}`" for name, checksum in sorted(files.items()))
    lines = "".join(f"{checksum}  {name}\n" for name, checksum in sorted(files.items()))
    return f"`{hashlib.sha256(lines.encode()).hexdigest()}` of the list of {len(files):,} that `sha256sum` makes"


def _keys(rows: Dataset, needs: Sequence[str]) -> list[bytes]:
    """A digest of what the model is given, for each row."""
    inputs = [role for role in needs if role not in OUTPUTS] or list(needs)
    columns = [rows[role] for role in inputs]
    return [hashlib.blake2b(json.dumps(values).encode(), digest_size=16).digest() for values in zip(*columns)]


def _hold_out(rows: Dataset, arguments: DataArguments, needs: Sequence[str]) -> DatasetDict:
    """Split by what the model is given: equal texts stay on one side."""
    keys = _keys(rows, needs)
    distinct = list(dict.fromkeys(keys))
    random.Random(arguments.split_seed).shuffle(distinct)
    part = HELD_OUT if arguments.held_out is None else arguments.held_out
    size = max(1, round(len(distinct) * part)) if part < 1 else int(part)
    if size >= len(distinct):
        is_text = bool(arguments.train_files) and arguments.sample_by == "document"
        smaller = (
            "; `sample_by: paragraph`, or line, makes more of a text file, or name `eval_files`" if is_text else ""
        )
        raise ValueError(
            f"`held_out={part:g}` leaves nothing to train on: there are {len(distinct):,} different examples{smaller}."
        )
    held_out = set(distinct[:size])
    rows.info.description = (
        f"{size:,} of {len(distinct):,} different examples held out by a shuffle with seed {arguments.split_seed}; "
        "equal ones stay on one side"
    )
    sides: dict[str, list[int]] = {"train": [], "validation": []}
    for number, key in enumerate(keys):
        sides["validation" if key in held_out else "train"].append(number)
    return DatasetDict({split: rows.select(numbers) for split, numbers in sides.items()})


def _without_overlap(
    data: DatasetDict, arguments: DataArguments, needs: Sequence[str], budget: BadRows
) -> DatasetDict:
    """Training rows whose text is held out are bad rows.

    Lines of plain text may recur ("Exeunt."): there only a held-out part most of which is trained on is refused.
    """
    held_out = dict(zip(_keys(data["validation"], needs), data["validation"][PLACE]))
    keys = _keys(data["train"], needs)
    twice = {number: held_out[key] for number, key in enumerate(keys) if key in held_out}
    is_lines = list(needs) == ["text"] and bool(arguments.train_files) and arguments.sample_by == "line"
    seen = len(held_out.keys() & set(keys))
    if is_lines and 2 * seen <= len(held_out):
        return data
    budget.rows += [
        BadRow(data["train"][number][PLACE], f"the same text is held out, at {place}")
        for number, place in twice.items()
    ]
    data["train"] = data["train"].select([number for number in range(len(keys)) if number not in twice])
    return data


def _encode_labels(data: DatasetDict) -> DatasetDict:
    """`label` and `tags` as ClassLabels whose names are those of both parts, sorted."""
    for role in ("label", "tags"):
        feature = data["train"].features.get(role)
        inner = getattr(feature, "feature", feature)
        if inner is None or isinstance(inner, ClassLabel) or inner.dtype.startswith("float"):
            continue
        parts = {split: _names(rows, role) for split, rows in data.items()}
        names = _in_order(parts["train"] | parts["validation"])
        unlearnt = _in_order(parts["validation"] - parts["train"])
        if unlearnt:
            logger.warning("`%s`: held out, but never trained on: %s", role, ", ".join(unlearnt))
        number_of = {name: number for number, name in enumerate(names)}
        target = ClassLabel(names=names)
        features = data["train"].features.copy()
        features[role] = List(target) if role == "tags" else target
        data = data.map(_encode, fn_kwargs={"role": role, "number_of": number_of}, features=features)
    return data


def _names(rows: Dataset, role: str) -> set[str]:
    """The distinct values, as text."""
    return {str(value) for values in rows[role] for value in (values if isinstance(values, list) else [values])}


def _in_order(names: set[str]) -> list[str]:
    """Numbers by their value, anything else by the alphabet."""
    return sorted(names, key=int) if all(map(str.isdigit, names)) else sorted(names)


def _encode(row: dict, role: str, number_of: Mapping[str, int]) -> dict:
    value = row[role]
    return {role: [number_of[str(tag)] for tag in value] if isinstance(value, list) else number_of[str(value)]}


def _first(rows: Dataset, limit: int | None) -> Dataset:
    return rows if limit is None else rows.select(range(min(limit, len(rows))))
