"""A stream of tokens in windows that predict every token once, and the bits per byte that a model needs for it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, ends: bool = False) -> torch.Tensor:
    """One stream of tokens, int32, in which each text begins with a token that says so.

    That is the one which the tokenizer puts there, else its `bos_token` or, as GPT-2 has it, its `eos_token`.

    Args:
        ends: each text also ends with the `eos_token`, where that is another one: a model learns to stop from it.

    Raises:
        ValueError: for a tokenizer without such a token.
    """
    start = start_of(tokenizer)
    if start is None:
        raise ValueError("`tokenizer` has neither a `bos_token` nor an `eos_token` to begin a text with.")
    end = [tokenizer.eos_token_id] if ends and tokenizer.eos_token_id not in (None, start) else []
    pieces = []
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]  # longer than a model reads at once: it reads windows
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        pieces.append(torch.tensor([*([] if ids[:1] == [start] else [start]), *ids, *end], dtype=torch.int32))
    return torch.cat(pieces)


def start_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that a text begins with: the `bos_token` or, as GPT-2 has it, the `eos_token`."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def begin(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text that is to be gone on with: as the tokenizer gives them, without an end."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


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
    longer, from at least `context - stride` tokens. A stream of one token has none to predict, and no window.
    """
    if length < 2:
        return
    end = min(context, length)
    yield Window(stream, 0, 1, end)
    while end < length:
        scored_from, end = end, min(end + stride, length)
        yield Window(stream, end - context, scored_from, end)


class TokenWindows(Dataset):
    """Examples `{"input_ids", "labels"}` of at most `context` tokens; only a stream that is shorter has a shorter one.

    Labels stand at the token they name, as transformers' causal models expect them, and are -100 where the token was
    predicted in an earlier window.

    Args:
        streams: what `encode` gives; a window never leaves its stream.
        context: tokens a window.
        stride: see `make_windows`. Training takes `context - 1`, so that windows hardly overlap.

    Raises:
        ValueError: a stride that skips tokens, or a context without room for one prediction.
    """

    def __init__(self, streams: Sequence[torch.Tensor], *, context: int, stride: int):
        if context < 2:
            raise ValueError(
                f"`max_length={context}` must be at least 2 tokens: one to predict, one to predict it from."
            )
        if not 1 <= stride < context:
            raise ValueError(f"The stride must be at least 1 and below `max_length={context}`, got {stride}.")
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
        return {"input_ids": tokens, "labels": labels}


def pad_causal(examples: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Collates examples for a causal model: filled up on the right, with a mask only where something was filled up.

    Args:
        examples: `{"input_ids", "labels"}` as tensors or lists.
    """
    rows, targets = ([torch.as_tensor(example[name]) for example in examples] for name in ("input_ids", "labels"))
    longest = max(len(row) for row in rows)
    batch = {
        "input_ids": torch.stack([F.pad(row, (0, longest - len(row))) for row in rows]),
        "labels": torch.stack([F.pad(row, (0, longest - len(row)), value=IGNORED) for row in targets]),
    }
    if any(len(row) < longest for row in rows):
        lengths = torch.tensor([len(row) for row in rows])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


def count_surprise(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`preprocess_logits_for_metrics` for a Trainer: logits become what `BitsPerByte` needs of them.

    Args:
        logits: `(batch, seq, vocab_size)`. labels: `(batch, seq)`, those of `TokenWindows`.

    Returns:
        `(batch, 2)` float32: the surprise at the labelled tokens, in nats, and their number.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    # A row a token: with the classes in the middle, or without the last position, all logits would be copied
    nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    sums = nats.view_as(targets).sum(dim=1)
    return torch.stack((sums, (targets != IGNORED).sum(dim=1).to(sums.dtype)), dim=1)


class BitsPerByte:
    """`compute_metrics` for a Trainer: bits for each byte of the text, which models of any vocabulary can be compared by.

    Args:
        num_bytes: of the text that was scored, in UTF-8.
    """

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        nats, tokens = prediction.predictions.astype("float64").sum(axis=0).tolist()
        return {"bits_per_byte": nats / self.num_bytes / math.log(2), "perplexity": math.exp(nats / tokens)}


def token_perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for a Trainer, after `count_surprise`."""
    nats, tokens = prediction.predictions.astype("float64").sum(axis=0).tolist()
    return {"perplexity": math.exp(nats / tokens)}


@torch.no_grad()
def measure(model: PreTrainedModel, windows: Dataset, *, batch_size: int = 8) -> tuple[float, int]:
    """The surprise of a model at the labels of `windows`, in nats, and their number."""
    total = torch.zeros(2, dtype=torch.float64)
    for batch in DataLoader(windows, batch_size=batch_size, collate_fn=pad_causal):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        total += count_surprise(model(**batch, use_cache=False).logits, labels).double().sum(dim=0).cpu()
    nats, tokens = total.tolist()
    return nats, int(tokens)
