"""Killed anywhere, as often as one likes, a run that goes on ends in the state of a run that was not: bit by bit, log and all.

Dropout, accumulation, a partial last step, two epochs and an evaluation between them make random numbers and places in the
data matter. The processes that are killed are forks of `children/tiny_runs.py`, which says where the points are.
"""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

CHILD = Path(__file__).parent / "children" / "tiny_runs.py"
# Between them each place where a step, an evaluation, a save, a rotation or the final save can be cut off
POINTS = [
    "2:step_begin",
    "3:mid_model",
    "3:before_commit",
    "4:mid_forward",
    "5:pre_optimizer",
    "6:save_begin",
    "6:after_model",
    "6:mid_optimizer",
    "6:after_optimizer",
    "6:before_state",
    "7:during_eval",
    "8:step_end",
    "9:mid_rotate",
    "14:before_commit",
    "14:mid_final_save",
]
TWO_PROCESS_POINTS = ["2:mid_forward:SIGKILL@1", "3:before_commit:SIGKILL", "6:mid_optimizer:SIGKILL"]
# The same places in a run of two processes, whose 8 steps take twice as many rows; the first alone writes models
POINTS_OF_BOTH = [
    "2:step_begin",
    "3:mid_forward",
    "3:pre_optimizer",
    "4:during_eval",
    "6:save_begin",
    "6:after_model",
    "6:after_optimizer",
    "6:before_state",
    "7:step_end",
]
POINTS_OF_THE_FIRST = [
    "3:mid_model",
    "3:before_commit",
    "6:mid_optimizer",
    "8:mid_rotate",
    "8:before_commit",
    "8:mid_final_save",
]


def kill(*points):
    return [f"{point}:SIGKILL" for point in points]


