"""Batches of examples of like length, in an order that says nothing about length."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

BATCHES_SORTED_TOGETHER = 50


class LengthBucketSampler(Sampler[int]):
    """Yields indices so that each run of `batch_size` of them has examples of nearly equal lengths.

    Every epoch shuffles the examples, sorts each 50 batches of them by length, and shuffles the batches. The order
    is a function of `seed` and the epoch alone: a run resumed in the middle of an epoch sees the examples it missed.

    Differs: transformers' `group_by_length` leaves sorted batches in their order (long ones first, again and again),
    knows one length an example, and draws from the global generator.

    Args:
        lengths: a number or a tuple of numbers (source, target) for each example; tuples are compared in order.
        batch_size: examples a batch, on all processes together.
        seed: of the shuffles.
    """

    def __init__(self, lengths: Sequence, batch_size: int, *, seed: int = 0):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle; Trainer calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        bucket = BATCHES_SORTED_TOGETHER * self.batch_size
        batches = []
        for start in range(0, len(order), bucket):
            alike = sorted(order[start : start + bucket], key=self.lengths.__getitem__)
            batches += [alike[at : at + self.batch_size] for at in range(0, len(alike), self.batch_size)]
        # A last batch that is short stays last: before others it would shift their borders
        full = len(order) // self.batch_size
        for index in torch.randperm(full, generator=generator).tolist():
            yield from batches[index]
        for batch in batches[full:]:
            yield from batch
