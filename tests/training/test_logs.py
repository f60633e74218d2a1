"""The log of a run: one history however often it is stopped; and its curves."""

import json

import pytest
from transformers import TrainerControl, TrainerState

from variform.report.curves import draw_curves, is_curve, read_curves, read_log
from variform.training.logs import RunLog


class Args:
    def __init__(self, folder):
        self.output_dir = str(folder)


def write(folder, steps, *, start=0, loss=2.0):
    """What a callback writes of a run that begins after step `start`."""
    log, state, args = RunLog(), TrainerState(global_step=start, is_world_process_zero=True), Args(folder)
    log.on_train_begin(args, state, TrainerControl())
    for step in steps:
        state.global_step, state.num_input_tokens_seen = step, 100 * step
        log.on_log(args, state, TrainerControl(), logs={"loss": loss / step, "grad_norm": 1.0})
    return log


def test_a_resumed_run_drops_what_comes_again(tmp_path):
    write(tmp_path, [1, 2, 3])
    write(tmp_path, [3, 4], start=2, loss=9.0)
    lines = read_log(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 2.0), (2, 1.0), (3, 3.0), (4, 2.25)]


def test_the_line_that_sums_up_a_stopped_run_goes_and_those_of_its_steps_stay(tmp_path):
    """Where Trainer counts tokens, the lines of steps tell the time too."""
    log = write(tmp_path, [])
    for step, logs in ((1, {"loss": 2.0, "train_runtime": 1.0}), (1, {"train_loss": 2.0, "train_runtime": 1.0})):
        log.on_log(Args(tmp_path), TrainerState(global_step=step), TrainerControl(), logs=logs)
    write(tmp_path, [2], start=1)
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path)] == [(1, 2.0), (2, 1.0)]


def test_a_run_from_the_start_begins_a_new_log(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert [line["step"] for line in read_log(tmp_path)] == [1]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    assert [line["step"] for line in read_log(tmp_path)] == [1]
    write(tmp_path, [2], start=1)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


def test_the_speed_is_that_of_the_tokens_since_the_last_line(tmp_path, monkeypatch):
    clock = iter([0.0, 2.0, 6.0])
    monkeypatch.setattr("variform.training.logs.time.monotonic", lambda: next(clock))
    write(tmp_path, [1, 2])
    assert [line["tokens_per_second"] for line in read_log(tmp_path)] == [50.0, 25.0]


def test_curves_part_training_from_held_out_and_share_a_panel():
    log = [
        {"step": 1, "loss": 3.0, "learning_rate": 0.1, "epoch": 0.1},
        {"step": 2, "eval_loss": 2.5, "eval_accuracy": 50.0, "eval_runtime": 1.0, "eval_samples_per_second": 4.0},
        {"step": 2, "train_runtime": 9.0},
    ]
    assert read_curves(log) == {
        "loss": {"training": ([1], [3.0]), "held out": ([2], [2.5])},
        "learning rate": {"training": ([1], [0.1])},
        "accuracy": {"held out": ([2], [50.0])},
    }


def test_what_was_measured_at_one_step_is_no_curve():
    log = [{"step": step, "loss": 3.0 / step} for step in (1, 2)] + 2 * [
        {"step": 2, "eval_loss": 2.5, "eval_f1": 50.0}
    ]
    assert [name for name, sides in read_curves(log).items() if is_curve(sides)] == ["loss"]


def test_a_picture_is_drawn_where_something_was_logged(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures are an extra")
    assert draw_curves(tmp_path) is None
    write(tmp_path, [1, 2, 3])
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 3, "eval_loss": 1.5}) + "\n")
    path = draw_curves(tmp_path)
    assert path == tmp_path / "plots" / "curves.png" and path.read_bytes()[:4] == b"\x89PNG"
