"""What is shown where there is no terminal, and where there is one."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from variform.training import progress as module
from variform.training.budget import TimeBudget
from variform.training.progress import ProgressReport


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def report(budget=None, *, terminal=False):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    return ProgressReport(budget, console)


def state(step, *, main=True):
    return TrainerState(global_step=step, max_steps=100, is_world_process_zero=main)


def test_a_line_every_quarter_of_a_minute_with_the_time_left(clock):
    shown = report()
    shown.on_train_begin(None, state(0), TrainerControl())
    shown.on_log(None, state(10), TrainerControl(), logs={"loss": 2.5})
    for step in range(1, 41):
        clock.now += 1.0
        shown.on_step_end(None, state(step), TrainerControl())
    assert shown.console.file.getvalue().splitlines() == [
        "training  15 %, 1.4 min left, step 10, loss 2.500",
        "training  30 %, 1.2 min left, step 10, loss 2.500",
    ]


def test_time_left_is_measured_from_where_a_resumed_run_began(clock):
    shown = report()
    shown.on_train_begin(None, state(80), TrainerControl())
    clock.now += 60
    shown.on_step_end(None, state(90), TrainerControl())
    assert shown.console.file.getvalue() == "training  90 %, 1.0 min left\n"


def test_a_budget_counts_time_not_steps(clock):
    budget = TimeBudget(4)
    shown = report(budget)
    shown.on_train_begin(None, state(0), TrainerControl())
    clock.now, budget.used = 60, 60
    shown.on_step_end(None, state(3), TrainerControl())
    assert shown.console.file.getvalue() == "training  25 %, 3.0 min left\n"


def test_evaluation_is_counted_in_batches(clock):
    shown = report()
    for _ in range(2):
        shown.on_prediction_step(None, state(9), TrainerControl(), eval_dataloader=range(4))
        clock.now += 20
    shown.on_evaluate(None, state(9), TrainerControl())
    assert shown.console.file.getvalue() == "evaluation  50 %, 0.3 min left\n"


def test_only_the_main_process_shows_anything(clock):
    shown = report()
    shown.on_train_begin(None, state(0, main=False), TrainerControl())
    clock.now += 60
    shown.on_step_end(None, state(50, main=False), TrainerControl())
    assert shown.console.file.getvalue() == ""


def test_a_terminal_gets_a_bar():
    shown = report(terminal=True)
    shown.on_train_begin(None, state(0), TrainerControl())
    shown.on_step_end(None, state(50), TrainerControl())
    shown.on_train_end(None, state(50), TrainerControl())
    assert "training" in shown.console.file.getvalue() and "50%" in shown.console.file.getvalue()
