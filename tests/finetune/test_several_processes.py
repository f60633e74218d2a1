"""Scripts in two processes: the losses and the figures of one, one card, one stop, and as many processes as were asked for."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from script_inputs import ROOT, WORDS, form, write_lines

import variform
from variform.training.checkpoints import is_trained
from variform.training.run import STOPPED

CHILD = str(Path(__file__).with_name("in_two_processes.py"))
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "processes": ["-m", "variform.training.processes", "2"],
}
# In all, 12 examples a step of training; what is judged divides by nothing
BATCH = 6
QUICK = ["--max_steps", "3", "--logging_steps", "1", "--learning_rate", "1e-2", "--per_device_eval_batch_size", "4"]
TRAINED_ON, JUDGED = 36, 11
NOT_OF_THE_FIGURES = ("seconds", "process_seconds")
LONGEST = 300


def start(launcher: str, *command: str) -> subprocess.Popen:
    """A script in two processes, in a session of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [sys.executable, *LAUNCHERS[launcher], *command]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True, **pipes)


def sentence(number: int, words: int = 7) -> str:
    return " ".join(WORDS[(number + (3 + number % 4) * place) % 17] for place in range(words + number % 3))


@pytest.fixture(scope="module")
def tasks(tokenizers, tmp_path_factory):
    """`{name: (script, arguments)}`, with examples of different lengths."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for n in range(TRAINED_ON + JUDGED):
        text, context = f"{sentence(n)} {n}", f"{sentence(n, 12)} {n} end"
        answers = {"text": [str(n)], "answer_start": [context.index(f" {n} ") + 1]}
        row = {"text": text, "target": sentence(n, 3), "label": ("pos", "neg")[n % 2], "tokens": text.split()}
        row |= {"tags": [("D", "N", "V")[len(word) % 3] for word in text.split()]}
        row |= {"question": f"which {WORDS[n % 17]}?", "context": context, "answers": answers}
        rows.append({**row, "prompt": text, "chosen": f" {sentence(n + 1, 3)}", "rejected": f" {WORDS[n % 17]}"})
    parts = {"--train_files": rows[:TRAINED_ON], "--eval_files": rows[TRAINED_ON:]}
    data = [word for flag, part in parts.items() for word in (flag, write_lines(folder / f"{flag[2:]}.jsonl", part))]
    both, end, begin = (["--tokenizer", tokenizers[frame]] for frame in ("both", "end", "start"))
    writer = {**json.loads(form("decoder")), "vocab_size": 320, "pad_token_id": 0}
    variform.from_config(writer).save_pretrained(folder / "writer")
    encoder, decoder = ["--form", form("encoder"), *both], ["--form", form("decoder"), *begin]
    pair, short = ["--form", form("encoder_decoder"), *end], ["--max_length", "48"]
    lengths = ["--max_source_length", "48", "--max_target_length", "12"]
    given = {
        "causal_lm": ("causal_lm", [*decoder, *short, "--rows", "pad"]),
        "masked_lm": ("masked_lm", [*encoder, *short, "--learning_rate", "0"]),  # each process draws its own masks
        "classify": ("classify", [*encoder, *short, "--baselines", "false"]),
        "tag": ("tag", [*encoder, *short]),
        "answer": ("answer", [*encoder, "--max_length", "40", "--stride", "8"]),
        "seq2seq": ("seq2seq", [*pair, *lengths, "--metrics", "chrf"]),
        "spans": ("seq2seq", [*pair, *lengths, "--objective", "spans"]),
        # The gradients of a prompt cancel out but for rounding, which Adam would blow up
        "dpo": (
            "dpo",
            ["--model", str(folder / "writer"), *begin, *short, "--optim", "sgd", "--learning_rate", "0.1"],
        ),
    }
    return {name: (script, [*data, *QUICK, *arguments]) for name, (script, arguments) in given.items()}


@pytest.fixture(scope="module")
def runs(tasks, load_script, tmp_path_factory):
    """Folders of runs of one process and of two that see the same batches, and what the two said."""
    folder = tmp_path_factory.mktemp("runs")
    ask = [
        (name, script, [*arguments, "--per_device_train_batch_size", str(BATCH)])
        for name, (script, arguments) in tasks.items()
    ]
    jobs = [(script, [*arguments, "--output_dir", str(folder / f"{name}-two")]) for name, script, arguments in ask]
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    process = start("processes", CHILD, str(folder / "jobs.json"))
    for name, script, arguments in ask:
        twice = ["--per_device_train_batch_size", str(2 * BATCH), "--output_dir", str(folder / f"{name}-one")]
        assert load_script(script).main([*arguments, *twice]) == 0
    said, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, said
    return folder, said


def log(folder: Path, field: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line[field] for line in lines if field in line]


def figures(folder: Path) -> dict:
    measured = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    measured |= measured.pop("baselines", {})
    return {name: value for name, value in measured.items() if name not in NOT_OF_THE_FIGURES}


NAMES = ["causal_lm", "masked_lm", "classify", "tag", "answer", "seq2seq", "spans", "dpo"]
# Each process draws its own masks; and the softmax over positions counts the padding, which is another one in each process
OTHER_LOSSES = ("masked_lm", "answer")


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one_with_twice_the_batch(runs, name):
    one, two = runs[0] / f"{name}-one", runs[0] / f"{name}-two"
    if name not in OTHER_LOSSES:
        assert log(two, "loss") == pytest.approx(log(one, "loss"), abs=1e-5)
        assert log(two, "grad_norm") == pytest.approx(log(one, "grad_norm"), rel=1e-3)
    assert len(log(two, "loss")) == 3 and is_trained(two)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_measure_what_one_does(runs, name):
    """The examples that fill up the last batch count once."""
    one, two = (figures(runs[0] / f"{name}-{count}") for count in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


def test_one_of_them_speaks_and_writes(runs):
    folder, said = runs
    for name in NAMES:
        assert said.count(f"Model, card and metrics.json are in {folder / f'{name}-two'}.") == 1
        card = json.loads((folder / f"{name}-two" / "card.json").read_text(encoding="utf-8"))
        assert card["training"]["processes"] == "2"
        assert card["command"].startswith("torchrun --nproc_per_node 2 finetune/")


def rank_of(process: Path) -> str | None:
    """The rank that a process of this machine was started with; None for one that is gone, or was given none."""
    try:
        variables = process.joinpath("environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((value.decode()[5:] for value in variables if value.startswith(b"RANK=")), None)


def workers(launcher: subprocess.Popen) -> dict[str, int]:
    """`{rank: process id}` of what a launcher has started."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(process.joinpath("stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        rank = rank_of(process) if parent == launcher.pid else None
        if rank is not None:
            found[rank] = int(process.name)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found by their /proc/ID/environ")
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_to_one_stops_both_and_both_go_on(tasks, tmp_path, launcher):
    script, arguments = tasks["causal_lm"]
    command = [f"finetune/{script}.py", *arguments, "--output_dir", str(tmp_path / "run"), "--save_steps", "5"]
    command += ["--per_device_train_batch_size", "2"]
    process = start(launcher, *command, "--max_steps", "100000")
    deadline = time.monotonic() + LONGEST
    while not list(tmp_path.glob("run/checkpoint-*/checkpoint_complete.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.2)
    os.kill(workers(process)["1"], signal.SIGTERM)
    said, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == (STOPPED if launcher == "processes" else 1), said
    (stopped_at,) = re.findall(r"Stopped at step (\d+); ", said)
    assert (tmp_path / "run" / f"checkpoint-{stopped_at}" / "checkpoint_complete.json").is_file()
    assert not is_trained(tmp_path / "run")

    process = start(launcher, *command, "--max_steps", str(int(stopped_at) + 3))
    said, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, said
    assert said.count(f"Going on from {tmp_path / 'run' / f'checkpoint-{stopped_at}'}.") == 1
    assert is_trained(tmp_path / "run") and figures(tmp_path / "run")["steps"] == int(stopped_at) + 3


@pytest.mark.slow
def test_processes_that_would_not_train_together_are_refused(tasks, tmp_path):
    script, arguments = tasks["causal_lm"]
    alone = ["--use_cpu", "false", "--output_dir", str(tmp_path)]
    process = start("processes", f"finetune/{script}.py", *arguments, *alone)
    said, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 2 and "Traceback" not in said
    assert "error: 2 processes were asked for, but 1 would train together" in said
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_torchrun_measures_a_trained_model_as_one_process_did(runs, tasks):
    script, arguments = tasks["tag"]
    folder = runs[0] / "tag-one"
    before = figures(folder)
    (folder / "metrics.json").unlink()
    process = start("torchrun", f"finetune/{script}.py", *arguments, "--output_dir", str(folder))
    said, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 0 and said.count("holds a trained model") == 1, said
    assert figures(folder) == before
