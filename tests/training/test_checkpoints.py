"""A checkpoint counts when its manifest does; what does not count is named, with the reason."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from variform.training import checkpoints
from variform.training.checkpoints import (
    MANIFEST,
    STAGED_MODEL,
    RunLock,
    changed_facts,
    check,
    check_writable,
    commit,
    install_model,
    is_no_space,
    is_trained,
    newest_committed,
    prune,
    read_manifest,
    set_aside,
    staged_model,
)

FILES = {
    "model.safetensors": bytes(range(256)) * 3,
    "optimizer.pt": b"optimizer" * 20,
    "trainer_state.json": b'{"global_step": 7, "epoch": 1.0}',
    "adapter/config.json": b"{}",
}


def write(folder, files=FILES):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def make(tmp_path):
    """Makes `checkpoint-N`, committed unless told otherwise."""

    def make_one(step, *, committed=True):
        folder = write(tmp_path / f"checkpoint-{step}")
        if committed:
            commit(folder, {"seed": 1})
        return folder

    return make_one


def reasons(found):
    return {path.name: reason for path, reason in found.passed_over}


def test_a_manifest_lists_every_file_and_the_facts(make):
    manifest = read_manifest(make(7))
    assert manifest["facts"] == {"seed": 1}
    assert {name: file["size"] for name, file in manifest["files"].items()} == {
        name: len(content) for name, content in FILES.items()
    }
    assert all(len(file["sha256"]) == 64 for file in manifest["files"].values())


def test_large_files_are_hashed_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "HASH_BELOW", 100)
    for verify, hashed in (("hash", 2), ("full", 4), ("size", 0)):
        folder = write(tmp_path / verify)
        commit(folder, {}, verify=verify)
        assert sum("sha256" in file for file in read_manifest(folder)["files"].values()) == hashed


def test_the_newest_is_the_one_of_the_highest_step_whatever_the_clock_says(make, tmp_path):
    for step in (9, 10, 100):
        make(step)
    os.utime(tmp_path / "checkpoint-9", (2e9, 2e9))
    os.utime(tmp_path / "checkpoint-100", (0, 0))
    assert newest_committed(tmp_path) == (tmp_path / "checkpoint-100", [])


def test_a_new_folder_has_none(tmp_path):
    assert newest_committed(tmp_path / "new") == (None, [])


def test_what_is_passed_over_is_named_with_the_reason(make, tmp_path):
    good = make(7)
    make(8, committed=False)
    (make(9) / "optimizer.pt").unlink()
    with (make(10) / "model.safetensors").open("ab") as file:
        file.write(b"x")
    flipped = make(11) / "optimizer.pt"
    flipped.write_bytes(b"O" + flipped.read_bytes()[1:])
    (make(12) / MANIFEST).write_text('{"files": {')
    unreadable = make(13, committed=False)
    (unreadable / "trainer_state.json").write_text('{"global_')
    commit(unreadable, {})
    (tmp_path / "checkpoint-99").mkdir()
    shutil.copytree(good, tmp_path / "checkpoint-7.bak")
    (tmp_path / "checkpoint-20").symlink_to(tmp_path / "checkpoint-20")
    (tmp_path / "checkpoint-21").write_text("a file")
    (tmp_path / "checkpoint-022").mkdir()
    found = newest_committed(tmp_path)
    assert found.checkpoint == good
    assert reasons(found) == {
        "checkpoint-8": f"its save did not finish ({MANIFEST} is missing)",
        "checkpoint-9": "optimizer.pt is missing",
        "checkpoint-10": "model.safetensors has 769 bytes, 768 were written",
        "checkpoint-11": "optimizer.pt does not match its sha256",
        "checkpoint-12": f"{MANIFEST} cannot be read",
        "checkpoint-13": "trainer_state.json cannot be read",
        "checkpoint-99": f"its save did not finish ({MANIFEST} is missing)",
        "checkpoint-7.bak": "not a name of a checkpoint",
        "checkpoint-20": "a symbolic link that leads nowhere",
        "checkpoint-21": "not a folder",
        "checkpoint-022": "not a name of a checkpoint",
    }
    # By size alone, a flipped byte passes: that is what it is faster for
    (tmp_path / "checkpoint-12" / MANIFEST).unlink()
    (tmp_path / "checkpoint-13" / MANIFEST).unlink()
    assert newest_committed(tmp_path, verify="size").checkpoint.name == "checkpoint-11"


@given(data=st.data())
def test_one_changed_byte_anywhere_is_seen(tmp_path_factory, data):
    """In any file, the manifest too."""
    folder = write(tmp_path_factory.mktemp("run") / "checkpoint-7")
    commit(folder, {"seed": 1, "model_config": {"hidden_size": 8}})
    path = folder / data.draw(st.sampled_from([*FILES, MANIFEST]))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    found = newest_committed(folder.parent)
    assert found.checkpoint is None and (path.name in reasons(found)["checkpoint-7"])
    shutil.rmtree(folder.parent)


def test_pruning_leaves_the_newest_and_never_fewer_than_two(make, tmp_path):
    for step in (1, 2, 3, 4):
        make(step)
    foreign = make(0, committed=False)
    assert prune(tmp_path, None) == []
    assert [path.name for path in prune(tmp_path, 1)] == ["checkpoint-1", "checkpoint-2"]
    assert prune(tmp_path, 1) == [] and foreign.exists()


def test_pruning_leaves_what_is_protected(make, tmp_path):
    for step in (1, 2, 3, 4):
        make(step)
    assert [path.name for path in prune(tmp_path, 2, protected=[tmp_path / "checkpoint-1"])] == ["checkpoint-2"]


def test_a_damaged_checkpoint_is_not_one_of_the_two(make, tmp_path):
    for step in (1, 2, 3):
        make(step)
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    assert prune(tmp_path, 1) == []
    assert newest_committed(tmp_path).checkpoint.name == "checkpoint-2"


def test_a_removal_that_was_cut_off_is_finished_by_the_next(make, tmp_path):
    for step in (1, 2, 3):
        make(step)
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
    make(4)
    assert [path.name for path in prune(tmp_path, 2)] == ["checkpoint-1", "checkpoint-2"]


def test_later_checkpoints_are_renamed_and_kept(make, tmp_path):
    for step in (1, 2, 3):
        make(step)
    (tmp_path / "checkpoint-2.bak1").mkdir()
    assert [path.name for path in set_aside(tmp_path, 1)] == ["checkpoint-2.bak2", "checkpoint-3.bak1"]
    assert newest_committed(tmp_path).checkpoint.name == "checkpoint-1"


def test_facts_that_changed_are_named_to_the_field():
    old = {"seed": 1, "model_config": {"hidden_size": 8, "layers": 2}, "gone": 0}
    new = {"seed": 2, "model_config": {"hidden_size": 8, "layers": 3, "added": True}}
    assert changed_facts(old, new) == {
        "seed": (1, 2),
        "model_config.layers": (2, 3),
        "gone": (0, None),
        "model_config.added": (None, True),
    }
    assert changed_facts(old, json.loads(json.dumps(old))) == {}


MODEL = {"config.json": b"old config", "model.safetensors": b"old weights", "tokenizer.json": b"old tokenizer"}
NEW_MODEL = {"config.json": b"new config", "model-00001-of-00001.safetensors": b"new", "tokenizer.json": b"new words"}


def test_a_final_model_replaces_the_old_one(tmp_path):
    write(tmp_path, MODEL)
    assert not is_trained(tmp_path)
    with staged_model(tmp_path) as staging:
        write(staging, NEW_MODEL)
        commit(staging, {})
    assert not is_trained(tmp_path)
    assert install_model(tmp_path) and is_trained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in NEW_MODEL} == NEW_MODEL
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / STAGED_MODEL).exists()
    assert not install_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert not is_trained(tmp_path)


def test_a_final_save_that_fails_leaves_the_old_model(tmp_path):
    write(tmp_path, MODEL)
    with pytest.raises(KeyboardInterrupt), staged_model(tmp_path) as staging:
        write(staging, {"config.json": b"new config"})
        raise KeyboardInterrupt
    assert {name: (tmp_path / name).read_bytes() for name in MODEL} == MODEL and not install_model(tmp_path)


@pytest.mark.parametrize("calls", range(12))
def test_wherever_installing_is_cut_off_config_and_weights_are_never_mixed(tmp_path, monkeypatch, calls):
    """Cut off before each change of the folder; the next attempt finishes."""
    write(tmp_path, MODEL)
    with staged_model(tmp_path) as staging:
        write(staging, NEW_MODEL)
        commit(staging, {})
    left = [calls]

    def or_die(function):
        def wrapped(*args, **kwargs):
            if left[0] == 0:
                raise SystemExit
            left[0] -= 1
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        for owner, name in ((os, "replace"), (type(tmp_path), "unlink"), (shutil, "rmtree")):
            patch.setattr(owner, name, or_die(getattr(owner, name)))
        install_model(tmp_path)
        raise SystemExit
    config = (tmp_path / "config.json").read_bytes() if (tmp_path / "config.json").exists() else None
    weights = [path.read_bytes() for path in tmp_path.glob("model*.safetensors")]
    assert (config, weights) in ((b"old config", [b"old weights"]), (b"new config", [b"new"])) or config is None
    install_model(tmp_path)
    assert is_trained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in NEW_MODEL} == NEW_MODEL


HOLD = """
import sys, time
from variform.training.checkpoints import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_with_the_id_of_the_first_and_a_dead_one_locks_nobody_out(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=rf"in use by another run \(process {holder.pid}\)"):
                RunLock(tmp_path).__enter__()
        finally:
            holder.kill()
    with RunLock(tmp_path) as lock:
        assert lock.path.read_text() == f"{os.getpid()}\n"


def test_an_output_folder_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", "/proc/variform"):
        with pytest.raises(ValueError, match=f"`output_dir` {path} cannot be written"):
            check_writable(path)
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_full_disk_is_recognised_whoever_writes(tmp_path):
    """torch and safetensors raise types and texts of their own."""
    tensors = {"weight": torch.ones(20_000)}
    writers = [
        lambda path: path.write_bytes(bytes(80_000)),
        lambda path: torch.save(tensors, path),
        lambda path: save_file(tensors, path),
    ]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number, writer in enumerate(writers):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        try:
            with pytest.raises(Exception) as caught:
                writer(tmp_path / f"{number}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert is_no_space(caught.value), repr(caught.value)
    assert not is_no_space(ValueError("no such thing")) and not is_no_space(PermissionError(13, "denied"))


def test_checking_says_nothing_of_a_whole_one(make):
    assert check(make(7))["facts"] == {"seed": 1}
