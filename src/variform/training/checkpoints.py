"""Checkpoints that count only once they are whole: a manifest, written last, lists every file with its size and hash.

A folder `checkpoint-N` without the manifest was cut off in the middle of a save; one whose files differ from it was damaged
since. Both are passed over, by name and with the reason. Nothing here knows of Trainer: these are folders and files.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

MANIFEST = "checkpoint_complete.json"
TRAINER_STATE = "trainer_state.json"
STAGED_MODEL = ".final_model"
LOCK = ".run.lock"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
HASH_BELOW = 2 * 2**30  # bytes; of larger files only the size is recorded, unless all is to be verified
FEWEST_KEPT = 2  # the newest may turn out to be damaged
Verify = Literal["hash", "size", "full"]
NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class PassedOver(NamedTuple):
    """A folder that looks like a checkpoint and is not one to go on from."""

    path: Path
    reason: str


class Found(NamedTuple):
    """The newest checkpoint that is whole, or None; and what was passed over."""

    checkpoint: Path | None
    passed_over: list[PassedOver]


def commit(folder: str | Path, facts: dict[str, Any], *, verify: Verify = "hash") -> Path:
    """Writes the manifest of a folder whose files are all written; from then on the folder counts.

    The manifest appears whole or not at all, and only after every file it lists has reached the disk.

    Args:
        folder: what is to count.
        facts: what must not differ when a run goes on from here; anything that JSON holds.
        verify: "hash" records the sha256 of each file below `HASH_BELOW` bytes, "full" of every file, "size" of none.

    Returns:
        The path of the manifest.
    """
    folder = Path(folder)
    files = {}
    for path in _files(folder):
        size = path.stat().st_size
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {
            "size": size,
            **({"sha256": sha256(path)} if verify == "full" or (verify == "hash" and size < HASH_BELOW) else {}),
        }
    write_atomically(folder / MANIFEST, _seal({"files": files, "facts": facts}))
    _sync(folder.parent)
    return folder / MANIFEST


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder: `{"files": {name: {"size", "sha256"}}, "facts": {...}}`.

    Raises:
        ValueError: if there is none, or it is not what was written.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"its save did not finish ({MANIFEST} is missing)")
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        sealed = {name: manifest[name] for name in ("files", "facts")}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{MANIFEST} cannot be read") from None
    if _seal(sealed) != text:
        raise ValueError(f"{MANIFEST} is not what was written")
    return sealed


def check(folder: str | Path, *, verify: Verify = "hash") -> dict[str, Any]:
    """Holds a folder to its manifest, and returns it.

    Args:
        verify: "size" reads no file; "hash" and "full" compare every hash that was recorded.

    Raises:
        ValueError: saying which file is missing or differs, and in what.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, recorded in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != recorded["size"]:
            raise ValueError(f"{name} has {path.stat().st_size:,} bytes, {recorded['size']:,} were written")
        if verify != "size" and "sha256" in recorded and sha256(path) != recorded["sha256"]:
            raise ValueError(f"{name} does not match its sha256")
    if TRAINER_STATE in manifest["files"]:
        read_trainer_state(folder)
    return manifest


def read_trainer_state(folder: str | Path) -> dict[str, Any]:
    """What Trainer knew when it saved.

    Raises:
        ValueError: if the file is missing or cut off.
    """
    try:
        state = json.loads((Path(folder) / TRAINER_STATE).read_text(encoding="utf-8"))
        int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{TRAINER_STATE} cannot be read") from None
    return state


def newest_committed(output_dir: str | Path, *, verify: Verify = "hash") -> Found:
    """The whole checkpoint with the highest step, and what was passed over: newer ones, and names that are no checkpoints.

    Only the step in the name decides: clocks jump, and copies change the time of a file.
    """
    steps, passed_over = _candidates(Path(output_dir))
    for step in sorted(steps, reverse=True):
        try:
            check(steps[step], verify=verify)
        except ValueError as reason:
            passed_over.append(PassedOver(steps[step], str(reason)))
        else:
            return Found(steps[step], passed_over)
    return Found(None, passed_over)


def prune(output_dir: str | Path, keep: int | None, *, protected: Collection[str | Path] = ()) -> list[Path]:
    """Removes the oldest committed checkpoints, and never the last two that are whole.

    Folders without a manifest are left alone: they may be another tool's.

    Args:
        keep: how many stay; None removes nothing.
        protected: checkpoints that stay in any case, such as the best one.

    Returns:
        What was removed.
    """
    if not keep:
        return []
    steps, _ = _candidates(Path(output_dir))
    whole = [step for step in sorted(steps, reverse=True) if _is_whole(steps[step])]
    kept = whole[: max(keep, FEWEST_KEPT)]
    guarded = {Path(path).resolve() for path in protected}
    removed = []
    for step in sorted(steps):
        path = steps[step]
        if len(whole) > len(kept) and step < kept[-1] and (path / MANIFEST).exists() and path.resolve() not in guarded:
            _remove(path)
            removed.append(path)
    return removed


def set_aside(output_dir: str | Path, after: int) -> list[Path]:
    """Renames the checkpoints of later steps, so that a run that starts before them never goes on from one of them.

    Returns:
        Their names now.
    """
    steps, _ = _candidates(Path(output_dir))
    renamed = []
    for step in sorted(step for step in steps if step > after):
        number = 1
        while (target := steps[step].with_name(f"{steps[step].name}.bak{number}")).exists():
            number += 1
        steps[step].rename(target)
        renamed.append(target)
    return renamed


