"""Training for a given time: the schedule follows the clock, so that a slower machine still ends on time."""

import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from .buckets import LengthBucketSampler

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


class TimeBudget(TrainerCallback, ExportableState):
    """Stops training when its time is spent, and tells the schedule how much of it is.

    The time used so far is part of every checkpoint (Trainer writes `state()` into trainer_state.json), so that a
    run that is resumed has only the rest left. All processes of a distributed run follow the slowest one.

    Args:
        minutes: how long to train, evaluation and saving included as far as Trainer does them between two steps.
        clock: "wall", or "process": the time all threads of this process spent on a core, which other programs on the
            machine do not change.
        warmup_ratio: the part of the budget during which the learning rate rises from 0.

    Raises:
        ValueError: a budget that is not above 0, a warm-up outside `[0, 1)`, an unknown clock.
    """

    def __init__(self, minutes: float, *, clock: Literal["wall", "process"] = "wall", warmup_ratio: float = 0.02):
        if not minutes > 0:
            raise ValueError(f"`minutes` must be above 0, got {minutes}.")
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"`warmup_ratio` must be at least 0 and below 1, got {warmup_ratio}.")
        if clock not in CLOCKS:
            raise ValueError(f"`clock` must be one of {', '.join(CLOCKS)}, got {clock!r}.")
        self.seconds = 60 * minutes
        self.warmup_ratio = warmup_ratio
        self.clock = clock
        self.used = 0.0  # seconds by `clock`, up to the last finished step
        self.core_seconds = 0.0  # the same by the process clock, whatever `clock` is; of this process alone
        self._started = {name: read() for name, read in CLOCKS.items()}

    @property
    def progress(self) -> float:
        """The part of the budget that is used, from 0 to 1."""
        return min(1.0, self.used / self.seconds)

    def learning_rate_factor(self, step: int | None = None) -> float:
        """Linear warm-up, then half a cosine down to 0 (arXiv:1608.03983), over time instead of steps."""
        if self.progress < self.warmup_ratio:
            return self.progress / self.warmup_ratio
        return 0.5 * (1 + math.cos(math.pi * (self.progress - self.warmup_ratio) / (1 - self.warmup_ratio)))

    def state(self) -> dict:
        return {"args": {}, "attributes": {"used": self.used, "core_seconds": self.core_seconds}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.used, self.core_seconds = saved.get("used", 0.0), saved.get("core_seconds", 0.0)
        used = {"process": self.core_seconds, self.clock: self.used}
        self._started = {name: read() - used.get(name, 0.0) for name, read in CLOCKS.items()}

    def on_step_end(self, args, state, control, **kwargs):
        self.used = agree(CLOCKS[self.clock]() - self._started[self.clock], args.device)
        self.core_seconds = CLOCKS["process"]() - self._started["process"]
        if self.used >= self.seconds:
            control.should_training_stop = True
            control.should_save = True


class ClockedTrainer(Trainer):
    """A Trainer whose learning rate follows a `TimeBudget`.

    Args:
        budget: the budget to follow; with None the schedule is the one that the training arguments name.
    """

    def __init__(self, *, budget: TimeBudget | None = None, callbacks: Sequence[TrainerCallback] = (), **kwargs: Any):
        # The budget comes first: the other callbacks read from it
        super().__init__(callbacks=[*([budget] if budget else []), *callbacks], **kwargs)
        self.budget = budget

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.budget is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = optimizer or self.optimizer  # made by Trainer before it asks for the schedule
        self.lr_scheduler = LambdaLR(optimizer, self.budget.learning_rate_factor)  # type: ignore[arg-type]
        self._created_lr_scheduler = True
        return self.lr_scheduler


class BudgetedTrainer(ClockedTrainer, Seq2SeqTrainer):
    """A Seq2SeqTrainer whose learning rate follows a `TimeBudget`, with batches of like length."""

    def _get_train_sampler(self, train_dataset=None) -> LengthBucketSampler:
        examples = self.train_dataset if train_dataset is None else train_dataset
        lengths = [(len(example["input_ids"]), len(example["labels"])) for example in examples]
        # What one optimizer step sees, on all processes: they wait for each other, so their batches are of like length
        batch_size = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthBucketSampler(lengths, batch_size, seed=self.args.seed)


def agree(value: float, device: torch.device) -> float:
    """The largest `value` of all processes: decisions made by it are the same everywhere."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    agreed = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
    return agreed.item()
