"""Span corruption: spans of a text are replaced by sentinels, and told as the answer (T5, arXiv:1910.10683, sec. 3.1.4)."""

import re
from typing import Any

import numpy
from datasets import Dataset as Rows
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

SENTINEL = re.compile(r"<extra_id_(\d+)>")


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of `<extra_id_0>`, `<extra_id_1>` ..., in this order.

    Raises:
        ValueError: where the tokenizer has none.
    """
    found = {
        int(match[1]): token for name, token in tokenizer.get_vocab().items() if (match := SENTINEL.fullmatch(name))
    }
    if 0 not in found:
        raise ValueError(
            "`tokenizer` has no sentinels, tokens `<extra_id_0>`, `<extra_id_1>` ..., for span corruption: train one with "
            "`finetune/tokenizer.py --sentinels 100`, or add them and resize the model."
        )
    return [found[number] for number in sorted(found)]


def noise_mask(length: int, *, density: float, mean_span: float, generator: numpy.random.Generator) -> numpy.ndarray:
    """`(length,)` bool, True where a token is cut out: as many of them, and of spans, as T5 has.

    The first token is kept and the last one is cut out, so that texts and spans alternate.
    """
    noise = min(max(round(length * density), 1), length - 1)
    spans = max(min(round(noise / mean_span), noise, length - noise), 1)
    lengths = numpy.stack([_segments(length - noise, spans, generator), _segments(noise, spans, generator)], axis=1)
    return numpy.repeat(numpy.arange(2 * spans) % 2 == 1, lengths.reshape(-1))


def _segments(total: int, number: int, generator: numpy.random.Generator) -> numpy.ndarray:
    """`number` lengths of at least 1 that add up to `total`, all such rows being equally likely."""
    ends = (
        numpy.sort(generator.choice(total - 1, size=number - 1, replace=False)) + 1 if total > 1 else numpy.array([])
    )
    return numpy.diff(ends, prepend=0, append=total).astype(int)


class SpanCorruption(Dataset):
    """Examples `{"input_ids", "labels"}`, made anew each time from token ids.

    What is cut out is decided by seed, epoch and number of the example, and by nothing else: a run that is resumed sees what
    it would have seen. Special tokens are left out of the text; both sides end with `eos_token`, where there is one.

    Args:
        rows: with a column `input_ids`. Those with less than two tokens besides special ones are left out.
        noise_density: the part of the tokens that is cut out.
        mean_span: tokens a span, on average.

    Raises:
        ValueError: a tokenizer with fewer sentinels than the longest text has spans, or a density outside (0, 1).
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        *,
        noise_density: float = 0.15,
        mean_span: float = 3.0,
        seed: int = 0,
    ):
        if not 0 < noise_density < 1 or mean_span < 1:
            raise ValueError(
                f"`noise_density={noise_density}` must be between 0 and 1, and `mean_span={mean_span}` at least 1."
            )
        self.density, self.mean_span, self.seed, self.epoch = noise_density, mean_span, seed, 0
        self.sentinels = sentinel_ids(tokenizer)
        self.special = set(tokenizer.all_special_ids) - set(self.sentinels)
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.rows = rows
        lengths = [sum(token not in self.special for token in ids) for ids in rows["input_ids"]]
        self.numbers = [number for number, length in enumerate(lengths) if length >= 2]
        spans = round(round(max(lengths, default=0) * noise_density) / mean_span)
        if spans > len(self.sentinels):
            raise ValueError(
                f"A text of {max(lengths)} tokens has {spans} spans cut out, but the tokenizer has "
                f"{len(self.sentinels)} sentinels: shorten the texts, or add `<extra_id_...>` tokens."
            )

    def set_epoch(self, epoch: int) -> None:
        """Cut out other spans."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        number = self.numbers[index]
        ids = numpy.array([token for token in self.rows[number]["input_ids"] if token not in self.special])
        generator = numpy.random.default_rng([self.seed, self.epoch, number])
        is_noise = noise_mask(len(ids), density=self.density, mean_span=self.mean_span, generator=generator)
        return {
            "input_ids": [*self._replace(ids, is_noise), *self.end],
            "labels": [*self._replace(ids, ~is_noise), *self.end],
        }

    def _replace(self, ids: numpy.ndarray, is_replaced: numpy.ndarray) -> list[int]:
        """The ids, each run that is replaced being one sentinel."""
        begins = is_replaced & ~numpy.concatenate([[False], is_replaced[:-1]])
        with_sentinels = numpy.where(begins, numpy.take(self.sentinels, numpy.cumsum(begins) - 1, mode="clip"), ids)
        return with_sentinels[begins | ~is_replaced].tolist()


class SetEpoch(TrainerCallback):
    """Tells the epoch to what has a `set_epoch` of its own: in many processes accelerate tells only the sampler."""

    def __init__(self, told: Any):
        self.told = told

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.told.set_epoch(int(state.epoch or 0))
