"""A run of a script whose weights are sharded: from its arguments to the plain loop, and to one whole model at the end."""

from pathlib import Path
from typing import Any

from torch import distributed
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..conversion.checkpoint import whole_folder
from .parallel import Parallel, Recipe, join_processes, to_one_process, train_in_parallel

START, WHOLE = "start", "whole"  # folders in the run's own


def train_sharded(
    parallel: Parallel,
    training: TrainingArguments,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    collate: Any,
    auto_class: Any,
) -> Path:
    """Train in all processes with each holding a part of the weights; Trainer does so on accelerators only.

    The model to start from is saved first, once, in `output_dir/start`; the whole trained model comes to `output_dir/whole`.

    Args:
        parallel: the layout.
        training: heeded are steps, batch size, rate, schedule, decay, clipping, seed and saving.
        model: what to start from, the same in every process.
        dataset, collate: as for `train_in_parallel`.

    Returns:
        The folder of the whole model.

    Raises:
        ValueError: for what the plain loop does not do, by field.
    """
    refuse_unheeded(training, model)
    rank, world = join_processes()
    folder = Path(str(training.output_dir))
    if rank == 0 and not (folder / START).exists():
        with whole_folder(folder / START) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    distributed.barrier()
    readers = 1 if parallel == "tp" else world
    recipe = Recipe(
        parallel,
        steps=training.max_steps,
        batch_size=training.per_device_train_batch_size * readers,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        schedule=str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)),
        warmup_steps=training.get_warmup_steps(training.max_steps),
        seed=training.seed,
        save_steps=int(training.save_steps),
        keep=training.save_total_limit or 2,
    )
    train_in_parallel(folder / START, dataset, folder, recipe, auto_class=auto_class, collate=collate)
    distributed.barrier()
    distributed.destroy_process_group()  # reading a sharded model is the work of all who are in one, or of one alone
    if rank == 0 and not (folder / WHOLE).exists():
        with whole_folder(folder / WHOLE) as temporary:
            to_one_process(folder / f"checkpoint-{recipe.steps}", temporary)
            tokenizer.save_pretrained(temporary)
    return folder / WHOLE


def refuse_unheeded(training: TrainingArguments, model: Any) -> None:
    """Raises ValueError for arguments that would change a run under Trainer and have no place in the plain loop."""
    if training.max_steps < 1:
        raise ValueError("`parallel` needs `max_steps`: its loop counts steps, not epochs or minutes.")
    if training.gradient_accumulation_steps > 1:
        raise ValueError("`parallel` takes whole batches: set `gradient_accumulation_steps` to 1, or add processes.")
    if hasattr(model, "peft_config"):
        raise ValueError("`parallel` trains whole models: leave `use_peft` out; an adapter is small enough for DDP.")
