"""What a person sees while a model trains: a bar with the time left, or plain lines where there is no terminal."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from .budget import TimeBudget

SECONDS_BETWEEN_LINES = 15
# Of what is logged, what is shown, and how
FIGURES = {
    "loss": "loss {:.3f}",
    "grad_norm": "gradient {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "expert_max_load": "busiest expert {:.1f}x",
}


class Meter:
    """One task on its way from 0 to 1.

    Args:
        title: what is being done.
        console: a terminal gets a bar, anything else a line every 15 seconds.
        start: where the task stands now; the speed is measured from here.
    """

    def __init__(self, title: str, console: Console, *, start: float = 0.0):
        self.title, self.console, self.start = title, console, start
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if console.is_terminal:
            columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
            self.bar = Progress(TextColumn("{task.description}"), *columns, console=console)
            self.task = self.bar.add_task(title, total=1.0, figures="")
            self.bar.update(self.task, completed=start)
            self.bar.start()

    def update(self, progress: float, figures: str = "") -> None:
        """Show that the task has come to `progress`, from 0 to 1."""
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=progress, figures=figures)
        elif now - self.last_line >= SECONDS_BETWEEN_LINES and progress > self.start:
            self.last_line = now
            minutes_left = (now - self.started) * (1 - progress) / (progress - self.start) / 60
            note = f", {figures}" if figures else ""
            line = f"{self.title} {100 * progress:3.0f} %, {minutes_left:.1f} min left{note}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


class ProgressReport(TrainerCallback):
    """Shows training, and evaluation outside training, on the main process.

    Args:
        budget: when given, progress is the part of its time that is used; else the part of the steps that are done.
        console: where to write; by default the standard error stream.
    """

    def __init__(self, budget: TimeBudget | None = None, console: Console | None = None):
        self.budget = budget
        self.console = console or Console(stderr=True)
        self._training: Meter | None = None
        self._evaluation: Meter | None = None
        self._batches = 0
        self._figures = ""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._training = Meter("training", self.console, start=self._trained(state))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            figures = [FIGURES[name].format(float(value)) for name, value in logs.items() if name in FIGURES]
            self._figures = ", ".join([f"step {state.global_step:,}", *figures])

    def on_step_end(self, args, state, control, **kwargs):
        if self._training:
            self._training.update(self._trained(state), self._figures)

    def on_train_end(self, args, state, control, **kwargs):
        if self._training:
            self._training.close()
            self._training = None

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self._training or not state.is_world_process_zero:
            return
        if self._evaluation is None:
            self._evaluation, self._batches = Meter("evaluation", self.console), 0
        self._batches += 1
        self._evaluation.update(self._batches / len(eval_dataloader))

    def on_evaluate(self, args, state, control, **kwargs):
        if self._evaluation:
            self._evaluation.close()
            self._evaluation = None

    def _trained(self, state) -> float:
        return self.budget.progress if self.budget else state.global_step / max(state.max_steps, 1)
