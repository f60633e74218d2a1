"""Tiny trainings that end where they are told to, and are started again: `python tiny_runs.py JOBS RESULTS`, both JSON.

Everything is imported once; each start of a run is a fork, one a process of it. A job is a dict:

    folder      where it works; runs of the same folder go on from each other
    model       "dense": a decoder; "sparse": an encoder-decoder with experts and a sliding window
    processes   1, or more with gloo
    events      ["STEP:POINT:SIGNAL[@PROCESS]", ...]: each raised once, in this order, over all starts
    kill_at     when the processes of each start are killed, one a start: shares of the time of the newest run let alone
    file_limit  [STEP, BYTES]: from the end of this step on, no file may be larger
    arguments, safety, resume, allow, with_rng: what the run is given

Results: for each job its starts, `{"statuses", "seconds", "whole", "folders", "output"}` (whole: the steps
of checkpoints that are committed and as they were written), and
`told`, what each process said of itself when it came to its end.
"""

import hashlib
import json
import os
import random
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import transformers.modeling_utils
from transformers import Seq2SeqTrainingArguments, TrainerCallback, set_seed
from transformers.utils.logging import disable_progress_bar

import variform
from variform.report.curves import LOG_FILE, read_log
from variform.training import checkpoints, safety
from variform.training.logs import RunLog
from variform.training.routers import LOAD_FILE, watch_experts
from variform.training.trainers import SafeTrainer

STACK = {"vocab_size": 19, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
EXAMPLES = 27  # in batches of 2, 2 of them a step: the last step of an epoch is a partial one
ARGUMENTS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 0.01,
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 1,
    "eval_strategy": "epoch",
    "disable_tqdm": True,
    "use_cpu": True,
    "report_to": "none",
}
GRACE_SECONDS = 5  # for the other processes, when one was killed
LONGEST = 120


def make_model(kind: str) -> torch.nn.Module:
    if kind == "dense":
        return variform.from_config(variform.VariformDecoderConfig(**STACK, **DROPOUT, tie_word_embeddings=True))
    side = {**STACK, **DROPOUT, "num_experts": 4, "attention_patterns": ["sliding_window:3"]}
    ids = {"pad_token_id": 0, "decoder_start_token_id": 1}
    return variform.from_config(variform.VariformEncoderDecoderConfig(encoder=side, decoder=side, **ids))


