"""A grid of runs at equal FLOPs: which choice learns more for the same arithmetic."""

import copy
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from ..report.costs import count_costs
from .arguments import fields_of
from .checkpoints import is_trained
from .models import load_tokenizer, make_config
from .options import ModelArguments

SWEEP_FILE = "sweep.json"
NO_SWEEP = "none"  # for the runs of a grid, whose recipe may hold `sweep`


class Choice(NamedTuple):
    """One combination of the grid."""

    values: dict[str, str]
    flags: list[str]

    @property
    def name(self) -> str:
        return "-".join(f"{name}={value}" for name, value in self.values.items()).replace("/", "_").replace(" ", "")


def sweep(main: Callable[[list[str]], int], argv: Sequence[str], parts: Sequence[Any], *, length: int) -> int:
    """Run a script once for each combination of what `--sweep` lists, and print one table.

    The first combination trains for `max_steps`; each other one for as many steps as cost the same FLOPs, counted for
    sequences of `length` tokens. `seed=0,1,2` in the grid gives means and deviations. The runs lie in folders below
    `output_dir`; a grid that was stopped goes on where it was by the same command.

    Args:
        main: of the script. argv: its command line. parts: what `parse_recipe` gave, TrainingArguments last.
        length: tokens of an example.

    Returns:
        The exit status: that of the first run that failed or was stopped, else 0.

    Raises:
        ValueError: for a list without `=`, or a grid without `max_steps` or of trained models.
    """
    *_, options, training = parts
    start = next(part for part in parts if isinstance(part, ModelArguments))
    if training.max_steps < 1:
        raise ValueError("`sweep` compares runs of equal FLOPs: give `max_steps`, of the first of them.")
    if start.form is None:
        raise ValueError("`sweep` needs `form`: it compares new models.")
    choices = grid(options.sweep, {name for part in parts for name in fields_of(part)}, start.set)
    folder = Path(str(training.output_dir))
    console = Console(highlight=False, soft_wrap=True, quiet=training.process_index > 0)
    costs = [flops_of(start, choice, length) for choice in choices]
    found = []
    for choice, flops in zip(choices, costs):
        steps = max(1, round(training.max_steps * costs[0] / flops))
        console.print(f"{choice.name}: {steps:,} steps of {flops / 1e6:,.1f} MFLOPs a token")
        target = folder / choice.name
        if not (is_trained(target) and (target / "metrics.json").is_file()):
            flags = ["--sweep", NO_SWEEP, "--output_dir", str(target), "--max_steps", str(steps), *choice.flags]
            status = main([*argv, *flags])
            if status:
                return status
        measured = json.loads((target / "metrics.json").read_text(encoding="utf-8"))
        found.append({"choice": choice.values, "flops_per_token": flops, **measured})
    (folder / SWEEP_FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    console.print(table(found))
    return 0


def is_swept(options: Any) -> bool:
    """Whether a grid is asked for."""
    return bool(options.sweep) and options.sweep != [NO_SWEEP]


def grid(lists: Sequence[str], arguments: set[str], changes: Sequence[str]) -> list[Choice]:
    """All combinations of `NAME=A,B,...`: names of arguments, or else fields of the form."""
    axes = []
    for words in lists:
        name, equals, values = words.partition("=")
        if not equals or not values:
            raise ValueError(f"`sweep` takes NAME=A,B,..., got {words!r}.")
        axes.append([(name, value) for value in values.split(",")])
    choices = []
    for combination in itertools.product(*axes):
        flags = [word for name, value in combination if name in arguments for word in (f"--{name}", value)]
        fields = [f"{name}={value}" for name, value in combination if name not in arguments]
        if fields:
            flags += ["--set", *changes, *fields]
        choices.append(Choice(dict(combination), flags))
    return choices


def flops_of(start: ModelArguments, choice: Choice, length: int) -> float:
    """FLOPs that a token takes in a forward."""
    changed = copy.copy(start)
    if "--set" in choice.flags:
        changed.set = choice.flags[choice.flags.index("--set") + 1 :]
    for name in ("form", "tokenizer"):
        setattr(changed, name, choice.values.get(name, getattr(start, name)))
    return count_costs(make_config(changed, load_tokenizer(changed), {}), length).flops


def table(found: Sequence[dict[str, Any]]) -> Table:
    """One row a combination, its seeds together; the first figure that a run measured is what is compared."""
    metric = next(name for name in found[0] if name not in ("choice", "flops_per_token"))
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in found:
        key = tuple(value for name, value in run["choice"].items() if name != "seed")
        groups.setdefault(key, []).append(run)
    names = [name for name in found[0]["choice"] if name != "seed"]
    result = Table(
        title="Runs at equal FLOPs", caption="deviation over the seeds" if len(groups) < len(found) else None
    )
    for name in (*names, "seeds", "parameters", "steps", metric.replace("_", " ")):
        result.add_column(name, justify="left" if name in names else "right")
    for key, runs in groups.items():
        values = [run[metric] for run in runs]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        figure = f"{statistics.mean(values):.3f}{spread}"
        result.add_row(*key, f"{len(runs)}", f"{runs[0]['parameters']:,}", f"{runs[0]['steps']:,}", figure)
    return result
