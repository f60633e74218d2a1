"""A script in several processes on this machine, which Ctrl-C stops as gently as one.

    python -m variform.training.processes 2 finetune/seq2seq.py --config configs/recipes/pronunciation.yaml

`torchrun` and `accelerate launch` start it as well, on many machines too. But they pass Ctrl-C on to processes that the
terminal has told already, give them little time to save, and end with a traceback.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

POLL_SECONDS = 0.2
GRACE_SECONDS = 60  # to save in, once another has ended


def run(count: int, command: Sequence[str]) -> int:
    """Runs `python command...` in `count` processes that find each other as torch.distributed expects.

    Returns:
        The exit status of the first one that failed, or 0. When one fails the others are stopped.

    Raises:
        ValueError: if `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1 process, got {count}.")
    if count == 1:
        return subprocess.run([sys.executable, *command], check=False).returncode
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # Started before Ctrl-C is ignored here, so that they do not ignore it
    processes = [
        subprocess.Popen([sys.executable, *command], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        statuses: list[int | None] = [None]
        while None in statuses:
            time.sleep(POLL_SECONDS)
            statuses = [process.poll() for process in processes]
            if any(statuses):
                stop(processes)
    finally:
        signal.signal(signal.SIGINT, previous)
        stop(processes)
    return next((process.returncode for process in processes if process.returncode), 0)


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Ends those that still run, after some time to end by themselves: they may be saving."""
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), sys.argv[2:]))
