"""The columns a task needs, by role: which column plays which, and whether its values can."""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pyarrow
from datasets import Features, List, Value
from datasets.features.features import generate_from_arrow_type

# What a role's column is called elsewhere. The role's own name goes first.
ALIASES: dict[str, tuple[str, ...]] = {
    "text": ("sentence", "sentence1", "premise", "content", "document", "article", "review", "source"),
    "text_pair": ("sentence2", "hypothesis"),
    "target": ("summary", "highlights", "translation", "output", "response", "completion"),
    "label": ("labels", "class", "category", "sentiment"),
    "tokens": ("words",),
    "tags": ("ner_tags", "pos_tags", "labels"),
    "question": ("query",),
    "context": ("passage", "paragraph"),
    "answers": ("answer",),
    "prompt": ("question", "instruction"),
    "chosen": ("accepted",),
    "rejected": (),
}
TEXTS = ("text", "text_pair", "target", "question", "context")
MESSAGES = ("prompt", "chosen", "rejected")  # text, or a chat: a list of messages
LISTS = ("tokens", "tags")
# What a model is asked for: the same text with two answers is still one text
OUTPUTS = ("target", "label", "tags", "answers", "chosen", "rejected", "variants")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` where a known word is near, else a full stop."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else "."


def resolve_columns(
    needs: Sequence[str], available: Collection[str], given: Mapping[str, str | None], *, where: str
) -> dict[str, str]:
    """`{role: column}` for the roles a task needs.

    A column is the one given, else the one with the role's name, else the only one with a name of `ALIASES`, else, where
    a single role is asked of a single column, that one.

    Args:
        available: the columns there are.
        given: `{role: column}` by the arguments `<role>_column`.
        where: the file or data set, for messages.

    Raises:
        ValueError: a given column that is not there, or a role without an obvious column.
    """
    columns: dict[str, str] = {}
    listed = ", ".join(f"`{name}`" for name in available)
    for role in needs:
        wanted = given.get(role)
        if wanted is not None and wanted not in available:
            raise ValueError(
                f"`{role}_column`: {where} has no column `{wanted}`; it has {listed}{nearest(wanted, available)}"
            )
        taken = {*columns.values(), *(name for name in given.values() if name)}
        candidates = [name for name in ALIASES.get(role, ()) if name in available and name not in taken]
        if wanted is None and role in available and role not in taken:
            wanted = role
        if wanted is None and len(candidates) == 1:
            wanted = candidates[0]
        if wanted is None and len(needs) == len(available) == 1:
            (wanted,) = available
        if wanted is None:
            several = f", and more than one may be meant ({', '.join(candidates)})" if candidates else ""
            raise ValueError(f"{where} has no column `{role}`{several}; it has {listed}: say `{role}_column`.")
        columns[role] = wanted
    return columns


def find_problem(role: str, value: Any, example: Any) -> str | None:
    """Why a value cannot play its role, None where it can; `example` is the value in the first row."""
    if value is None:
        return f"`{role}` is missing"
    if role in TEXTS and not isinstance(value, str):
        return f"`{role}` must be text, not {type(value).__name__} ({value!r:.40})"
    if role in (*TEXTS, *MESSAGES) and isinstance(value, str) and not value.strip():
        return f"`{role}` is empty"
    if role in LISTS and (not isinstance(value, list) or not value):
        return f"`{role}` must be a list with at least one member, not {value!r:.40}"
    if role == "answers":
        return _answers_problem(value)
    if role == "label" and isinstance(value, int) and value < 0:
        return f"`label` is {value}, which stands for no label: classes are numbered from 0"
    if not _same_kind(value, example):
        return f"`{role}` is {_kind(value)} ({value!r:.40}), where the first row has {_kind(example)}"
    return None


def row_problem(row: Mapping[str, Any], example: Mapping[str, Any]) -> str | None:
    """The first reason why a row, `{role: value}`, cannot be used; `example` is the first row."""
    problems = (find_problem(role, value, example[role]) for role, value in row.items())
    problem = next((problem for problem in problems if problem), None)
    if problem:
        return problem
    if "tags" in row and "tokens" in row and len(row["tags"]) != len(row["tokens"]):
        return f"{len(row['tokens'])} tokens and {len(row['tags'])} tags: each token needs one"
    if "answers" in row and "context" in row:
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"]):
            if row["context"][start : start + len(text)] != text:
                return f"the answer {text!r:.40} does not stand at character {start} of `context`"
    return None


def _answers_problem(value: Any) -> str | None:
    texts, starts = (value.get("text"), value.get("answer_start")) if isinstance(value, dict) else (None, None)
    if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
        return None
    return '`answers` must be {"text": [...], "answer_start": [...]} with lists of one length, as in SQuAD'


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {_kind(value[0])}" if value else "an empty list"
    names = {bool: "a truth value", int: "a whole number", float: "a number", str: "text", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _same_kind(value: Any, example: Any) -> bool:
    number = (int, float)
    if isinstance(value, list) and isinstance(example, list):
        return not value or not example or all(_same_kind(member, example[0]) for member in value)
    if isinstance(example, float):
        return type(value) in number
    return type(value) is type(example)


def features_of(example: Mapping[str, Any]) -> Features:
    """The types of the columns, from the first row `{role: value}`: not guessed from the values of a batch."""
    answers = {"text": List(Value("string")), "answer_start": List(Value("int64"))}
    return Features(
        {
            role: answers if role == "answers" else generate_from_arrow_type(pyarrow.array([value]).type)
            for role, value in example.items()
        }
    )
