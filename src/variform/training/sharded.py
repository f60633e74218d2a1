"""A run of a script whose weights are sharded: from its arguments to the plain loop, and to one whole model at the end."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..conversion.checkpoint import whole_folder
from ..report.curves import LOG_FILE, read_log
from .checkpoints import set_aside
from .options import RunArguments
from .parallel import Parallel, Recipe, join_processes, to_one_process, train_in_parallel

# What would change a run, and is Trainer's alone
UNHEEDED = (
    *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "label_smoothing_factor", "data_seed"),
    *("gradient_checkpointing", "torch_compile", "neftune_noise_alpha", "lr_scheduler_kwargs", "report_to"),
)
START, WHOLE = "start", "whole"  # folders in the run's own


def train_sharded(
    parallel: Parallel,
    training: TrainingArguments,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    collate: Any,
    auto_class: Any,
    options: RunArguments,
    say: Callable[[str], None],
) -> Path:
    """Train in all processes with each holding a part of the weights; Trainer does so on accelerators only.

    The model to start from is saved first, once, in `output_dir/start`; the whole trained model comes to `output_dir/whole`.

    Args:
        parallel: the layout.
        training: heeded are steps, batch size, rate, schedule, decay, clipping, seed and saving.
        model: what to start from, the same in every process.
        dataset, collate: as for `train_in_parallel`.
        options: heeded is `resume`, auto or none. say: tells a person, on the main process.

    Returns:
        The folder of the whole model.

    Raises:
        ValueError: for what the plain loop does not do, by field.
    """
    refuse_unheeded(training, options, model)
    rank, world = join_processes()
    folder = Path(str(training.output_dir))
    if rank == 0 and options.resume == "none":
        for path in set_aside(folder, -1):
            say(f"Set aside an earlier run's {path.name}.")
        for name in (START, WHOLE):
            shutil.rmtree(folder / name, ignore_errors=True)
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
    log = StepLog(folder if rank == 0 else None, recipe.steps, training.logging_steps, say)
    train_in_parallel(folder / START, dataset, folder, recipe, auto_class=auto_class, collate=collate, on_step=log)
    distributed.barrier()
    distributed.destroy_process_group()  # reading a sharded model is the work of all who are in one, or of one alone
    if rank == 0 and not (folder / WHOLE).exists():
        with whole_folder(folder / WHOLE) as temporary:
            to_one_process(folder / f"checkpoint-{recipe.steps}", temporary)
            tokenizer.save_pretrained(temporary)
    return folder / WHOLE


class StepLog:
    """Tells the loss now and then, and writes it to `log.jsonl`; a run that goes on drops the lines that come again.

    Args:
        folder: of the run; None in processes that do not write.
        steps: of the whole run. every: between two lines, in steps or, below 1, as a part of all.
    """

    def __init__(self, folder: Path | None, steps: int, every: float, say: Callable[[str], None]):
        self.file = None if folder is None else folder / LOG_FILE
        self.steps, self.every, self.say = steps, math.ceil(every * steps if every < 1 else every), say
        self.is_first = True

    def __call__(self, step: int, loss: float) -> None:
        if self.file is None:
            return
        if self.is_first:
            if step > 1:
                self.say(f"Going on from step {step - 1}.")
            kept = [line for line in read_log(self.file) if line["step"] < step and step > 1]
            self.file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            self.is_first = False
        if step % self.every == 0 or step == self.steps:
            self.say(f"Step {step:,} of {self.steps:,}: loss {loss:.4f}.")
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "loss": loss}) + "\n")


def refuse_unheeded(training: TrainingArguments, options: RunArguments, model: Any) -> None:
    """Raises ValueError for arguments that would change a run under Trainer and have no place in the plain loop."""
    if training.max_steps < 1:
        raise ValueError("`parallel` needs `max_steps`: its loop counts steps, not epochs or minutes.")
    if training.gradient_accumulation_steps > 1:
        raise ValueError("`parallel` takes whole batches: set `gradient_accumulation_steps` to 1, or add processes.")
    if hasattr(model, "peft_config"):
        raise ValueError("`parallel` trains whole models: leave `use_peft` out; an adapter is small enough for DDP.")
    if options.resume not in ("auto", "none") or options.allow_resume_changes:
        raise ValueError(
            "`parallel` goes on from its newest checkpoint with the same recipe, or begins with `resume: none`."
        )
    plain = type(training)(output_dir=training.output_dir, use_cpu=training.use_cpu)
    for name in UNHEEDED:
        value = getattr(training, name)
        if value != getattr(plain, name):
            shown = getattr(value, "value", value)
            raise ValueError(f"`{name}={shown}` has no place in the loop of `parallel`: leave it out.")
