"""Checkpoint folders: tensors read one at a time, whole folders written or none."""

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .trust import check_config

# Names that the oldest BERT checkpoints use, in every family that came from their code
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class Checkpoint:
    """The tensors of a folder, by name; a file is opened when one of its tensors is read.

    Safetensors are preferred; a pickled file is read without running any code it may hold (`weights_only`).

    Args:
        folder: a folder as `save_pretrained` writes it, in one file or in shards.

    Raises:
        FileNotFoundError: if there are no weights, or a file that the index names is missing.
        ValueError: if a file lies outside the folder, or cannot be read, or if the config would have code run.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        check_config(folder)
        self.files = [inside(folder, name) for name in weight_files(folder)]
        self.specs: dict[str, torch.Tensor] = {}  # on the meta device: shape and dtype
        self._place: dict[str, tuple[Path, str]] = {}
        self._open: tuple[Path, dict[str, torch.Tensor]] | None = None
        for path in self.files:
            for name, spec in read_header(path).items():
                known = name
                for old, new in OLD_NAMES.items():
                    known = known.replace(old, new)
                self.specs[known], self._place[known] = spec, (path, name)

    @property
    def largest_file(self) -> int:
        """Bytes."""
        return max(path.stat().st_size for path in self.files)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor called `name`, which may be a view of its file."""
        path, stored = self._place[name]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(stored)
        if self._open is None or self._open[0] != path:
            self._open = (path, load_pickle(path))
        return self._open[1][stored]


def weight_files(folder: Path) -> list[str]:
    """The names of the files that hold the weights of a folder."""
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / whole).is_file():
            return [whole]
        if (folder / index).is_file():
            return sorted(set(read_index(inside(folder, index))))
    raise FileNotFoundError(f"{folder} holds neither {SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME}, whole or in shards.")


def read_index(path: Path) -> list[str]:
    """The names of the files that an index names, once for each tensor."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of weights ({error!r}); download or save it again.") from error


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a checkpoint, which must lie inside its folder.

    Raises:
        ValueError: if it leads out. FileNotFoundError: if it is missing.
    """
    root, path = folder.resolve(), (folder / name).resolve()
    if folder.parent.name == "snapshots":
        root = folder.parent.parent.resolve()  # in the Hub's cache, a snapshot's files are links to the repo's blobs
    if Path(name).name != name or not path.is_relative_to(root):
        raise ValueError(f"{name!r} leads out of {folder}; refusing to read it: copy the file into the folder.")
    if not path.is_file():
        raise FileNotFoundError(f"The index of {folder} names {name!r}, which is not there.")
    return folder / name


def read_header(path: Path) -> dict[str, torch.Tensor]:
    """{name: a tensor of its shape and dtype on the meta device} of one file of weights."""
    if path.suffix != ".safetensors":
        return {name: tensor.to("meta") for name, tensor in load_pickle(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            return {
                name: torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
                for name, part in slices.items()
            }
    except Exception as error:  # safetensors' own error type says neither which file nor what to do
        raise ValueError(f"{path} is not a whole safetensors file ({error}); download or save it again.") from error


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES |= {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file, mapped into memory; nothing in it is run."""
    try:
        # The oldest format is not a zip archive and cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise TypeError("not a dictionary of tensors")
        return tensors
    except Exception as error:
        raise ValueError(
            f"{path} is damaged or holds more than tensors ({type(error).__name__}); refusing to read it."
        ) from error


class ShardWriter:
    """Writes tensors into safetensors files of a bounded size, one in memory at a time.

    Args:
        folder: where to. specs: every tensor that will be written, on the meta device, in the order of writing.
        limit: bytes a file; a larger tensor has a file of its own.
    """

    def __init__(self, folder: Path, specs: dict[str, torch.Tensor], limit: int):
        self.folder = folder
        self.total = sum(spec.nbytes for spec in specs.values())
        self.shard_of: dict[str, int] = {}
        shard, size = 0, 0
        for name, spec in specs.items():
            if size and size + spec.nbytes > limit:
                shard, size = shard + 1, 0
            self.shard_of[name], size = shard, size + spec.nbytes
        self.last = shard
        self._held: dict[str, torch.Tensor] = {}

    def file_name(self, shard: int) -> str:
        if self.last == 0:
            return SAFE_WEIGHTS_NAME
        return f"model-{shard + 1:05}-of-{self.last + 1:05}.safetensors"

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes the next tensor; writes a file once it is full."""
        shard = self.shard_of[name]
        if self._held and self.shard_of[next(iter(self._held))] != shard:
            self.flush()
        self._held[name] = tensor

    def flush(self) -> None:
        """Writes the tensors that are held."""
        shard = self.shard_of[next(iter(self._held))]
        save_file(self._held, self.folder / self.file_name(shard), metadata={"format": "pt"})
        self._held = {}

    def close(self) -> None:
        """Writes the last file, and the index if there are several."""
        self.flush()
        if self.last > 0:
            weight_map = {name: self.file_name(shard) for name, shard in sorted(self.shard_of.items())}
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2) + "\n"
            (self.folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def refuse_existing(target: Path) -> None:
    """Raises `FileExistsError` if `target` exists and is not an empty folder."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise FileExistsError(f"{target} exists already: name another folder, or remove it first.")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, which takes its name when all went well, and is removed if not.

    Raises:
        FileExistsError: if `target` exists and is not an empty folder.
    """
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        if target.is_dir():
            target.rmdir()
        temporary.chmod(0o755)  # mkdtemp's is for its owner alone
        temporary.rename(target)
    except BaseException:  # Ctrl-C too; raised again below
        shutil.rmtree(temporary, ignore_errors=True)
        raise
