"""Packing: several documents in one row, in place of padding; each computes what it would alone.

`PackedDataset` decides which documents share a row, `PackingCollator` lays rows out as a model reads them. Positions restart
at each document, which is how a model of ours tells them apart: none sees another, and an encoder-decoder's target sees the
source of its own.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedConfig

# Documents that are packed together: more fill rows no better, and take longer to place
WINDOW = 4096
# Per token, besides the ids and labels, and what the padding behind the documents has
OTHER_FIELDS = {"token_type_ids": 0, "global_attention_mask": 0}

Example = dict[str, Any]
Rows = list[list[list[int]]]  # of documents, of tokens


def plan_rows(lengths: np.ndarray, room: Sequence[int], *, seed: int = 0, window: int = WINDOW) -> list[list[int]]:
    """Which documents share a row: first fit, longest first, within windows of shuffled documents.

    A document goes into the first row of its window that has room for it on every side (first-fit decreasing: at
    most about 11/9 of the fewest rows that one side would need; Johnson, 1973).

    Args:
        lengths: `(documents, sides)` int, in tokens. room: of a row, on each side, in tokens.
        seed: of the shuffle; the plan is a function of it, of the lengths and of the room alone.
        window: documents that are packed together.

    Returns:
        The documents of each row.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).numpy()
    rows: list[list[int]] = []
    for start in range(0, len(order), window):
        documents = order[start : start + window]
        fullest = (lengths[documents] / np.asarray(room)).max(axis=1)
        left = np.empty((len(documents), len(room)), dtype=np.int64)  # a line for each open row
        opened: list[list[int]] = []
        for document in documents[np.argsort(-fullest, kind="stable")].tolist():
            fits = (left[: len(opened)] >= lengths[document]).all(axis=1)
            row = int(fits.argmax()) if fits.any() else len(opened)
            if row == len(opened):
                opened.append([])
                left[row] = room
            opened[row].append(document)
            left[row] -= lengths[document]
        rows += opened
    return rows


class PackedDataset(Dataset):
    """Rows of documents: `self[row]` is the list of those that share it, as `dataset` gives them. For `PackingCollator`.

    Rows are planned once, from the seed. A Trainer shuffles them by its own seed and the epoch, shares them out among
    processes and resumes among them, as it does with single examples; its batch size counts rows.

    Args:
        dataset: examples with `input_ids` and, for an encoder-decoder, `labels`, without padding.
        max_length: tokens of a row. max_target_length: of its targets, for an encoder-decoder.
        lengths: tokens of each example, or (source, target); default: read from all of `dataset`, once.
        seed, window: as for `plan_rows`.

    Raises:
        ValueError: for documents that are empty or longer than a row, with their number.
        TypeError: for a dataset without a length.
    """

    def __init__(
        self,
        dataset: Any,
        max_length: int,
        *,
        max_target_length: int | None = None,
        lengths: Sequence | None = None,
        seed: int = 0,
        window: int = WINDOW,
    ):
        if not hasattr(dataset, "__len__"):
            raise TypeError(
                f"`dataset` is a {type(dataset).__name__} without a length: rows are planned from all of it."
            )
        self.dataset = dataset
        self.room = {"max_length": max_length}
        if max_target_length is not None:
            self.room["max_target_length"] = max_target_length
        if lengths is None:
            names = ("input_ids", "labels")[: len(self.room)]
            lengths = [[len(example[name]) for name in names] for example in dataset]
        table = np.asarray(lengths, dtype=np.int64).reshape(len(dataset), len(self.room))
        for side, (name, room) in enumerate(self.room.items()):
            own = table[:, side]
            if (own > room).any():
                raise ValueError(
                    f"{(own > room).sum():,} of {len(own):,} documents are longer than `{name}={room}`, the longest has "
                    f"{own.max():,} tokens: cut them when tokenizing (`truncation=True, max_length={room}`), or raise `{name}`."
                )
            if (own < 1).any():
                raise ValueError(f"{(own < 1).sum():,} of {len(own):,} documents are empty: leave them out.")
        self.num_tokens = table.sum(axis=0).tolist()
        self.rows = plan_rows(table, list(self.room.values()), seed=seed, window=window)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> list[Example]:
        return [self.dataset[document] for document in self.rows[row]]

    def facts(self) -> str:
        """Documents, rows and how full these are, in words."""
        filled = (tokens / (len(self) * room) for tokens, room in zip(self.num_tokens, self.room.values()))
        shares = " and ".join(f"{100 * share:.1f} %" for share in filled)
        sizes = " + ".join(f"{room:,}" for room in self.room.values())
        return f"{len(self.dataset):,} documents in {len(self):,} rows of {sizes} tokens, {shares} full"


