"""What a checkpoint of somebody else's may not make this machine do: run code that nobody has read, or read other files."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

ATTENTION_KEY = re.compile(r"_?(attn|experts)_implementation\w*")
COMMIT = re.compile(r"[0-9a-f]{40}")
CODE_REFERENCE = re.compile(r"\w+\.\w+")  # a file beside the config, and a class in it


def check_remote_code(model: str | Path, revision: str | None, trust: bool) -> None:
    """Refuses to run code that its owner can change: of a repo on the Hub, a commit must be named.

    Args:
        model: a folder, whose code lies there to be read, or a repo on the Hub.
        revision: a branch, a tag or a commit.
        trust: whether code that comes with the model would be run.

    Raises:
        ValueError: if it would be, of a repo, at anything but a full commit hash.
    """
    if not trust or Path(model).is_dir():
        return
    if COMMIT.fullmatch(revision or "") is None:
        raise ValueError(
            f"`trust_remote_code` runs the code in {model}, and `revision={revision!r}` can change after you have read it: "
            "give the commit that you read, 40 hexadecimal digits."
        )


def check_folder(folder: str | Path) -> None:
    """Refuses a checkpoint that reaches out of its folder, by its index of weights or by its config.

    Raises:
        ValueError: naming the file and the key. FileNotFoundError: for weights that an index names and that are not there.
    """
    from .checkpoint import inside, weight_files  # which checks configs itself

    folder = Path(folder)
    check_config(folder)
    for name in weight_files(folder):
        inside(folder, name)


def check_config(folder: Path) -> None:
    """`refuse_foreign_code` of the config of a folder, if it has one."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download or save it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, not the fields of a config.")
    refuse_foreign_code(config, str(path))


def refuse_foreign_code(config: Mapping[str, Any], where: str) -> None:
    """Refuses the keys of a config that would have code run from elsewhere than the files beside it.

    Args:
        config: what a config.json holds.
        where: names it in the error.

    Raises:
        ValueError: for `trust_remote_code` anywhere, an `auto_map` inside another field or to another repo or folder, and
            an attention or expert implementation that names a repo of kernels.
    """
    for path, value in entries_of(config):
        name, key = ".".join(path), path[-1]
        if key == "trust_remote_code":
            raise ValueError(f"{where}: `{name}` is for the caller to say, never for a config; remove it.")
        if key == "auto_map" and len(path) > 1:
            raise ValueError(f"{where}: `{name}` names code in a part of the config; remove it.")
        if path[0] == "auto_map" and isinstance(value, str) and CODE_REFERENCE.fullmatch(value) is None:
            raise ValueError(
                f"{where}: `{name}` names code elsewhere, {value!r}; only a file in the same folder is taken: copy it there, "
                "and write `file.Class`."
            )
        if any(map(ATTENTION_KEY.fullmatch, path)) and isinstance(value, str) and "/" in value:
            raise ValueError(
                f"{where}: `{name}` names a repo of kernels, {value!r}, whose code would run; remove it, and give "
                "`attn_implementation` when you load the model."
            )


def entries_of(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every entry of a nested config: the keys that lead to it, and its value; of a list, the entries without a key."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield (*path, str(key)), inner
            yield from entries_of(inner, (*path, str(key)))
    elif isinstance(value, list):
        for inner in value:
            if path and not isinstance(inner, (Mapping, list)):
                yield path, inner
            yield from entries_of(inner, path)
