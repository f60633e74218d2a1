"""A signal ends the step, saves, and is handed back."""

import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from variform.training import interruption as module
from variform.training.interruption import SaveOnInterrupt

ARGS = SimpleNamespace(device=torch.device("cpu"))
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers():
    """Those of a process in the foreground; those of the test run are back in place afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where a shell started the tests in the background
    yield {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def training():
    """The callback during training."""
    callback = SaveOnInterrupt()
    callback.on_train_begin(ARGS, None, TrainerControl())
    return callback


def ask(callback, event="on_step_end", epoch=0.5):
    control = TrainerControl()
    getattr(callback, event)(ARGS, SimpleNamespace(epoch=epoch), control)
    return control


def test_nothing_happens_without_a_signal(training):
    control = ask(training)
    assert not control.should_save and not control.should_training_stop and not training.interrupted


def test_a_save_that_was_asked_for_stays_asked_for(training):
    control = TrainerControl(should_save=True)
    training.on_step_end(ARGS, SimpleNamespace(epoch=0.5), control)
    assert control.should_save


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_at_the_end_of_the_step(training, number):
    signal.raise_signal(number)
    control = ask(training)
    assert control.should_save and control.should_training_stop and training.interrupted


def test_usr1_saves_once_and_goes_on(training):
    signal.raise_signal(signal.SIGUSR1)
    first, second = ask(training), ask(training)
    assert first.should_save and not first.should_training_stop
    assert not second.should_save and not training.interrupted


def test_a_signal_during_evaluation_is_acted_on_after_it(training):
    signal.raise_signal(signal.SIGTERM)
    assert ask(training, "on_evaluate").should_training_stop


def test_an_evaluation_outside_training_is_not_training():
    assert not ask(SaveOnInterrupt(), "on_evaluate").should_save


def test_the_middle_of_an_epoch_is_not_its_end(training):
    signal.raise_signal(signal.SIGTERM)
    ask(training)
    control = TrainerControl(should_evaluate=True, should_save=True, should_log=True)
    training.on_epoch_end(ARGS, SimpleNamespace(epoch=0.5), control)
    assert not control.should_evaluate and not control.should_save and not control.should_log
    control = TrainerControl(should_evaluate=True, should_save=True)
    training.on_epoch_end(ARGS, SimpleNamespace(epoch=1.0), control)
    assert control.should_evaluate and control.should_save


def test_a_second_signal_stops_at_once(training, monkeypatch):
    monkeypatch.setattr(module, "ECHO_SECONDS", -1.0)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_the_same_press_of_a_key_may_arrive_twice(training):
    """A terminal tells every process of its group, and a launcher passes it on."""
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    assert ask(training).should_training_stop


def test_after_training_the_signals_are_what_they_were(handlers, training):
    ask(training, "on_train_end")
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


def test_a_signal_that_came_too_late_is_handed_on(handlers):
    callback = SaveOnInterrupt()
    with pytest.raises(KeyboardInterrupt), callback.listening():
        callback.on_train_begin(ARGS, None, TrainerControl())
        callback.on_train_end(ARGS, None, TrainerControl())
        signal.raise_signal(signal.SIGINT)  # while the final model is saved
    assert signal.getsignal(signal.SIGINT) is handlers[signal.SIGINT]


def test_a_signal_before_training_is_acted_on_in_it():
    callback = SaveOnInterrupt()
    with callback.listening():
        signal.raise_signal(signal.SIGTERM)
        callback.on_train_begin(ARGS, None, TrainerControl())
        assert ask(callback).should_training_stop
