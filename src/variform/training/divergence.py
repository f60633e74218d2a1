"""A loss that runs away is told, or stops the run."""

import statistics
from collections.abc import Callable, Sequence

from transformers import TrainerCallback

DIVERGED_FACTOR, DIVERGED_LOGS, MEDIAN_OVER = 3.0, 5, 50


class DivergedError(ArithmeticError):
    """The loss stayed far above what it was."""


class DivergenceWatch(TrainerCallback):
    """Warns once, or stops, where the logged loss is 3 times the median of the 50 before it for 5 logs in a row."""

    def __init__(self, stop: bool, say: Callable[[str], None]):
        self.stop, self.say = stop, say

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}) and diverged([entry["loss"] for entry in state.log_history if "loss" in entry]):
            message = f"The loss has been {DIVERGED_FACTOR:g} times its median for {DIVERGED_LOGS} logs"
            if self.stop:
                raise DivergedError(
                    f"{message} at step {state.global_step}: {logs['loss']:.4g}. Lower `learning_rate`?"
                )
            self.say(f"Warning: {message}, at step {state.global_step}: {logs['loss']:.4g}.")


def diverged(losses: Sequence[float]) -> bool:
    """Whether the last 5 losses are each above 3 times the median of up to 50 before them; at the first such one only."""

    def high(end: int) -> bool:
        recent, before = losses[end - DIVERGED_LOGS : end], losses[:end][: end - DIVERGED_LOGS][-MEDIAN_OVER:]
        return len(before) >= DIVERGED_LOGS and min(recent) > DIVERGED_FACTOR * statistics.median(before)

    return high(len(losses)) and not high(len(losses) - 1)
