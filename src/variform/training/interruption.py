"""Ctrl-C loses nothing: the step is finished, the state saved, and the same command goes on from there."""

import signal
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .budget import agree


class SaveOnInterrupt(TrainerCallback):
    """On the first Ctrl-C, Trainer saves a checkpoint at the end of the step and stops; a second one stops at once.

    Attributes:
        interrupted: whether training was stopped this way.
    """

    def __init__(self):
        self.interrupted = False
        self._previous_handler = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.interrupted = False
        self._previous_handler = signal.signal(signal.SIGINT, self._remember)

    def on_step_end(self, args, state, control, **kwargs):
        self.interrupted = bool(agree(float(self.interrupted), args.device))
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self._previous_handler or signal.default_int_handler)

    def _remember(self, number, frame):
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def last_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint with the highest step that Trainer finished writing; None when there is none.

    Trainer writes trainer_state.json last: a folder without it was cut off in the middle of a save.
    """
    finished = [path.parent for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return str(max(finished, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if finished else None
