"""Batches of like length: nothing lost, nothing sorted across batches, the same order again."""

import pytest
import torch

from variform.training.data.buckets import LengthBucketSampler

LENGTHS = torch.randint(1, 30, (2011,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture
def sampler():
    return LengthBucketSampler(LENGTHS, 8, seed=3)


def batches(sampler):
    order = list(sampler)
    return [order[at : at + 8] for at in range(0, len(order), 8)]


def test_every_example_comes_once_an_epoch(sampler):
    assert len(sampler) == 2011
    assert sorted(sampler) == list(range(2011))


def test_the_examples_of_a_batch_are_of_like_length(sampler):
    spread = [max(LENGTHS[i] for i in batch) - min(LENGTHS[i] for i in batch) for batch in batches(sampler)]
    assert sum(spread) / len(spread) < 2  # 8 random ones span 23 on average


def test_the_order_of_batches_says_nothing_about_length(sampler):
    means = torch.tensor([sum(LENGTHS[i] for i in batch) / len(batch) for batch in batches(sampler)])
    neighbours = torch.corrcoef(torch.stack([means[:-1], means[1:]]))[0, 1]
    assert neighbours.abs() < 0.25


def test_an_epoch_can_be_repeated(sampler):
    sampler.set_epoch(4)
    assert list(sampler) == list(sampler)


def test_epochs_and_seeds_differ(sampler):
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthBucketSampler(LENGTHS, 8, seed=4)) != first


def test_tuples_are_compared_in_order():
    lengths = [(1, 2), (1, 1), (0, 9), (0, 3)]
    pairs = batches_of_two(LengthBucketSampler(lengths, 2))
    assert {frozenset(pair) for pair in pairs} == {frozenset({0, 1}), frozenset({2, 3})}


def batches_of_two(sampler):
    order = list(sampler)
    return [order[:2], order[2:]]
