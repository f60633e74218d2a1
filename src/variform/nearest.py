"""A refused form's nearest valid one: the fewest and smallest changes of fields with which the config builds.

The check that fails says where to look: the fields that its message names are changed, each to values near its own, to what
the message offers, or to the default. One change is tried first; then a second, where the first leads on to another check.
"""

import difflib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any, NamedTuple, get_args

from huggingface_hub.errors import StrictDataclassError

from .forms import SHAPES, config_from_dict
from .model.checks import words_of
from .model.configuration_variform import PAIR_FIELDS, VariformEncoderDecoderConfig

# What stands in place of a value where a key is to be left out
LEFT_OUT = "(left out)"
# Forms that are tried before the search gives up; each takes one or two milliseconds
MOST_TRIES = 400
# How far away a change is that has no measure: another word, and what a field is by default
ANOTHER_WORD, DEFAULT = 0.7, 1.0
# What is added for each field that a message names before
LATER = 0.02

Changes = dict[str, Any]  # field, in a pair `encoder.field` -> its new value


class Candidate(NamedTuple):
    """A change that might do."""

    distance: float
    changes: Changes


@contextmanager
def untold() -> Iterator[None]:
    """Within it, transformers' warnings are not shown: they would be of forms that are only tried."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@untold()
def nearest_valid(form: Mapping[str, Any], most_changes: int = 2) -> Changes | None:
    """The changes that make a refused form valid: of the fewest fields and, among those, the nearest.

    Args:
        form: the fields with `model_type`, as a config.json or a YAML file has them.
        most_changes: of how many fields at most. A misspelt key that is put right is one.

    Returns:
        A new value for each field, named `encoder.field` inside a pair, or `LEFT_OUT`; {} for a valid form, None where
        nothing near is found.
    """
    reason = refusal(form)
    if reason is None:
        return {}
    level, reasons, tried = [(Candidate(0.0, {}), reason)], {reason}, set()
    for _ in range(most_changes):
        following = []
        for start, reason in level:
            for candidate in candidates(changed(form, start.changes), reason):
                following.append(Candidate(start.distance + candidate.distance, start.changes | candidate.changes))
        level = []
        for candidate in sorted(following, key=lambda found: found.distance):
            key = repr(sorted(candidate.changes.items()))
            if key in tried:
                continue
            tried.add(key)
            reason = refusal(changed(form, candidate.changes))
            if reason is None:
                return candidate.changes
            if len(tried) >= MOST_TRIES:
                return None
            if reason not in reasons:  # it leads on
                reasons.add(reason)
                level.append((candidate, reason))
    return None


def refusal(form: Mapping[str, Any]) -> str | None:
    """Why a form is refused, or None for a valid one."""
    try:
        config_from_dict(form)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        return str(error)
    return None


def with_mend(form: Mapping[str, Any], message: str) -> str:
    """The message of a refusal and, where one is found, the nearest valid form as a patch."""
    changes = nearest_valid(form)
    if not changes:
        return message
    return "\n".join([message, "The nearest form that builds:", *patch(form, changes)])


def patch(form: Mapping[str, Any], changes: Changes) -> list[str]:
    """Changes as lines of a patch: `-field: value`, `+field: value`."""
    lines = []
    for name, value in changes.items():
        place, key = place_of(form, name)
        lines += [f"-{name}: {place[key]}"] if key in place else []
        lines += [f"+{name}: {value}"] if value != LEFT_OUT else []
    return lines


def place_of(form: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], str]:
    """The mapping that holds a field, and the field's name in it."""
    side, _, key = name.rpartition(".")
    return (form.get(side) or {}) if side else form, key


