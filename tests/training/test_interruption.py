"""Ctrl-C ends the step, saves, and hands the signal back."""

import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from variform.training.interruption import SaveOnInterrupt, last_checkpoint

ARGS = SimpleNamespace(device=torch.device("cpu"))


@pytest.fixture
def training():
    """The callback during training; the handler of the test run is back in place afterwards."""
    before = signal.getsignal(signal.SIGINT)
    callback = SaveOnInterrupt()
    callback.on_train_begin(ARGS, None, TrainerControl())
    yield callback
    signal.signal(signal.SIGINT, before)


def test_nothing_happens_without_a_signal(training):
    control = TrainerControl()
    training.on_step_end(ARGS, None, control)
    assert not control.should_save and not control.should_training_stop and not training.interrupted


def test_a_signal_saves_and_stops_at_the_end_of_the_step(training):
    signal.raise_signal(signal.SIGINT)
    control = TrainerControl()
    training.on_step_end(ARGS, None, control)
    assert control.should_save and control.should_training_stop and training.interrupted


def test_a_second_signal_stops_at_once(training):
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_after_training_the_signal_is_what_it_was():
    before = signal.getsignal(signal.SIGINT)
    callback = SaveOnInterrupt()
    callback.on_train_begin(ARGS, None, TrainerControl())
    callback.on_train_end(ARGS, None, TrainerControl())
    assert signal.getsignal(signal.SIGINT) is before


def test_the_last_checkpoint_is_the_highest_step_that_was_finished(tmp_path):
    for name in ("checkpoint-90", "checkpoint-100", "checkpoint-110"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-90", "checkpoint-100"):
        (tmp_path / name / "trainer_state.json").write_text("{}", encoding="utf-8")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


def test_a_new_folder_has_no_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / "new") is None