def make_data() -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(3, 19, (EXAMPLES, 9), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def state_hash(trainer) -> str:
    """sha256 over the raw bytes of parameters, buffers, optimizer, schedule, random states and the place in the data."""
    digest = hashlib.sha256()

    def add(name, value):
        digest.update(f"{name}:".encode())
        if torch.is_tensor(value):
            digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add(f"{name}.{key}", value[key])
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                add(f"{name}.{number}", item)
        elif isinstance(value, np.ndarray):
            digest.update(value.tobytes())
        else:
            digest.update(repr(value).encode())

    add("parameters", dict(trainer.model.named_parameters()))
    add("buffers", dict(trainer.model.named_buffers()))
    add("optimizer", trainer.optimizer.state_dict())
    add("schedule", trainer.lr_scheduler.state_dict())
    add("random", [random.getstate(), np.random.get_state(), torch.get_rng_state()])
    add("data", [trainer.state.global_step, trainer.state.epoch])
    return digest.hexdigest()


def log_lines(lines: list[dict]) -> list[str]:
    """What was logged, exactly, but for what depends on the clock."""
    clocks = ("runtime", "per_second")
    return [repr(sorted((name, value) for name, value in line.items() if not name.endswith(clocks))) for line in lines]


class Events(TrainerCallback):
    """Raises each signal of a plan where it belongs, once over all starts of a run."""

    def __init__(self, folder: Path, plan: list[str]):
        self.file, self.plan, self.trainer = folder / "events_used", plan, None

    def at(self, point: str) -> None:
        used = len(self.file.read_text()) if self.file.exists() else 0
        if used >= len(self.plan):
            return
        event, _, process = self.plan[used].partition("@")
        step, where, name = event.split(":")
        here = (self.trainer.state.global_step, point, self.trainer.args.process_index)
        if here == (int(step), where, int(process or 0)):
            self.file.write_text("x" * (used + 1))
            os.kill(os.getpid(), getattr(signal, name))

    def on_step_begin(self, args, state, control, **kwargs):
        self.at("step_begin")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.at("pre_optimizer")

    def on_step_end(self, args, state, control, **kwargs):
        self.at("step_end")

    def on_prediction_step(self, args, state, control, **kwargs):
        self.at("during_eval")


class FileLimit(TrainerCallback):
    """From the end of a step on, no file may be larger than so many bytes: a disk that is full."""

    def __init__(self, step: int, size: int):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def wrap(owner, name: str, before=None, after=None) -> None:
    """Does something before and after a function, wherever it is called from."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if before:
            before(*args, **kwargs)
        result = original(*args, **kwargs)
        if after:
            after(*args, **kwargs)
        return result

    setattr(owner, name, wrapped)


def plant(events: Events, trainer) -> None:
    """Puts the named points where they are; a write that is cut off leaves half of its file."""
    events.trainer = trainer
    trainer.add_callback(events)

    def half_a_model(tensors, path, *args, **kwargs):
        Path(path).write_bytes(safetensors.torch.save(tensors)[:2000])
        events.at("mid_final_save" if checkpoints.STAGED_MODEL in str(path) else "mid_model")

    def half_a_pickle(value, path, *args, **kwargs):
        if str(path).endswith("optimizer.pt"):
            Path(path).write_bytes(b"PK\3\4")
            events.at("mid_optimizer")

    def half_a_removal(checkpoint):
        (checkpoint / "optimizer.pt").unlink(missing_ok=True)
        events.at("mid_rotate")

    checkpoints._sync = lambda path: None  # slow, and only a power cut can tell
    wrap(transformers.modeling_utils, "safe_save_file", half_a_model)
    wrap(torch, "save", half_a_pickle)
    wrap(checkpoints, "_remove", half_a_removal)
    wrap(trainer, "save_model", lambda *_, **__: events.at("save_begin"))
    wrap(
        trainer,
        "_save_optimizer_and_scheduler",
        lambda *_: events.at("after_model"),
        lambda *_: events.at("after_optimizer"),
    )
    wrap(trainer, "_save_rng_state", after=lambda *_: events.at("before_state"))
    wrap(safety, "commit", lambda *_, **__: events.at("before_commit"), lambda *_, **__: events.at("after_commit"))
    wrap(safety, "install_model", after=lambda *_: events.at("after_install"))
    wrap(safety, "run_facts", lambda *_: events.at("data"))
    trainer.model.register_forward_hook(lambda *_: events.at("mid_forward") if trainer.model.training else None)


def train(job: dict, folder: Path) -> None:
    """One start of a run, in one process of it."""
    disable_progress_bar()
    args = Seq2SeqTrainingArguments(**{"output_dir": str(folder / "run"), **ARGUMENTS, **job.get("arguments", {})})
    set_seed(args.seed)
    data = make_data()
    trainer = SafeTrainer(
        model=make_model(job.get("model", "dense")),
        args=args,
        train_dataset=data,
        eval_dataset=data[:4],
        safety=safety.Safety(**job.get("safety", {})),
    )
    if not job.get("with_rng", True):
        trainer._load_rng_state = lambda checkpoint: None
    trainer.add_callback(RunLog())
    watch_experts(trainer)
    plant(Events(folder, job.get("events", [])), trainer)
    if "file_limit" in job:
        trainer.add_callback(FileLimit(*job["file_limit"]))
    told = {"finished": trainer.train_safely(job.get("resume", "auto"), allow_changes=job.get("allow", []))}
    told |= {"step": trainer.state.global_step, "log": log_lines(trainer.state.log_history)}
    if trainer.optimizer is not None:
        told["hash"] = state_hash(trainer)
    (folder / f"told_{args.process_index}.json").write_text(json.dumps(told))


def start_process(job: dict, folder: Path, number: int, rank: int, port: int) -> int:
    """Forks one process of a run; returns its id."""
    if child := os.fork():
        return child
    status = 1
    try:
        output = os.open(folder / f"output_{number}_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if (processes := job.get("processes", 1)) > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
        train(job, folder)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        status = 0
    except BaseException:  # the process ends here, whatever it was
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def reap(children: list[int], kill_after: float | None) -> list[int]:
    """As `subprocess` counts: the exit status, or minus the signal."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + (kill_after if kill_after is not None else LONGEST)
    while len(statuses) < len(children):
        time.sleep(0.005)
        for child in children:
            if child not in statuses:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    statuses[child] = os.waitstatus_to_exitcode(status)
                    if statuses[child] != 0:
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            for child in children:
                if child not in statuses:
                    os.kill(child, signal.SIGKILL)
            deadline = float("inf")
    return [statuses[child] for child in children]


def whole(run: Path) -> list[int]:
    """The steps of the checkpoints that are committed and as they were written."""
    steps = []
    for path in run.glob("checkpoint-*"):
        try:
            checkpoints.check(path)
        except ValueError:
            continue
        steps.append(int(path.name.partition("-")[2]))
    return sorted(steps)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def failed(statuses: list[int]) -> bool:
    """Whether a run ended by itself, and not well."""
    return min(statuses) >= 0 and max(statuses) > 0


def do(job: dict, usual: float) -> dict:
    """Starts a run again and again until it comes to its end, or fails; let alone it would take the usual seconds."""
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    kills, processes = [share * usual for share in job.get("kill_at", [])], range(job.get("processes", 1))
    most = 1 + len(job.get("events", [])) + len(kills)
    starts: list[dict] = []
    told: list[dict] = []
    while len(starts) < most and not (starts and failed(starts[-1]["statuses"])):
        for path in folder.glob("told_*.json"):
            path.unlink()
        begin, port, number = time.monotonic(), free_port(), len(list(folder.glob("output_*_0.txt")))
        children = [start_process(job, folder, number, rank, port) for rank in processes]
        statuses = reap(children, kills.pop(0) if kills else None)
        starts.append(
            {
                "statuses": statuses,
                "seconds": time.monotonic() - begin,
                "whole": whole(folder / "run"),
                "folders": sorted(path.name for path in (folder / "run").glob("checkpoint-*")),
                "output": [(folder / f"output_{number}_{rank}.txt").read_text() for rank in processes],
            }
        )
        # Who was killed may have told half, or all and then not have ended
        told = [] if any(statuses) else [json.loads(path.read_text()) for path in sorted(folder.glob("told_*.json"))]
        if told and all(process["finished"] for process in told):
            break
    model, load = folder / "run" / "model.safetensors", folder / "run" / LOAD_FILE
    return {
        "log_file": log_lines(read_log(folder / "run" / LOG_FILE)),
        "expert_load": load.read_text() if load.exists() else None,
        "starts": starts,
        "told": told,
        "model": checkpoints.sha256(model) if model.exists() else None,
        "is_trained": checkpoints.is_trained(folder / "run"),
    }


if __name__ == "__main__":
    results: list[dict] = []
    usual = 0.0
    for job in json.loads(Path(sys.argv[1]).read_text()):
        results.append(do(job, usual))
        if len(results[-1]["starts"]) == 1:
            usual = results[-1]["starts"][0]["seconds"]
    Path(sys.argv[2]).write_text(json.dumps(results))
