"""A signal loses nothing: the step is finished on every process, the state saved, and the same command goes on from there.

| signal | what happens at the end of the step |
|---|---|
| SIGINT (Ctrl-C), SIGTERM | a checkpoint is saved and training stops; a second signal stops the process at once |
| SIGUSR1 | a checkpoint is saved and training goes on |
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from .budget import agree

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVE_SIGNAL = signal.SIGUSR1
# A terminal tells every process, and a launcher passes on what it was told: the same press of Ctrl-C, twice
ECHO_SECONDS = 1.0


class SaveOnInterrupt(TrainerCallback):
    """Acts on signals where a step ends, and nowhere else: in the middle of one, random numbers have been drawn already.

    It is enough that one process was told, and no matter when each was: at the end of every step all agree on what to do.
    After an evaluation they ask again. Trainer's `enable_jit_checkpoint` saves where each process happens to be.

    Attributes:
        interrupted: whether training was stopped this way.
    """

    def __init__(self):
        self.interrupted = False
        self._save = self._stop = False
        self._told: tuple[int, float] | None = None  # which signal stops this run, and when it came
        self._previous: dict[int, Any] = {}
        self._training = self._only_training = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals count from here on, not only during training; one that came too late to act on is handed on at the end.

        Raises:
            KeyboardInterrupt: at the end, for a late Ctrl-C; a late SIGTERM ends the process.
        """
        self._install()
        try:
            yield
        finally:
            self._uninstall()

    def on_train_begin(self, args, state, control, **kwargs):
        self.interrupted, self._training = False, True
        if not self._previous:
            self._only_training = True
            self._install()

    def on_step_end(self, args, state, control, **kwargs):
        self._act(args, control)

    def on_evaluate(self, args, state, control, **kwargs):
        if self._training:
            self._act(args, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.interrupted and state.epoch != int(state.epoch):
            # Trainer takes it for the end of an epoch, and would evaluate in the middle of one
            control.should_evaluate = control.should_save = control.should_log = False

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False
        if self._only_training:
            self._only_training = False
            self._uninstall()

    def _act(self, args, control) -> None:
        wanted = agree(2 * self._stop + self._save, args.device)
        self._save = False
        control.should_save |= wanted > 0
        if wanted >= 2:
            self.interrupted = control.should_training_stop = True

    def _install(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other one is told of signals
            self._previous = {number: signal.signal(number, self._remember) for number in (*STOP_SIGNALS, SAVE_SIGNAL)}

    def _uninstall(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        late = self._told if not self.interrupted else None
        self._previous, self._save, self._stop, self._told = {}, False, False, None
        if late:
            signal.raise_signal(late[0])

    def _remember(self, number, frame):
        if number == SAVE_SIGNAL:
            self._save = True
        elif self._told is None:
            self._stop, self._told = True, (number, time.monotonic())
        elif time.monotonic() - self._told[1] > ECHO_SECONDS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)


class SaveAtEpochEnd(TrainerCallback):
    """A save that falls on the last step of an epoch waits for what Trainer does at the epoch's end.

    Else a run that is resumed there would miss the evaluation, its log line and the random numbers it drew.
    """

    def __init__(self):
        self.waiting = False

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and state.epoch == int(state.epoch):
            control.should_save, self.waiting = False, True

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self.waiting
        self.waiting = False
