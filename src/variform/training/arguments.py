"""A recipe file and a command line, read as one: what the command line says wins."""

import difflib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_recipe(dataclass_types: list[Any], argv: list[str]) -> tuple[Any, ...]:
    """Fill dataclasses from `--config recipe.yaml` and the flags after it.

    A recipe is turned into flags and put before the others. So both know the same names, both are converted by the
    type of their field (YAML itself would read `1e-3` as a string), and the last word is the command line's.

    Args:
        dataclass_types: as for `HfArgumentParser`.
        argv: the arguments without the program's name.

    Raises:
        ValueError: a recipe that is no mapping, or a name that no field has.
        SystemExit: a value that does not fit its field (argparse says which and exits with status 2).
    """
    parser = HfArgumentParser(dataclass_types)
    known = {option for action in parser._actions for option in action.option_strings}
    flags: list[str] = []
    argv = [part for argument in argv for part in _split_config_flag(argument)]
    while "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise ValueError("`--config` needs a file: --config configs/recipes/g2p.yaml")
        flags += _recipe_flags(Path(argv[at + 1]), known)
        argv = argv[:at] + argv[at + 2 :]
    *parsed, unknown = parser.parse_args_into_dataclasses(
        args=flags + argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"`{unknown[0]}` is not an argument of this script{_suggestion(unknown[0], known)}")
    return tuple(parsed)


def _split_config_flag(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _recipe_flags(path: Path, known: set[str]) -> list[str]:
    """The recipe at `path` as a list of command-line flags."""
    if not path.is_file():
        raise ValueError(f"`--config {path}`: there is no such file.")
    text = path.read_text(encoding="utf-8")
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold `name: value` lines, not a {type(recipe).__name__}.")
    flags: list[str] = []
    for name, value in recipe.items():
        if f"--{name}" not in known:
            line = _line_of(name, text)
            raise ValueError(f"{path}:{line}: `{name}` is not an argument of this script{_suggestion(name, known)}")
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *map(_as_argument, values)]
    return flags


def _as_argument(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _line_of(name: object, text: str) -> int:
    """The line, counted from 1, on which a recipe names `name`."""
    found = re.search(rf"""^["']?{re.escape(str(name))}["']?\s*:""", text, flags=re.MULTILINE)
    return text.count("\n", 0, found.start()) + 1 if found else 1


def _suggestion(name: object, known: set[str]) -> str:
    close = difflib.get_close_matches("--" + str(name).lstrip("-").split("=")[0], known, n=1)
    return f"; did you mean `{close[0].lstrip('-')}`?" if close else "."
