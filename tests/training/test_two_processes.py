"""Processes that keep different time decide as one."""

from datetime import timedelta

import torch
import torch.multiprocessing as multiprocessing

from variform.training.budget import agree


def decide(rank: int, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=100))
    agreed = agree(10.0 + rank, torch.device("cpu"))
    torch.save(agreed, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_all_processes_follow_the_slowest_clock(tmp_path):
    multiprocessing.spawn(decide, args=(str(tmp_path),), nprocs=2)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [11.0, 11.0]
