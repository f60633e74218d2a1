"""A grid of runs at equal FLOPs: which choice learns more for the same arithmetic."""

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from torch import distributed

from ..report.costs import count_costs
from .arguments import fields_of, parse_recipe
from .checkpoints import is_trained
from .models import load_tokenizer, make_config
from .options import ModelArguments

SWEEP_FILE = "sweep.json"
NO_SWEEP = "none"  # for the runs of a grid, whose recipe may hold `sweep`
# What the grid itself decides
NOT_SWEPT = ("sweep", "set", "model", "output_dir", "max_steps", "num_train_epochs", "minutes", "dry_run", "resume")
REPORT = ("choice", "flops_of_a_step")  # what the grid knows of a run; all else is the run's own


class Choice(NamedTuple):
    """One combination of the grid."""

    values: dict[str, str]
    flags: list[str]

    @property
    def name(self) -> str:
        return "-".join(f"{name}={value}" for name, value in self.values.items()).replace("/", "_").replace(" ", "")


def sweep(
    main: Callable[[list[str]], int],
    argv: Sequence[str],
    parts: Sequence[Any],
    *,
    length: str,
    read_tokenizer: Callable[[Any, Any, ModelArguments], Any] | None = None,
) -> int:
    """Run a script once for each combination of what `--sweep` lists, and print one table.

    The first combination trains for `max_steps`; each other one for as many steps as cost the same FLOPs, of whole batches
    and of examples as long as they may be. `seed=0,1,2` in the grid gives means and deviations. The runs lie in folders below
    `output_dir`; a grid that was stopped goes on where it was by the same command.

    Args:
        main: of the script. argv: its command line. parts: what `parse_recipe` gave: the task's arguments, those of the data
            and of the model first, TrainingArguments last.
        length: which argument has the tokens of an example.
        read_tokenizer: from the first three parts; default: as the arguments of the model say.

    Returns:
        The exit status: that of the first run that failed or was stopped, else 0.

    Raises:
        ValueError: before anything is trained, for a list without `=`, a name that is neither an argument nor a field, a value
            that does not fit, and a grid without `max_steps` or of trained models.
    """
    *_, options, training = parts
    start = next(part for part in parts if isinstance(part, ModelArguments))
    if training.max_steps < 1:
        raise ValueError("`sweep` compares runs of equal FLOPs: give `max_steps`, of the first of them.")
    if start.form is None:
        raise ValueError("`sweep` needs `form`: it compares new models.")
    choices = grid(options.sweep, {name for part in parts for name in fields_of(part)}, start.set)
    folder = Path(str(training.output_dir))
    console = Console(markup=False, highlight=False, soft_wrap=True, quiet=training.process_index > 0)
    costs = []
    for choice in choices:
        given = parse_recipe([type(part) for part in parts], [*argv, *choice.flags])
        costs.append(flops_of_a_step(given, length, read_tokenizer))
    found = []
    for choice, flops in zip(choices, costs):
        steps = max(1, round(training.max_steps * costs[0] / flops))
        console.print(f"{choice.name}: {steps:,} steps of {flops / 1e9:,.3g} GFLOPs")
        if options.dry_run:
            continue
        target = folder / choice.name
        if not (is_trained(target) and (target / "metrics.json").is_file()):
            fixed = ["--sweep", NO_SWEEP, "--minutes", "0", "--output_dir", str(target), "--max_steps", str(steps)]
            status = main([*argv, *choice.flags, *fixed])
            if status:
                return status
            if distributed.is_available() and distributed.is_initialized():
                distributed.barrier()  # the main process writes what all of them read
        measured = json.loads((target / "metrics.json").read_text(encoding="utf-8"))
        if measured["steps"] != steps:
            raise ValueError(
                f"{target} holds a run of {measured['steps']:,} steps, this grid's has {steps:,}: name another `output_dir`."
            )
        found.append({"choice": choice.values, "flops_of_a_step": flops, **measured})
    if found and training.process_index == 0:
        (folder / SWEEP_FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        console.print(table(found))
    return 0


def is_swept(options: Any) -> bool:
    """Whether a grid is asked for."""
    return bool(options.sweep) and options.sweep != [NO_SWEEP]


def grid(lists: Sequence[str], arguments: set[str], changes: Sequence[str]) -> list[Choice]:
    """All combinations of `NAME=A,B,...`: names of arguments, or else fields of the form.

    Args:
        lists: the words of `--sweep`. arguments: the names that are arguments. changes: of the form, in every combination.

    Raises:
        ValueError: for a word that is no such list, a name that comes twice or is the grid's own, or a value that does.
    """
    axes: dict[str, list[str]] = {}
    for words in lists:
        name, equals, text = words.partition("=")
        values = text.split(",")
        if not name or not equals or not all(values):
            raise ValueError(f"`sweep` takes NAME=A,B,..., got {words!r}.")
        if name in axes or len(set(values)) < len(values):
            raise ValueError(
                f"`sweep {words}`: {name if name in axes else 'a value'} comes twice; each run would, too."
            )
        if name in NOT_SWEPT:
            raise ValueError(f"`sweep {words}`: `{name}` is the same for, or decided by, the whole grid.")
        axes[name] = values
    choices = []
    for combination in itertools.product(*axes.values()):
        values_of = dict(zip(axes, combination))
        flags = [word for name, value in values_of.items() if name in arguments for word in (f"--{name}", value)]
        fields = [f"{name}={value}" for name, value in values_of.items() if name not in arguments]
        choices.append(Choice(values_of, [*flags, *(["--set", *changes, *fields] if fields else [])]))
    return choices


def flops_of_a_step(parts: Sequence[Any], length: str, read_tokenizer: Callable | None) -> float:
    """FLOPs of the forward passes of a step, of examples as long as they may be."""
    task, source, start, *_, training = parts
    tokens = getattr(task, length)
    tokenizer = read_tokenizer(task, source, start) if read_tokenizer else load_tokenizer(start)
    examples = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return count_costs(make_config(start, tokenizer, {}), tokens).flops * tokens * examples


def table(found: Sequence[dict[str, Any]]) -> Table:
    """One row a combination, its seeds together; the first figure that a run measured is what is compared."""
    metric = next(name for name in found[0] if name not in REPORT)
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in found:
        key = tuple(value for name, value in run["choice"].items() if name != "seed")
        groups.setdefault(key, []).append(run)
    names = [name for name in found[0]["choice"] if name != "seed"]
    result = Table(
        title="Runs at equal FLOPs", caption="deviation over the seeds" if len(groups) < len(found) else None
    )
    for name in (*names, "seeds", "parameters", "steps", metric.replace("_", " ")):
        result.add_column(name, justify="left" if name in names else "right", overflow="fold")
    for key, runs in groups.items():
        values = [run[metric] for run in runs]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        figure = f"{statistics.mean(values):.3f}{spread}"
        result.add_row(*key, f"{len(runs)}", f"{runs[0]['parameters']:,}", f"{runs[0]['steps']:,}", figure)
    return result
