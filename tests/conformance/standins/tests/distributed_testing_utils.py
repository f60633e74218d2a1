"""Stand-in for a module that the source distribution lacks: runs a function in one gloo process a rank, on the CPU."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """CPU ranks share the one device."""


def _start_rank_processes(function: Callable, args: tuple = (), nprocs: int = 2) -> None:
    """Calls `function(rank, *args)` in `nprocs` processes; raises what one of them raises.

    The fork server imports the libraries once for all tests, where a fresh process would spend seconds on them.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_fsdp_mixin", "tests.test_tensor_parallel_mixin"])
    mp.start_processes(function, args=args, nprocs=nprocs, start_method="forkserver")


def _rank(rank: int, function: Callable, world_size: int, host: str, port: int, args: tuple, kwargs: dict) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    torch.set_num_threads(1)
    store = dist.TCPStore(host, port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args, **kwargs)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable[[Callable], Callable[..., None]]:
    """`run_distributed(world_size=2)(function)(*args)` calls `function(rank, *args)` in two processes."""

    def decorate(function: Callable) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            # Held here until the ranks end: they meet at its port, which no other test can then take
            store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            _start_rank_processes(_rank, (function, world_size, store.host, store.port, args, kwargs), world_size)

        return run

    return decorate
