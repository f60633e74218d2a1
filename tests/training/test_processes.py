"""Several processes of one script: they find each other, and one that fails ends the others."""

import time

import pytest

from variform.training import processes

ADD_RANKS = """
import sys, torch.distributed as dist, torch
dist.init_process_group("gloo")
total = torch.tensor(1.0 + dist.get_rank())
dist.all_reduce(total)
open(f"{sys.argv[1]}/{dist.get_rank()}", "w").write(f"{total.item()} of {dist.get_world_size()}")
dist.destroy_process_group()
"""
FAIL_OR_WAIT = """
import os, sys, time
sys.exit(3) if os.environ["RANK"] == "1" else time.sleep(600)
"""


def test_two_processes_add_up(tmp_path):
    assert processes.run(2, ["-c", ADD_RANKS, str(tmp_path)]) == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["3.0 of 2", "3.0 of 2"]


def test_one_that_fails_ends_the_other(monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    begin = time.monotonic()
    assert processes.run(2, ["-c", FAIL_OR_WAIT]) in (3, -15)
    assert time.monotonic() - begin < 60


def test_one_process_is_the_script_itself():
    assert processes.run(1, ["-c", "import os, sys; sys.exit(5 if 'RANK' in os.environ else 4)"]) == 4


def test_no_process_is_refused():
    with pytest.raises(ValueError, match="`count` must be at least 1"):
        processes.run(0, ["-c", ""])