def changed(form: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """A form with changes."""
    result = dict(form)
    for name, value in changes.items():
        side, _, key = name.rpartition(".")
        place = result
        if side:
            place = result[side] = dict(result.get(side) or {})
        place[key] = value
        if value == LEFT_OUT:
            del place[key]
    return result


def candidates(form: Mapping[str, Any], message: str) -> Iterator[Candidate]:
    """Changes of one field each that a refusal suggests."""
    model_type = form.get("model_type")
    if model_type not in SHAPES:
        for word in SHAPES:
            yield Candidate(1 - likeness(model_type, word), {"model_type": word})
        return
    is_pair = SHAPES[model_type][0] is VariformEncoderDecoderConfig
    places = {"": (form, SHAPES[model_type][0])}
    for side in ("encoder", "decoder") if is_pair else ():
        if isinstance(form.get(side) or {}, Mapping):
            places[side + "."] = (form.get(side) or {}, SHAPES[f"variform_{side}"][0])
    for prefix, (place, config_class) in places.items():
        table = {field.name: field for field in fields(config_class)}
        # The message names a field as `field`, `field=value` or `encoder.field=value`; the first is the one at fault
        named = dict.fromkeys(re.findall(r"`(?:\w+\.)?(\w+)[`=\[]", message))
        for rank, name in enumerate(named):
            if name in table and name not in ("encoder", "decoder") and (name in place or prefix or not is_pair):
                value, default = place.get(name, default_of(table[name])), default_of(table[name])
                for new in values_near(value, table[name], message):
                    if type(new) is not type(value) or new != value:
                        is_offered = isinstance(new, str) and re.search(f"(use|[Dd]id you mean) {new!r}", message)
                        away = 0.0 if is_offered else distance(value, new, default)
                        yield Candidate(away + LATER * rank, {prefix + name: new})
            if name in place and (name not in table or (prefix and name in PAIR_FIELDS)):
                yield Candidate(DEFAULT, {prefix + name: LEFT_OUT})
                for near in difflib.get_close_matches(name, table, n=2):
                    # Beside the field that was meant, a misspelt one is left out
                    moved = {} if near in place else {prefix + near: place[name]}
                    if moved or name not in table:
                        yield Candidate(1 - likeness(name, near), {prefix + name: LEFT_OUT, **moved})


def values_near(value: Any, field: Any, message: str) -> Iterator[Any]:
    """Values that a field may be meant to have.

    Args:
        value: what it has. field: of the config's dataclass. message: of the check that failed.
    """
    default = default_of(field)
    yield default
    if default is None:
        yield None
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from numbers_near(value, numbers_in(message))
    elif isinstance(value, float):
        yield from (0.0, abs(value), 0.1, 1.0, *map(float, numbers_in(message)))
        yield from [int(value)] if value == int(value) else []
    elif isinstance(value, str):
        yield from words_of(field.type)
        yield from words_offered(message)
        yield from numbers_in(value)
        yield from {"true": [True], "yes": [True], "false": [False], "no": [False]}.get(value.lower(), [])
        yield [value]
    elif isinstance(value, list):
        yield from lists_near(value, message)
    elif isinstance(value, dict):
        yield from dicts_near(value, message)
    if bool in (field.type, *get_args(field.type)):
        yield from (True, False)
    if int in (field.type, *get_args(field.type)) and not isinstance(value, (bool, int)):
        yield from numbers_in(message)


def numbers_near(value: int, others: list[int]) -> Iterator[int]:
    """Whole numbers that stand to others as checks ask for: equal, one beside, a multiple or a divisor of them."""
    yield from (abs(value), value - 1, value + 1, value - value % 2, value + value % 2, value + 2, 0, 1, 2, 4)
    for other in others:
        yield from (other, other - 1, other + 1)
        if 0 < other < 2**20 and value >= 0:
            yield from (value // other * other, -(-value // other) * other)
            divisors = [number for number in range(1, min(other, 4096) + 1) if other % number == 0]
            yield from sorted(divisors, key=lambda number: abs(number - value))[:3]


def lists_near(values: list[Any], message: str) -> Iterator[list[Any]]:
    """Lists with one entry changed, or left out, or with all entries that the message is about."""
    for index, entry in enumerate(values):
        for new in entries_near(entry, message):
            yield [*values[:index], new, *values[index + 1 :]]
            yield [new if other == entry else other for other in values]
        yield values[:index] + values[index + 1 :]


def entries_near(entry: Any, message: str) -> Iterator[Any]:
    """An entry of `attention_patterns` or another list, with one of its words or numbers changed."""
    if isinstance(entry, dict):
        yield from dicts_near(entry, message)
    elif isinstance(entry, int):
        yield from numbers_near(entry, numbers_in(message))
    else:
        text = str(entry)
        name, colon, options = text.partition(":")
        yield from (word + colon + options for word in words_offered(message))
        yield from words_offered(message)
        for found in re.finditer(r"-?\d+", text):
            for number in numbers_near(int(found.group()), numbers_in(message)):
                yield text[: found.start()] + str(number) + text[found.end() :]
        yield name
        yield "full"


def dicts_near(values: dict[str, Any], message: str) -> Iterator[dict[str, Any]]:
    """Mappings with one value changed or left out."""
    for key, value in values.items():
        yield {name: other for name, other in values.items() if name != key}
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield from ({**values, key: type(value)(new)} for new in numbers_near(int(value), numbers_in(message)))
        if isinstance(value, str):
            yield from ({**values, key: word} for word in words_offered(message))
    if "rope_theta" in message:
        yield {**values, "rope_theta": 10000.0}


def numbers_in(text: str) -> list[int]:
    return list(dict.fromkeys(int(number) for number in re.findall(r"(?<![\w.])-?\d{1,15}(?![\w.]*\d)", text)))


def words_offered(message: str) -> list[str]:
    """The words in quotes: the choices that a message lists, and the nearest of them."""
    return list(dict.fromkeys(re.findall(r"'([\w./+-]+)'", message)))


def default_of(field: Any) -> Any:
    return field.default_factory() if field.default is MISSING else field.default


def distance(old: Any, new: Any, default: Any) -> float:
    """How much a change of one value changes; the same for every unit."""
    is_number = isinstance(old, (int, float)) and not isinstance(old, bool)
    if is_number and isinstance(new, (int, float)) and not isinstance(new, bool):
        return abs(new - old) / max(abs(old), abs(new), 1) if new != 0 else DEFAULT
    if isinstance(old, str) and isinstance(new, str):
        return ANOTHER_WORD * (1 - likeness(old, new)) + 0.1
    if isinstance(old, (list, dict)) and isinstance(new, type(old)):
        return ANOTHER_WORD * (1 - likeness(old, new)) + 0.1
    if isinstance(old, str) and str(new).lower() == old.lower():
        return 0.0  # the same, of the right type
    return DEFAULT if new == default else DEFAULT + 0.1


def likeness(a: Any, b: Any) -> float:
    """From 0 to 1, of two values as they are written."""
    return difflib.SequenceMatcher(None, str(a), str(b)).ratio()
