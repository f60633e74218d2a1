"""Patterns by name, as an entry of `attention_patterns` gives them: `"sliding_window:512"`, or the same as a dict."""

import dataclasses
import difflib
from typing import Any, Literal, get_args, get_origin

from .local_patterns import Chunked, Dilated, LocalGlobal, SlidingWindow
from .pattern_base import Full, Pattern, PrefixLm, public_fields
from .sparse_patterns import BigBird, Fixed, Lsh, Strided

PATTERNS: dict[str, type[Pattern]] = {
    pattern.name: pattern
    for pattern in (Full, SlidingWindow, Dilated, Chunked, LocalGlobal, Strided, Fixed, BigBird, Lsh, PrefixLm)
}


def parse(spec: str | dict[str, Any]) -> Pattern:
    """The pattern of a config entry: `"dilated:64,gap=2"` and `{"name": "dilated", "window": 64, "gap": 2}` are the same.

    In a string, a value without a name belongs to the first field, and numbers of a list are parted by "/".

    Raises:
        ValueError: for an unknown name or field, or a value of a wrong type, naming the choices.
    """
    if not isinstance(spec, (str, dict)):
        raise ValueError(f"`attention_patterns` entry {spec!r} is neither a string nor a dict.")
    name = spec.partition(":")[0] if isinstance(spec, str) else spec.get("name")
    if name not in PATTERNS:
        near = difflib.get_close_matches(str(name), PATTERNS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`attention_patterns={name!r}` is not one of {sorted(PATTERNS)}.{hint}")
    fields = read_string(spec) if isinstance(spec, str) else spec
    entry = {key: value for key, value in fields.items() if key != "name"}
    allowed = {field.name: field for field in public_fields(PATTERNS[name])}
    needed = [key for key, field in allowed.items() if field.default is dataclasses.MISSING]
    if not set(needed) <= entry.keys() <= allowed.keys():
        optional = [key for key in allowed if key not in needed]
        raise ValueError(
            f"`attention_patterns` entry {spec!r}: '{name}' needs {needed or 'nothing'} and may have {optional or 'no more'}."
        )
    return PATTERNS[name](**{key: read_value(spec, allowed[key], value) for key, value in entry.items()})


def read_string(spec: str) -> dict[str, Any]:
    """The fields that a string gives, values still strings where they are no numbers."""
    name, _, arguments = spec.partition(":")
    entry: dict[str, Any] = {}
    fields = public_fields(PATTERNS[name])
    for number, argument in enumerate(arguments.split(",") if arguments else []):
        key, _, text = argument.rpartition("=")
        if not key:
            if number or not fields:
                raise ValueError(f"`attention_patterns` entry {spec!r}: {argument!r} is not `name=value`.")
            key = fields[0].name
        words: list[Any] = [int(word) if word.lstrip("-").isdigit() else word for word in text.split("/")]
        entry[key] = words if len(words) > 1 else {"true": True, "false": False}.get(text, words[0])
    return entry


def read_value(spec: Any, field: dataclasses.Field, value: Any) -> Any:
    """The value of a pattern's field, checked for its type."""
    kind: Any = field.type
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if kind is bool:
        fits, wanted = isinstance(value, bool), "true or false"
    elif kind is int:
        fits, wanted = is_number, "a whole number"
    elif get_origin(kind) is Literal:
        fits, wanted = value in get_args(kind), f"one of {list(get_args(kind))}"
    else:
        numbers = value if isinstance(value, (list, tuple)) else [value]
        fits = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        wanted = "a whole number or a list of them"
        value = value if is_number else tuple(numbers)
    if not fits:
        raise ValueError(f"`attention_patterns` entry {spec!r}: `{field.name}={value!r}` must be {wanted}.")
    return value
