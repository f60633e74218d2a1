"""A recipe file and a command line, read as one: what the command line says wins."""

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..forms import FormLoader


class Said(NamedTuple):
    """One argument as somebody gave it."""

    name: str
    words: list[str]
    origin: str  # "command line", or the file and line


class PlainHelp(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and the default of each argument."""


def parse_recipe(
    dataclass_types: Sequence[Any],
    argv: Sequence[str],
    *,
    defaults: Mapping[str, str] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Fill dataclasses from `--config recipe.yaml` and the flags beside it.

    A recipe's lines are given before the flags. Both know the same names, both are converted by the type of their field
    (YAML itself would read `1e-3` as a string), and the last word is the command line's.

    `--print_config` prints every argument, with its value and who gave it, as a recipe, and exits.

    Args:
        dataclass_types: as for `HfArgumentParser`.
        argv: the arguments without the program's name.
        defaults: what a script says instead of the dataclasses' own defaults, `{name: value as a word}`.
        description: for `--help`.

    Raises:
        ValueError: a recipe that is no mapping or names something twice, a name that no field has, a value that does not
            fit its field. The sentence begins with the file and line where there is one.
    """
    for part in dataclass_types:
        part._argument_group_name = part.__name__  # `--help` tells the few of a script apart from Trainer's many
    parser = HfArgumentParser(
        list(dataclass_types),
        usage="%(prog)s [--config RECIPE] [--name value ...]",
        description=description,
        formatter_class=PlainHelp,
        allow_abbrev=False,
    )
    parser.set_defaults(**(defaults or {}))  # for `--help`
    parser.add_argument("--config", metavar="RECIPE", action="append", help="A YAML file of `name: value` lines.")
    parser.add_argument("--print_config", action="store_true", help="Print all arguments and who gave them; stop.")
    actions = {word[2:]: action for action in parser._actions for word in action.option_strings if word[:2] == "--"}
    commanded = list(split_flags(argv, actions))
    recipes = [path for said in commanded if said.name == "config" for path in said.words]
    given = [Said(name, [word], "script") for name, word in (defaults or {}).items() if name in actions]
    for path in recipes:
        given += read_recipe(Path(path), actions)
    given += commanded
    hints = {name: hint for part in dataclass_types for name, hint in get_type_hints(part).items()}
    values: dict[str, Any] = {}
    for said in given:
        action = actions[said.name]
        values[action.dest] = converted(said, action, may_be_list="list[" in str(hints.get(action.dest)))
    if values.pop("help", False):
        parser.print_help()
        sys.exit(0)
    missing = [action.dest for action in parser._actions if action.required and action.dest not in values]
    if missing:
        raise ValueError(f"`--{missing[0]}` must be given; `--help` says what it is.")
    values.pop("config", None)
    is_printed = values.pop("print_config", False)
    parsed = parser.parse_dict(values)
    if is_printed:
        print_config(parsed, {said.name: said.origin for said in given})
        sys.exit(0)
    return parsed


def split_flags(argv: Sequence[str], known: Mapping[str, argparse.Action]) -> Iterable[Said]:
    """`--name word word` and `--name=word` as pairs.

    Raises:
        ValueError: for a word without a flag, or a flag that no field has.
    """
    words: list[str] = []
    for argument in argv:
        if not argument.startswith("--"):
            if argument == "-h":
                argument = "--help"
            elif not words and not argument.startswith("-"):
                raise ValueError(f"`{argument}` belongs to no argument: write `--name {argument}`.")
            else:
                words.append(argument)
                continue
        if words:
            yield Said(words[0], words[1:], "command line")
        name, equals, word = argument[2:].partition("=")
        if name.replace("-", "_") in known:
            name = name.replace("-", "_")
        if name not in known:
            raise ValueError(f"`--{name}` is not an argument of this script{suggestion(name, known)}")
        words = [name, word] if equals else [name]
    if words:
        yield Said(words[0], words[1:], "command line")


def read_recipe(path: Path, known: Mapping[str, argparse.Action]) -> list[Said]:
    """The recipe at `path`, line by line."""
    if not path.is_file():
        raise ValueError(f"`--config {path}`: there is no such file.")
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, FormLoader)
        recipe = yaml.load(text, FormLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ValueError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(recipe, dict):
        what = "nothing" if recipe is None else f"a {type(recipe).__name__}"
        raise ValueError(f"{path} must hold `name: value` lines, not {what}.")
    lines = {key.value: key.start_mark.line + 1 for key, _ in root.value}
    given = []
    for name, value in recipe.items():
        where = f"{path}:{lines.get(str(name), 1)}"
        if name not in known or name in ("config", "print_config", "help"):
            raise ValueError(f"{where}: `{name}` is not an argument of this script{suggestion(name, known)}")
        if value is not None:
            values = value if isinstance(value, list) else [value]
            given.append(Said(str(name), [as_word(item) for item in values], where))
    return given


def as_word(value: Any) -> str:
    """A value of YAML as one would write it behind a flag."""
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def converted(said: Said, action: argparse.Action, may_be_list: bool) -> Any:
    """What was said, as the type of its field.

    Args:
        may_be_list: the field takes a list as well, which argparse does not know of one that takes a word.

    Raises:
        ValueError: where a word does not fit the type or the choices of the field; it says where the word stands.
    """
    where = "" if said.origin in ("command line", "script") else f"{said.origin}: "
    if action.nargs == 0 or (action.nargs == "?" and not said.words):  # a flag alone
        if said.words:
            raise ValueError(f"{where}`{said.name}` takes no value, got {' '.join(said.words)}.")
        return True if action.const is None else action.const
    has_list = action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction)
    if not said.words and (said.origin == "command line" or not (has_list or may_be_list)):
        raise ValueError(f"{where}`{said.name}` needs a value.")
    if len(said.words) > 1 and not (has_list or may_be_list):
        raise ValueError(f"{where}`{said.name}` takes one value, got {' '.join(said.words)}.")
    values = []
    convert: Any = action.type or str
    for word in said.words:
        try:
            value = convert(word)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            kind = {"string_to_bool": "true or false", "int": "a whole number", "float": "a number"}.get(
                getattr(convert, "__name__", ""), f"one of {', '.join(map(str, action.choices or []))}"
            )
            raise ValueError(f"{where}`{said.name}` must be {kind}, got {word!r}.") from None
        if action.choices is not None and value not in action.choices:
            choices = [str(getattr(choice, "value", choice)) for choice in action.choices]
            raise ValueError(
                f"{where}`{said.name}` must be one of {', '.join(choices)}, got {word!r}{suggestion(word, choices)}"
            )
        values.append(value)
    return values if has_list or len(values) != 1 else values[0]


def suggestion(name: object, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the likely one, if there is one."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else "."


def print_config(parsed: Sequence[Any], origins: Mapping[str, str]) -> None:
    """Writes all arguments as a recipe, in the order of their dataclasses, with a comment that says who gave each."""
    for part in parsed:
        print(f"# {type(part).__name__}")
        for name, value in fields_of(part).items():
            origin = origins.get(name, "default")
            print(f"{name}: {json.dumps(value, ensure_ascii=False)}  # {origin}")  # JSON is YAML, on one line


def fields_of(part: Any) -> dict[str, Any]:
    """The fields of a filled dataclass that a recipe can name, as plain values; a mapping given as text is one again."""
    values = {}
    for item in dataclasses.fields(part):
        if item.init and not item.name.startswith("_"):
            values[item.name] = plain(getattr(part, item.name))
    return values


def plain(value: Any) -> Any:
    """A value that YAML knows."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str, dict):
        return value
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    return str(getattr(value, "value", value))
