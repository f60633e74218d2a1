"""How long the steps of a training take, whatever else the run does."""

import time

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class StepTimer(TrainerCallback, ExportableState):
    """Sums the time of the steps: forward, backward and optimizer; saving, evaluation and start-up are left out.

    What was measured so far is part of every checkpoint, so that a run that is resumed reports all of its steps.

    Attributes:
        steps: how many were timed.
        seconds: by the wall clock.
        process_seconds: that all threads of this process spent on a core, which other programs hardly change.
    """

    def __init__(self):
        self.steps = 0
        self.seconds = self.process_seconds = 0.0
        self._began = (0.0, 0.0)

    def state(self) -> dict:
        attributes = {name: getattr(self, name) for name in ("steps", "seconds", "process_seconds")}
        return {"args": {}, "attributes": attributes}

    def restore(self, state) -> None:
        """Take over what a `TrainerState` keeps of an earlier part of the run."""
        for name, value in state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).items():
            setattr(self, name, value)

    def on_train_begin(self, args, state, control, **kwargs):
        self.restore(state)

    def on_train_end(self, args, state, control, **kwargs):
        # For the state of the finished run, which Trainer writes without asking the callbacks again
        state.stateful_callbacks[type(self).__name__] = self.state()

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = (time.perf_counter(), time.process_time())

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        self.seconds += time.perf_counter() - self._began[0]
        self.process_seconds += time.process_time() - self._began[1]