class PackingCollator:
    """Rows of documents as the inputs of a model: `PackedDataset`'s rows, padded at the end to one length.

    A decoder's labels are its ids, or the example's `labels`, in place; the first token of each document has none, since the
    token before it is another document's. An encoder-decoder's decoder starts each target with `decoder_start_token_id`. A
    Trainer counts the labels that are left, so that a packed batch weighs as its documents do.

    Args:
        config: of the model; reads its shape and ids.
        max_length: tokens of a row. max_target_length: of its targets, for an encoder-decoder.
        masking: hides tokens for a masked language model, `(input_ids, special_tokens_mask)` -> ids and labels:
            `DataCollatorForLanguageModeling(tokenizer).torch_mask_tokens`.

    Raises:
        ValueError: for a form whose experts serve rows, not documents, or an encoder-decoder without what it needs.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_length: int,
        *,
        max_target_length: int | None = None,
        masking: Callable | None = None,
    ):
        form: Any = config
        self.is_pair = form.is_encoder_decoder
        stacks = [form.encoder, form.decoder] if self.is_pair else [form]
        if any(stack.routes_by_row for stack in stacks):
            raise ValueError(
                "Packed documents would compete for experts: `router_type='expert_choice'` and expert capacities count over "
                "whole rows; give one document a row, or let tokens choose without capacity."
            )
        if self.is_pair and (form.decoder_start_token_id is None or max_target_length is None):
            raise ValueError("To pack pairs, give `max_target_length`, and a config with `decoder_start_token_id`.")
        self.is_causal = not self.is_pair and form.is_causal_stack
        self.start_id: Any = form.decoder_start_token_id if self.is_pair else None
        # Padding is hidden, so any id will do where the form has none
        self.pad_id = form.pad_token_id or 0
        self.max_length, self.masking = max_length, masking
        self.max_target_length: Any = max_target_length

    def __call__(self, rows: Sequence[Sequence[Example]]) -> dict[str, torch.Tensor]:
        """Rows of examples -> `(rows, max_length)` tensors: ids, positions, mask and labels; for pairs, the decoder's too.

        Raises:
            ValueError: for rows longer than `max_length`, examples with padding, or labels that are not one a token.
        """
        inputs = read(rows, "input_ids")
        if "attention_mask" in rows[0][0] and not all(
            all(mask) for row in read(rows, "attention_mask") for mask in row
        ):
            raise ValueError("`attention_mask` marks padding inside an example: tokenize without padding.")
        batch = self._side("", inputs, self.max_length)
        for name, filler in OTHER_FIELDS.items():
            if name in rows[0][0]:
                batch[name] = lay(read(rows, name), self.max_length, filler)
        labels = read(rows, "labels") if "labels" in rows[0][0] else None
        if self.is_pair:
            if labels is None:
                raise ValueError(f"An example has the fields {sorted(rows[0][0])}; a pair needs `labels`.")
            batch |= self._side(
                "decoder_", [[self._shift(target) for target in row] for row in labels], self.max_target_length
            )
            batch["labels"] = lay(labels, self.max_target_length, -100)
        elif self.masking is not None:
            special = None  # then it is the tokenizer that knows them, padding among them
            if "special_tokens_mask" in rows[0][0]:
                special = lay(read(rows, "special_tokens_mask"), self.max_length, 1)
            batch["input_ids"], batch["labels"] = self.masking(batch["input_ids"], special_tokens_mask=special)
        elif labels is not None or self.is_causal:
            labels = inputs if labels is None else labels
            check_alike(inputs, labels)
            if self.is_causal:
                labels = [[[-100, *document[1:]] for document in row] for row in labels]
            batch["labels"] = lay(labels, self.max_length, -100)
        return batch

    def _side(self, prefix: str, rows: Rows, length: int) -> dict[str, torch.Tensor]:
        """Ids, positions and mask of an encoder or a decoder."""
        positions = [[list(range(len(document))) for document in row] for row in rows]
        real = [[[1] * len(document) for document in row] for row in rows]
        return {
            f"{prefix}input_ids": lay(rows, length, self.pad_id),
            f"{prefix}position_ids": lay(positions, length, 0),
            f"{prefix}attention_mask": lay(real, length, 0),
        }

    def _shift(self, target: list[int]) -> list[int]:
        """A decoder's inputs for a target."""
        return [self.start_id, *(self.pad_id if token == -100 else token for token in target[:-1])]


class PackedOrPlain:
    """Collates packed rows, which are trained on, and plain examples, which are judged, for a Trainer that has one collator.

    Args:
        packed: for a row that is a list of examples. plain: for rows that are examples.
    """

    def __init__(self, packed: PackingCollator, plain: Callable):
        self.packed, self.plain = packed, plain

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        return self.packed(rows) if isinstance(rows[0], list) else self.plain(rows)


def read(rows: Sequence[Sequence[Example]], name: str) -> Rows:
    """A field of all examples, given as lists, arrays or tensors; a single number is a list of one."""
    return [[np.atleast_1d(np.asarray(example[name])).tolist() for example in row] for row in rows]


def check_alike(inputs: Rows, labels: Rows) -> None:
    """Refuses labels that are not one a token."""
    for ids, own in zip(itertools.chain(*inputs), itertools.chain(*labels)):
        if len(ids) != len(own):
            raise ValueError(
                f"`labels` has length {len(own)} for a document of {len(ids)} tokens: give one a token. "
                "Documents that have one label each cannot be packed."
            )


def lay(rows: Rows, length: int, filler: int) -> torch.Tensor:
    """`(rows, length)` int64: the documents of each row end to end, and what fills it up."""
    laid = [[token for document in row for token in document] for row in rows]
    longest = max(map(len, laid))
    if longest > length:
        raise ValueError(f"A row holds {longest} tokens, more than the {length} that rows are planned for.")
    return torch.tensor([row + [filler] * (length - len(row)) for row in laid])
