"""Steps are timed, and nothing else; the sums survive an interruption."""

import pytest
from transformers import TrainerState

from variform.training import speed
from variform.training.speed import StepTimer


@pytest.fixture
def clocks(monkeypatch):
    """Two clocks that stand still until a test moves them on."""
    now = {"perf_counter": 100.0, "process_time": 50.0}
    for name in now:
        monkeypatch.setattr(speed.time, name, lambda name=name: now[name])
    return now


def step(timer: StepTimer, clocks: dict, wall: float, process: float) -> None:
    timer.on_step_begin(None, None, None)
    clocks["perf_counter"] += wall
    clocks["process_time"] += process
    timer.on_step_end(None, None, None)


def test_only_the_time_of_steps_counts(clocks):
    timer = StepTimer()
    step(timer, clocks, 3.0, 2.0)
    clocks["perf_counter"] += 1000  # evaluation, say
    step(timer, clocks, 4.0, 3.0)
    assert (timer.steps, timer.seconds, timer.process_seconds) == (2, 7.0, 5.0)


def test_a_resumed_run_adds_to_what_was_measured(clocks):
    first, state = StepTimer(), TrainerState()
    step(first, clocks, 3.0, 2.0)
    first.on_train_end(None, state, None)
    second = StepTimer()
    second.on_train_begin(None, state, None)
    step(second, clocks, 1.0, 1.0)
    assert (second.steps, second.seconds, second.process_seconds) == (2, 4.0, 3.0)
