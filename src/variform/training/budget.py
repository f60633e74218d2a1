"""Training for a given time: the schedule follows the clock, so that a slower machine still ends on time."""

import math
import time
from typing import Literal

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

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


def agree(value: float, device: torch.device) -> float:
    """The largest `value` of all processes: decisions made by it are the same everywhere."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    agreed = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
    return agreed.item()
