"""The recipe that a run leaves: what trained a model, and whether a command would have trained the same."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from .arguments import fields_of
from .data.arguments import DataArguments
from .facts import OF_THE_OPTIMIZER
from .lora import LoraArguments
from .options import ModelArguments

FILE = "train_config.yaml"
# What decides what a trained model is, and with it what its card may say ...
DECIDED_BY = (
    *(item.name for part in (ModelArguments, LoraArguments, DataArguments) for item in fields(part)),
    *("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "optim"),
    *("lr_scheduler_type", "warmup_steps", "max_grad_norm", *OF_THE_OPTIMIZER),
)
# ... but for what is about judging and loading; and another length, which is told and no reason to stop
OF_JUDGING = (
    "eval_files",
    "eval_split",
    "max_eval_examples",
    "skip_bad_rows",
    "attn_implementation",
    "trust_remote_code",
)
LENGTHS = ("minutes", "max_steps", "num_train_epochs")


def given_of(parts: Sequence[Any]) -> dict[str, Any]:
    """All arguments of the filled dataclasses that are not left out."""
    values = {name: value for part in parts for name, value in fields_of(part).items()}
    return {name: value for name, value in values.items() if value not in (None, [])}


def write_train_config(folder: Path, command: Sequence[str], given: Mapping[str, Any]) -> None:
    """All arguments as a recipe that `--config` takes, below the command as a comment."""
    comment = "".join(f"# {line}\n" for line in shlex.join(command).split("\n"))
    recipe = yaml.safe_dump(dict(given), sort_keys=False, allow_unicode=True)
    (folder / FILE).write_text(comment + recipe, encoding="utf-8")


def read_train_config(folder: Path) -> tuple[list[str], dict[str, Any]] | None:
    """The command that trained a model, and all of its arguments; None where the folder does not tell."""
    if not (folder / FILE).is_file():
        return None
    text = (folder / FILE).read_text(encoding="utf-8")
    command = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    return shlex.split("\n".join(command)), yaml.safe_load(text)


def refuse_other_training(
    folder: Path, before: Mapping[str, Any], given: Mapping[str, Any], allowed: Sequence[str]
) -> list[str]:
    """Refuses to judge a model again by a command that would have trained another one.

    Args:
        folder: of the model. before: the arguments of the command that trained it. given: those of this one.
        allowed: names of which it does not matter.

    Returns:
        Notes for a person: that the model was trained for another length.

    Raises:
        ValueError: by field, with both values.
    """
    names = [name for name in DECIDED_BY if before.get(name) != given.get(name)]
    names = [name for name in names if name not in (*OF_JUDGING, *allowed)]
    if names:
        changes = "; ".join(f"{name}: then {before.get(name)}, now {given.get(name)}" for name in names)
        raise ValueError(
            f"{folder} holds a model that was trained otherwise: {changes}. Set it back to judge that model again; "
            f"`--resume none` trains another in its place, another `output_dir` beside it, and `--resume CHECKPOINT` goes on."
        )
    others = [name for name in LENGTHS if before.get(name) != given.get(name)]
    return [f"Note: the model is one of `{name}: {before.get(name)}`, not {given.get(name)}." for name in others]