def run(folder: Path, jobs: dict[str, dict], timeout: float = 1800) -> dict[str, dict]:
    """Runs jobs one after another, each in a folder of its name unless it names another one."""
    filled = [{**job, "folder": str(folder / job.get("folder", name))} for name, job in jobs.items()]
    (folder / "jobs.json").write_text(json.dumps(filled))
    command = [sys.executable, CHILD, folder / "jobs.json", folder / "results.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums in the same order, and forks without threads
    subprocess.run(command, check=True, timeout=timeout, env=environment, cwd=folder)
    return dict(zip(jobs, json.loads((folder / "results.json").read_text())))


def same(result: dict, reference: dict, *, but_state: bool = False) -> None:
    """The end of one run is that of another."""
    last = result["starts"][-1]
    assert set(last["statuses"]) == {0}, last["output"]
    assert result["is_trained"]
    assert result["model"] == reference["model"]
    assert result["expert_load"] == reference["expert_load"]
    same_lines(result["log_file"], reference["log_file"])
    for told, expected in zip(result["told"], reference["told"], strict=True):
        assert told["step"] == expected["step"]
        same_lines(told["log"], expected["log"])
        assert but_state or told["hash"] == expected["hash"]


def same_lines(found: list[str], expected: list[str]) -> None:
    """Trainer's last line sums up the training; who was killed when all was trained has none."""
    steps, sums = (
        [[line for line in lines if is_sum(line) is kind] for lines in (found, expected)] for kind in (False, True)
    )
    assert steps[0] == steps[1]
    assert not sums[0] or sums[0] == sums[1]


def is_sum(line: str) -> bool:
    return "train_loss" in line


def never_without(result: dict) -> None:
    """Once a checkpoint was committed, at least one is whole whenever the run is killed."""
    counts = [len(start["whole"]) for start in result["starts"]]
    first = next(number for number, count in enumerate(counts) if count)
    assert all(counts[first:]), [start["whole"] for start in result["starts"]]


def killed(result: dict) -> int:
    return sum(any(status == -9 for status in start["statuses"]) for start in result["starts"])


STOPS = {  # where a signal comes, and at which step the run stops
    "in a forward": ("4:mid_forward:SIGTERM", 5),
    "before an update": ("4:pre_optimizer:SIGINT", 5),
    "in a save": ("6:mid_optimizer:SIGTERM", 7),
    "in an evaluation": ("7:during_eval:SIGTERM", 7),
    "before training": ("0:data:SIGTERM", 1),
}
SPARSE = {"model": "sparse"}
SPARSE_POINTS = ["4:mid_forward", "4:mid_forward", "6:mid_model", "6:mid_model", "9:before_commit", "9:before_commit"]
FULL_DISK = {"file_limit": [4, 7000]}
TWO = {"processes": 2}
ONE_PROCESS = {
    "whole": {},
    "killed": {"events": kill(*POINTS[:-2])},
    "killed at the end": {"events": kill("14:before_commit", "14:mid_final_save", "14:mid_final_save")},
    "without random states": {"events": kill("8:step_begin"), "with_rng": False},
    **{name: {"events": [event]} for name, (event, _) in STOPS.items()},
    "save only": {"events": ["4:mid_forward:SIGUSR1"]},
    "full disk": FULL_DISK,
    "full disk, later": {"folder": "full disk"},
    "full disk, going on": {**FULL_DISK, "safety": {"on_save_error": "continue"}},
    "sparse": SPARSE,
    "sparse, killed": {**SPARSE, "events": kill(*SPARSE_POINTS)},
}
TWO_PROCESSES = {
    "whole": TWO,
    "killed": {**TWO, "events": TWO_PROCESS_POINTS},
    "one told": {**TWO, "events": ["4:mid_forward:SIGTERM@1"]},
    "skewed": {**TWO, "events": ["2:mid_forward:SIGTERM@0", "3:save_begin:SIGTERM@1"]},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Runs jobs once, whichever of several test processes asks first."""

    def run_once(name: str, jobs: dict[str, dict]) -> dict[str, dict]:
        parallel = "PYTEST_XDIST_WORKER" in os.environ
        root = tmp_path_factory.getbasetemp().parent if parallel else tmp_path_factory.getbasetemp()
        folder = root / f"test_resume_{name}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "results.json").exists():
                folder.mkdir()
                run(folder, jobs)
        return dict(zip(jobs, json.loads((folder / "results.json").read_text())))

    return run_once


@pytest.fixture(scope="module")
def one(shared):
    return shared("one_process", ONE_PROCESS)


@pytest.fixture(scope="module")
def two(shared):
    return shared("two_processes", TWO_PROCESSES)


def test_killed_at_every_point_of_one_run(one):
    same(one["killed"], one["whole"])
    assert is_sum(one["killed"]["log_file"][-1])
    assert killed(one["killed"]) == len(POINTS) - 2
    never_without(one["killed"])
    output = "".join(text for start in one["killed"]["starts"] for text in start["output"])
    assert "Passed over checkpoint-6: its save did not finish (checkpoint_complete.json is missing)." in output
    # Tied weights are in the file once
    assert "Going on from" in output and "missing keys" not in output


def test_killed_when_all_is_trained(one):
    """Only the model is saved anew."""
    result = one["killed at the end"]
    same(result, one["whole"], but_state=True)
    assert killed(result) == 3
    assert "already at 2 of 2 epochs, nothing to do" in result["starts"][-1]["output"][0]


def test_the_hash_and_the_log_see_random_numbers(one):
    """What makes the tests here worth something."""
    control, whole = one["without random states"]["told"][0], one["whole"]["told"][0]
    assert control["hash"] != whole["hash"] and control["log"] != whole["log"]


def test_experts_and_sparse_attention_killed_twice_at_a_point(one):
    same(one["sparse, killed"], one["sparse"])
    assert "choices" in one["sparse"]["expert_load"] and "expert_entropy" in one["sparse"]["log_file"][0]
    assert killed(one["sparse, killed"]) == len(SPARSE_POINTS)


@pytest.mark.parametrize("name", STOPS)
def test_a_signal_loses_nothing(one, name):
    step = STOPS[name][1]
    first, second = one[name]["starts"]
    assert first["statuses"] == [0], first["output"]
    assert first["whole"][-1] == step
    assert f"Stopped at step {step}; the newest checkpoint is " in first["output"][0]
    assert f"checkpoint-{step}." in second["output"][0]
    same(one[name], one["whole"])


def test_usr1_saves_and_changes_nothing(one):
    assert len(one["save only"]["starts"]) == 1
    same(one["save only"], one["whole"])


def test_a_full_disk(one):
    """From step 4 on nothing large can be written; the checkpoint of step 3 stays, and the run goes on from it later."""
    for name in ("full disk", "full disk, going on"):
        (start,) = one[name]["starts"]
        assert start["statuses"] == [1] and start["whole"] == [3] and not one[name]["is_trained"]
        assert "checkpoint-6" not in start["folders"]
        assert re.search(r"No space writing .+/checkpoint-6 \(needs about 0\.\d MB\)", start["output"][0])
    assert start["output"][0].count("Going on without it") == 4
    assert re.search(r"CheckpointError: No space writing .+/run \(needs about", start["output"][0])
    same(one["full disk, later"], one["whole"])


def test_two_processes_killed_at_a_point_of_either(two):
    same(two["killed"], two["whole"])
    assert killed(two["killed"]) == len(TWO_PROCESS_POINTS)
    never_without(two["killed"])


@pytest.mark.parametrize(("name", "step"), [("one told", 5), ("skewed", 3)])
def test_two_processes_stop_at_the_same_step_whichever_was_told(two, name, step):
    first = two[name]["starts"][0]
    assert first["statuses"] == [0, 0], first["output"]
    assert first["whole"][-1] == step and first["seconds"] < 30
    same(two[name], two["whole"])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "sparse"])
def test_every_point_killed_twice(tmp_path, model):
    # A checkpoint that was committed is not written again: the next removal comes with the next one
    second = {"9:mid_rotate": "12:mid_rotate"}
    jobs = {point: {"model": model, "events": kill(point, second.get(point, point))} for point in POINTS}
    results = run(tmp_path, {"whole": {"model": model}, **jobs})
    for point in POINTS:
        same(results[point], results["whole"], but_state=point.endswith("mid_final_save"))
        assert killed(results[point]) == 2, point
        never_without(results[point])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "sparse"])
def test_every_point_killed_twice_in_either_of_two_processes(tmp_path, model):
    two = {"processes": 2, "model": model}
    second = {"8:mid_rotate": "8:mid_final_save"}  # the last removal there is
    points = {f"{point}@{process}": (point, process) for point in POINTS_OF_BOTH for process in range(2)}
    points |= {point: (point, 0) for point in POINTS_OF_THE_FIRST}
    jobs = {
        name: {**two, "events": [f"{one}:SIGKILL@{process}" for one in (point, second.get(point, point))]}
        for name, (point, process) in points.items()
    }
    results = run(tmp_path, {"whole": two, **jobs})
    for name, (point, process) in points.items():
        same(results[name], results["whole"], but_state=point in ("8:mid_rotate", "8:mid_final_save"))
        assert [start["statuses"][process] for start in results[name]["starts"]] == [-9, -9, 0], name
        never_without(results[name])


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "runs"), [(1, 20), (2, 10)])
def test_killed_at_random_moments(tmp_path, processes, runs):
    """Each run is killed at two moments that nobody chose, all its processes at once as a machine that goes down."""
    draw = random.Random(0)
    jobs = {}
    for number in range(runs):
        # Before each a whole one, to know how long a run takes just then; what precedes the first step is about half
        jobs[f"{number}, whole"] = {"processes": processes}
        moments = [draw.uniform(0.4, 0.9) for _ in range(2)]
        jobs[f"{number}, killed"] = {"processes": processes, "kill_at": moments}
    results = run(tmp_path, jobs)
    for result in results.values():
        same(result, results["0, whole"], but_state="hash" not in result["told"][0])
        never_without(result)
    assert sum(killed(result) for result in results.values()) >= runs / 2  # some find a run that has ended
    left = {tuple(start["whole"]) for result in results.values() for start in result["starts"][:-1]}
    assert len(left) > 1  # what a run went on from was not always the same
