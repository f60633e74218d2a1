"""Merge a LoRA adapter into the model it was trained on: one ordinary checkpoint, checked to compute the same.

python finetune/merge_lora.py --adapter runs/sentiment-lora --output_dir runs/sentiment
python finetune/merge_lora.py --adapter runs/sentiment-lora --base path/to/bert --output_dir runs/sentiment
"""

from dataclasses import dataclass, field

from variform.training.arguments import parse_recipe
from variform.training.merging import merge_adapter
from variform.training.run import run_script


@dataclass
class MergeArguments:
    """What is merged, and where to."""

    adapter: str = field(metadata={"help": "The output folder of a run with `--use_peft true`."})
    output_dir: str = field(metadata={"help": "The folder to write: a new one."})
    base: str | None = field(default=None, metadata={"help": "The model under the adapter, where it has moved since."})


def main(argv: list[str]) -> int:
    """Merge and compare; returns the exit status."""
    (task,) = parse_recipe([MergeArguments], argv, description=__doc__)
    difference = merge_adapter(task.adapter, task.output_dir, base=task.base)
    print(
        f"Merged into {task.output_dir}: outputs differ from the adapter's by {difference:.1e} of the largest at most."
    )
    return 0


if __name__ == "__main__":
    run_script(main)
