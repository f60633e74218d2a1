"""Fair figures on a shared machine: interleaved rounds in process time, and peak memory in a fresh process.

Wall clock on two busy cores scatters by a factor of two; process time of one thread, with the contestants taking turns
and the order reversed every other round, by a few percent. Ratios nearer than about 10 % to each other are equal.
"""

import ctypes
import gc
import multiprocessing
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A second, spinning OpenMP thread slows a busy machine fivefold; read when torch starts, so set before it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers


class Timings(dict[str, list[float]]):
    """Seconds of process time of each contestant, one figure a round; the first contestant is the baseline."""

    def seconds(self, name: str) -> float:
        """Median over the rounds."""
        return statistics.median(self[name])

    def speed(self, name: str) -> float:
        """How many times as fast as the baseline: the median of the rounds' ratios."""
        baseline = next(iter(self.values()))
        return statistics.median(first / own for first, own in zip(baseline, self[name]))

    def spread(self, name: str) -> float:
        """(largest - smallest) / median of the rounds' ratios: how far to trust `speed`."""
        ratios = [first / own for first, own in zip(next(iter(self.values())), self[name])]
        return (max(ratios) - min(ratios)) / statistics.median(ratios)


def compare(contestants: dict[str, Callable[[], Any]], rounds: int = 9, warmup: int = 1) -> Timings:
    """Times the contestants in turns on one thread.

    Args:
        contestants: name to a function without arguments; the first is the baseline.
        rounds: how often each one runs; an odd number has a median that was measured.
        warmup: untimed runs before, for allocators and compilers.
    """
    torch.set_num_threads(1)
    for run in contestants.values():
        for _ in range(warmup):
            run()
    timings = Timings({name: [] for name in contestants})
    for number in range(rounds):
        for name in sorted(contestants, key=list(contestants).index, reverse=bool(number % 2)):
            start = time.process_time()
            contestants[name]()
            timings[name].append(time.process_time() - start)
    return timings


def allocated_peak(run: Callable[[], Any]) -> float:
    """MiB that torch's CPU allocator holds at the peak of one run, beyond what it held before.

    Exact and the same each time, unlike the resident set, in which pages of earlier work are filled unseen; but it does
    not see what a kernel takes for itself.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def peak_memory(build: Callable[..., Callable[[], Any]], *args: Any) -> float:
    """MiB that one run takes at its peak beyond what its process held before, in a fresh process.

    Args:
        build: a function of a module (it is sent to the process by name); `build(*args)` makes models and inputs and
            returns the run that is measured. What it does itself, warming up included, does not count.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, build, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the process that measures {build.__name__}{args} died") from None
    finally:
        process.join()


def _measure(sender, build, args):
    torch.set_num_threads(1)
    run = build(*args)
    gc.collect()
    if platform.system() == "Linux":  # what building freed goes back, or the run would fill it unseen
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = peak = _resident()
    is_over = threading.Event()

    def watch():
        nonlocal peak
        while not is_over.wait(0.001):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    is_over.set()
    watcher.join()
    sender.send((max(peak, _resident()) - before) / 2**20)


def _resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def header() -> str:
    """What the figures were measured on: commit, hardware, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    accelerator = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"commit {_commit()} | {processor}, {os.cpu_count()} cores{accelerator}, load {os.getloadavg()[0]:.1f} | "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def _commit() -> str:
    """Short hash, with "+changes" if tracked files differ from it."""

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", Path(__file__).parent, *arguments], capture_output=True, text=True, check=False
        ).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "none") + ("+changes" if git("diff", "--stat", "HEAD") else "")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; the first row's keys are the columns."""
    cells = [list(rows[0]), ["---"] * len(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
