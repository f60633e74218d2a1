"""Paths of this machine, kept out of what is published."""

import dataclasses
import re
from pathlib import Path
from typing import Any

# An absolute path in running text; in a URL or a word such as and/or, what stands before the slash rules it out
ABSOLUTE = re.compile(r"(?<![\w./<])(?:/[\w.+@~*?,=-]+)+/?")


def shorten(text: str) -> str:
    """A text in which a path of this machine is relative to where packages or the run lie or, outside these, its last part."""
    return ABSOLUTE.sub(lambda match: shorten_path(match[0]), text)


def shorten_path(path: str) -> str:
    """`shorten` of one absolute path; as it is, if nothing here is called so."""
    parts = Path(path).parts
    if not Path(*parts[:2]).exists():
        return path
    if "site-packages" in parts:  # a file that a package carries
        return "/".join(parts[parts.index("site-packages") + 1 :])
    if Path(path).is_relative_to(Path.cwd()):
        return Path(path).relative_to(Path.cwd()).as_posix()
    return parts[-1]


def model_name(source: str) -> str:
    """What to call a model: a repo as it is, a folder here by its name, one that a package carries by the package's."""
    path = Path(source)
    if not source or not path.exists():
        return source
    parts = path.resolve().parts
    return parts[parts.index("site-packages") + 1] if "site-packages" in parts else parts[-1]


def shorten_all(value: Any) -> Any:
    """`shorten` of every text in a value: of a dataclass's fields, of lists and of dictionaries, keys too."""
    if isinstance(value, str):
        return shorten(value)
    if isinstance(value, (list, tuple)):
        return type(value)(shorten_all(inner) for inner in value)
    if isinstance(value, dict):
        return {shorten_all(key): shorten_all(inner) for key, inner in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: shorten_all(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value