def changed_facts(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Which facts differ: `{field: (old, new)}`. A field of a nested dict is named `outer.inner`."""
    flat_old, flat_new = dict(_flatten(old)), dict(_flatten(new))
    names = [*flat_old, *(name for name in flat_new if name not in flat_old)]
    return {
        name: (flat_old.get(name), flat_new.get(name)) for name in names if flat_old.get(name) != flat_new.get(name)
    }


@contextmanager
def staged_model(output_dir: str | Path) -> Iterator[Path]:
    """A folder to write a final model into, which `install_model` moves to `output_dir` once it is committed.

    However the writing ends, the model that was in `output_dir` before stays as it is.
    """
    staging = Path(output_dir) / STAGED_MODEL
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:  # Ctrl-C too; raised again below
        shutil.rmtree(staging, ignore_errors=True)
        raise


def install_model(output_dir: str | Path) -> bool:
    """Moves a staged and committed model into `output_dir`; goes on where an earlier attempt was cut off.

    config.json leaves first and comes back last but for the manifest: at no instant does the folder load with the
    config of one model and the weights of another.

    Returns:
        Whether there was one to install.
    """
    folder, staging = Path(output_dir), Path(output_dir) / STAGED_MODEL
    if not (staging / MANIFEST).is_file():
        return False
    manifest = read_manifest(staging)
    late = ("adapter_config.json", "config.json", MANIFEST)
    first_attempt = all((staging / name).is_file() for name in manifest["files"])
    if first_attempt:
        for name in (MANIFEST, *late):
            (folder / name).unlink(missing_ok=True)
        # Weights in another number of files would be found beside the ones that count
        for path in [*folder.glob("model*.safetensors*"), *folder.glob("adapter_model*")]:
            path.unlink()
    for name in sorted(manifest["files"], key=lambda name: (late.index(name) + 1 if name in late else 0, name)):
        if (staging / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, folder / name)
    os.replace(staging / MANIFEST, folder / MANIFEST)
    _sync(folder)
    shutil.rmtree(staging)
    return True


def is_trained(folder: str | Path) -> bool:
    """Whether a run in `folder` came to its end: a final model is committed there, and its files are there."""
    folder = Path(folder)
    try:
        return all((folder / name).is_file() for name in read_manifest(folder)["files"])
    except ValueError:
        return False


class RunLock:
    """One run an output folder: a second one is refused with the process id of the first.

    The lock goes with the process, however it ends: what a dead process left behind locks nobody out.

    Args:
        output_dir: made if it is not there.

    Raises:
        ValueError: on entering, if another process holds the lock, or the folder cannot be written.
    """

    def __init__(self, output_dir: str | Path):
        self.path = Path(output_dir) / LOCK
        self._file: Any = None

    def __enter__(self) -> "RunLock":
        check_writable(self.path.parent)
        self._file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"`output_dir` {self.path.parent} cannot be locked: {error.strerror}.") from None
            raise ValueError(
                f"`output_dir` {self.path.parent} is in use by another run (process {holder}): wait for it, stop it, "
                "or name another folder."
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.close()


def check_place(output_dir: str | Path) -> None:
    """Raises ValueError where a file stands in the way of a folder; makes nothing."""
    folder = Path(output_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"`output_dir` {folder} cannot be written: {there} is a file.")


def check_writable(output_dir: str | Path) -> None:
    """Makes the folder and a file in it.

    Raises:
        ValueError: naming the folder, if a file is in its place or it is read-only.
    """
    folder = Path(output_dir)
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"`output_dir` {folder} cannot be written: {error.strerror}.") from None


def is_no_space(error: BaseException) -> bool:
    """Whether a save failed because the disk, the quota or the largest file allowed is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in NO_SPACE
    # torch's zip writer and safetensors raise types of their own, with the system's number or none in the text
    text = str(error)
    numbers = any(f"os error {number}" in text for number in NO_SPACE)
    return numbers or "unexpected pos" in text or "PytorchStreamWriter failed" in text


def size_of(folder: str | Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in _files(Path(folder)))


def sha256(path: Path) -> str:
    """Of the bytes of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """A file that is there whole or not at all, power cuts included."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def _seal(manifest: dict[str, Any]) -> str:
    """The text of a manifest, with the hash of what it says."""
    content = json.dumps(manifest, indent=1, sort_keys=True)
    return json.dumps({**manifest, "sha256": hashlib.sha256(content.encode()).hexdigest()}, indent=1, sort_keys=True)


def _candidates(output_dir: Path) -> tuple[dict[int, Path], list[PassedOver]]:
    """Folders named `checkpoint-N` by step, and what only resembles them."""
    steps: dict[int, Path] = {}
    strays = []
    for path in sorted(output_dir.glob("checkpoint-*")):
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if match is None:
            strays.append(PassedOver(path, "not a name of a checkpoint"))
        elif path.is_symlink() and not path.exists():
            strays.append(PassedOver(path, "a symbolic link that leads nowhere"))
        elif not path.is_dir():
            strays.append(PassedOver(path, "not a folder"))
        elif str(int(match[1])) != match[1]:
            strays.append(PassedOver(path, "not a name of a checkpoint"))  # checkpoint-007, which Trainer never writes
        else:
            steps[int(match[1])] = path
    return steps, strays


def _is_whole(folder: Path) -> bool:
    try:
        check(folder, verify="size")
    except ValueError:
        return False
    return True


def _remove(checkpoint: Path) -> None:
    """The manifest goes last: what is cut off in here is seen to be a checkpoint's rest, and removed by the next."""
    for path in checkpoint.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MANIFEST:
            path.unlink()
    (checkpoint / MANIFEST).unlink()
    checkpoint.rmdir()


def _files(folder: Path) -> list[Path]:
    """Every file in a folder and below it, but for the manifest and what is half written of it."""
    own = {MANIFEST, f".{MANIFEST}.tmp"}
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in own]


def _flatten(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
