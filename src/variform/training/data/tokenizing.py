"""Texts become the token ids that a task trains on; what is cut off, dropped or impossible is counted or refused.

Results are cached by `datasets`: by the content of the rows, of the tokenizer, of the options and of this file. Rows that are
in memory only, as those of packages are, are tokenized each time.
"""

import hashlib
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow.compute
from datasets import Dataset, DatasetDict
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from .windows import start_of

IGNORED = -100
# Of a row: whether its text was longer than it may be, and whether anything of it is trained on
CUT, TRAINED = "_cut", "_trained"
# Answers to questions: the offsets of a token that is not of the context, and the places tried for either end
OUTSIDE = [-1, -1]
CANDIDATES = 20
CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

Batch = dict[str, list]


class Tokenized(NamedTuple):
    """Token ids, and how many examples of each split were cut or dropped: `{"train truncated": 3, ...}`."""

    data: DatasetDict
    report: dict[str, int]


def tokenize_documents(
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    vocab_size: int | None = None,
    starts: bool = False,
) -> Tokenized:
    """`text` -> `input_ids`, `attention_mask`, `labels` for a causal model: an example a text.

    A text that fits ends with `eos_token`, where the tokenizer has one and puts no special token there itself. Labels are the
    ids, as transformers' causal models shift them.

    Args:
        max_length: tokens; what is beyond is cut off.
        vocab_size: of the model; an id beyond it is refused.
        starts: each text begins as `windows.encode` has it, for a model that writes: many tokenizers put no start there
            themselves, and nothing would teach how a text begins.
    """
    return _tokenize(data, _documents, tokenizer, vocab_size, max_length=max_length, starts=starts)


def _documents(batch: Batch, tokenizer: PreTrainedTokenizerBase, max_length: int, starts: bool) -> Batch:
    start = _missing_start(tokenizer) if starts else []
    encoded, cut = _encode(tokenizer, batch["text"], max_length=max_length - len(start))
    rows = [[*start, *row] for row in encoded["input_ids"]]
    ids = [
        [*row, *_missing_end(row, tokenizer)] if len(row) < max_length and not is_cut else row
        for row, is_cut in zip(rows, cut)
    ]
    return {**_causal(ids), CUT: cut}


def tokenize_blocks(
    data: DatasetDict, tokenizer: PreTrainedTokenizerBase, *, block_size: int, vocab_size: int | None = None
) -> Tokenized:
    """As `tokenize_documents`, but the texts are joined and cut into blocks of `block_size` tokens.

    Nothing is left out but blocks of one token, of which nothing is predicted. The last block of each 1,000 texts is shorter.
    """
    return _tokenize(data, _blocks, tokenizer, vocab_size, block_size=block_size)


def _blocks(batch: Batch, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Batch:
    rows = tokenizer(batch["text"], verbose=False)["input_ids"]
    blocks = _cut_blocks([[*row, *_missing_end(row, tokenizer)] for row in rows], block_size)
    return {**_causal(blocks), CUT: [False] * len(blocks)}


def tokenize_masked(
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    blocks: bool = False,
    vocab_size: int | None = None,
) -> Tokenized:
    """`text` -> `input_ids`, `attention_mask`, `special_tokens_mask`, for a collator that masks.

    Args:
        max_length: tokens; what is beyond is cut off.
        blocks: join the texts and cut them into blocks of `max_length` instead.
    """
    return _tokenize(data, _masked, tokenizer, vocab_size, max_length=max_length, blocks=blocks)


def _masked(batch: Batch, tokenizer: PreTrainedTokenizerBase, max_length: int, blocks: bool) -> Batch:
    options = {"return_special_tokens_mask": True}
    if blocks:
        encoded = tokenizer(batch["text"], verbose=False, **options)
        ids, special = (_cut_blocks(encoded[name], max_length) for name in ("input_ids", "special_tokens_mask"))
        cut = [False] * len(ids)
    else:
        encoded, cut = _encode(tokenizer, batch["text"], max_length=max_length, **options)
        ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    return {
        "input_ids": ids,
        "attention_mask": _ones(ids),
        "special_tokens_mask": special,
        CUT: cut,
        TRAINED: [0 in mask for mask in special],
    }


def tokenize_pairs(
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_source_length: int,
    max_target_length: int,
    prefix: str = "",
    vocab_size: int | None = None,
    target_vocab_size: int | None = None,
) -> Tokenized:
    """`text`, `target` -> `input_ids`, `attention_mask`, `labels` for an encoder-decoder.

    Args:
        max_source_length, max_target_length: tokens; what is beyond is cut off.
        prefix: put before each text, such as "translate English to Italian: ".
        vocab_size: of the encoder; an id beyond it is refused. target_vocab_size: the same of the decoder.
    """
    pairs = _tokenize(
        data,
        _pairs,
        tokenizer,
        vocab_size,
        max_source_length=max_source_length,
        max_target_length=max_target_length,
        prefix=prefix,
    )
    if target_vocab_size is not None:
        for rows in pairs.data.values():
            check_ids(rows, tokenizer, target_vocab_size, column="labels")
    return pairs


def _pairs(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, max_source_length: int, max_target_length: int, prefix: str
) -> Batch:
    texts = [prefix + text for text in batch["text"]]
    source, source_cut = _encode(tokenizer, texts, max_length=max_source_length)
    target, target_cut = _encode(tokenizer, text_target=batch["target"], max_length=max_target_length)
    ids = source["input_ids"]
    return {
        "input_ids": ids,
        "attention_mask": _ones(ids),
        "labels": target["input_ids"],
        CUT: [first or second for first, second in zip(source_cut, target_cut)],
        TRAINED: [bool(labels) for labels in target["input_ids"]],
    }


def tokenize_classes(
    data: DatasetDict, tokenizer: PreTrainedTokenizerBase, *, max_length: int, vocab_size: int | None = None
) -> Tokenized:
    """`text`, perhaps `text_pair`, and `label` -> what the tokenizer makes of a text (or of a pair), and `labels`."""
    return _tokenize(data, _classes, tokenizer, vocab_size, max_length=max_length)


def _classes(batch: Batch, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Batch:
    texts = [batch[role] for role in ("text", "text_pair") if role in batch]
    encoded, cut = _encode(tokenizer, *texts, max_length=max_length)
    return {**encoded, "labels": batch["label"], CUT: cut, TRAINED: [True] * len(cut)}


def tokenize_words(
    data: DatasetDict, tokenizer: PreTrainedTokenizerBase, *, max_length: int, vocab_size: int | None = None
) -> Tokenized:
    """`tokens`, `tags` -> what the tokenizer makes of them, and `labels`: the tag at the first piece of a word, else -100.

    Raises:
        ValueError: for a tokenizer that cannot tell which word a piece is of.
    """
    _check_fast(tokenizer)
    return _tokenize(data, _words, tokenizer, vocab_size, max_length=max_length)


def _words(batch: Batch, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Batch:
    rows = batch["tokens"]
    if _spaces_begin_words(tokenizer):
        rows = [[*row[:1], *(f" {word}" for word in row[1:])] for row in rows]
    encoded, cut = _encode(tokenizer, rows, max_length=max_length, is_split_into_words=True)
    labels = []
    for row, tags in enumerate(batch["tags"]):
        words = encoded.word_ids(row)
        begins = [word is not None and word != before for word, before in zip(words, [None, *words])]
        labels.append([tags[word] if first else IGNORED for word, first in zip(words, begins)])
    return {**encoded, "labels": labels, CUT: cut, TRAINED: [any(tag != IGNORED for tag in row) for row in labels]}


def _spaces_begin_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether words are other tokens inside a text than one by one: byte-level BPE counts the space before a word to it."""

    def ids(text: str | list[str]) -> list[int]:
        return tokenizer(text, add_special_tokens=False, is_split_into_words=isinstance(text, list))["input_ids"]

    return ids(["a", " b"]) == ids("a b") != ids(["a", "b"])


def tokenize_questions(
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    stride: int,
    vocab_size: int | None = None,
) -> Tokenized:
    """`question`, `context`, `answers` -> windows with `start_positions`, `end_positions`, `example` and `offsets`.

    A context that is too long for one window goes on in the next, which repeats `stride` of its tokens. The positions are
    those of the first and the last token of the first answer that the window holds; where it holds none, of `cls_token`, else
    of the first token. `example` is the number of the row; `offsets` are `[begin, end)` of each token in its context, in
    characters, and [-1, -1] outside of it.

    Raises:
        ValueError: a question that leaves no room for more than `stride` tokens of its context.
    """
    _check_fast(tokenizer)
    return _tokenize(data, _questions, tokenizer, vocab_size, with_indices=True, max_length=max_length, stride=stride)


def _questions(
    batch: Batch, numbers: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> Batch:
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - stride
    for number, ids in zip(
        numbers, tokenizer(batch["question"], add_special_tokens=False, verbose=False)["input_ids"]
    ):
        if len(ids) >= room:
            raise ValueError(
                f"Question {number} has {len(ids)} tokens: `max_length={max_length}` leaves no room for more than "
                f"`stride={stride}` tokens of its context. Raise the one or lower the other."
            )
    windows = tokenizer(
        batch["question"],
        batch["context"],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    rows = windows.pop("overflow_to_sample_mapping")
    spans = windows.pop("offset_mapping")
    offsets = [
        [list(span) if part == 1 else OUTSIDE for span, part in zip(spans[window], windows.sequence_ids(window))]
        for window in range(len(rows))
    ]
    positions = [
        _answer_tokens(offsets[window], ids, batch["answers"][row], tokenizer)
        for window, (row, ids) in enumerate(zip(rows, windows["input_ids"]))
    ]
    return {
        **windows,
        "start_positions": [start for start, _ in positions],
        "end_positions": [end for _, end in positions],
        "example": [numbers[row] for row in rows],
        "offsets": offsets,
        CUT: [False] * len(rows),
        TRAINED: [True] * len(rows),
    }


def _answer_tokens(
    offsets: list[list[int]], ids: list[int], answers: dict[str, list], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """The first and last token of the first answer that lies in the window, else twice that of `cls_token`."""
    for text, begin in zip(answers["text"], answers["answer_start"]):
        end = begin + len(text)
        tokens = [place for place, (first, last) in enumerate(offsets) if first < end and last > begin]
        if tokens and offsets[tokens[0]][0] <= begin and offsets[tokens[-1]][1] >= end:
            return tokens[0], tokens[-1]
    nowhere = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
    return nowhere, nowhere


def _tokenize(
    data: DatasetDict,
    function: Callable[..., Batch],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int | None,
    *,
    with_indices: bool = False,
    **options: Any,
) -> Tokenized:
    """Apply `function` to batches of every split, drop what has nothing to train on, and count.

    Raises:
        ValueError: where nothing is left of a split, or an id is beyond `vocab_size`.
    """
    for name, value in options.items():
        if name.endswith(("length", "size")) and value < 2:
            raise ValueError(f"`{name}={value}` must be at least 2 tokens.")
    tokenized, report = DatasetDict(), {}
    for split, rows in data.items():
        done = rows.map(
            function,
            batched=True,
            with_indices=with_indices,
            remove_columns=rows.column_names,
            fn_kwargs={"tokenizer": tokenizer, **options},
            # `datasets` itself goes by the name of a function, not by what it does
            new_fingerprint=Hasher.hash([rows._fingerprint, CODE, function.__name__, tokenizer, options]),
            desc=f"Tokenizing {split}",
        )
        kept = [number for number, is_trained in enumerate(done[TRAINED]) if is_trained]
        report[f"{split} truncated"], report[f"{split} dropped"] = sum(done[CUT]), len(done) - len(kept)
        if not kept:
            raise ValueError(
                f"None of the {len(done):,} examples of `{split}` has a token to train on: 0 % are trainable. "
                "Are they empty, or is the length too short for more than special tokens?"
            )
        done = done.remove_columns([CUT, TRAINED])
        tokenized[split] = done if len(kept) == len(done) else done.select(kept)
        if vocab_size is not None:
            check_ids(tokenized[split], tokenizer, vocab_size)
    return Tokenized(tokenized, report)


def check_ids(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, column: str = "input_ids"
) -> None:
    """Refuse token ids that a model has no embedding for.

    Args:
        vocab_size: of the stack that reads the column.

    Raises:
        ValueError: names the first such id, where it stands, and what to do.
    """
    ids = rows.with_format("arrow")[:][column] if len(rows) else pyarrow.chunked_array([[[0]]])
    highest = pyarrow.compute.max(pyarrow.compute.list_flatten(ids)).as_py()
    if highest < vocab_size:
        return
    for number, row in enumerate(rows[column]):
        wrong = next((place for place, token in enumerate(row) if token >= vocab_size), None)
        if wrong is not None:
            raise ValueError(
                f"{column}[{number}, {wrong}] = {row[wrong]}, but `vocab_size` is {vocab_size} (the tokenizer has "
                f"{len(tokenizer)}): take the tokenizer of the model, or `resize_token_embeddings`."
            )


def _encode(
    tokenizer: PreTrainedTokenizerBase, *texts: Sequence, max_length: int, **options: Any
) -> tuple[Any, list[bool]]:
    """What the tokenizer makes of texts, at most `max_length` tokens each, and which of them were longer."""
    encoded = tokenizer(*texts, verbose=False, **options)
    cut = [len(ids) > max_length for ids in encoded["input_ids"]]
    if any(cut):
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, **options)
    return encoded, cut


def _missing_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that a text begins with in a list, where the tokenizer has one and does not put it there itself."""
    start = start_of(tokenizer)
    return [] if start is None or tokenizer("a")["input_ids"][:1] == [start] else [start]


def _missing_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`eos_token_id` in a list where the ids do not end with a special token, else an empty list."""
    has_end = bool(ids) and len(ids) > 1 and ids[-1] in tokenizer.all_special_ids
    return [] if has_end or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _cut_blocks(rows: Sequence[list[int]], size: int) -> list[list[int]]:
    stream = list(chain.from_iterable(rows))
    return [stream[begin : begin + size] for begin in range(0, len(stream), size)]


def _causal(ids: list[list[int]]) -> Batch:
    return {"input_ids": ids, "attention_mask": _ones(ids), "labels": ids, TRAINED: [len(row) > 1 for row in ids]}


def _ones(rows: list[list[int]]) -> list[list[int]]:
    return [[1] * len(row) for row in rows]


def _check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell which characters a token is of: take a fast tokenizer (of `tokenizers`)."
        )


def best_answers(
    data: Dataset, windows: Dataset, start_logits: Any, end_logits: Any, *, max_answer_tokens: int = 30
) -> list[str]:
    """The likeliest answer to each question, from all windows of its context.

    Args:
        data: the rows that were tokenized. windows: what `tokenize_questions` made of them.
        start_logits, end_logits: `(windows, seq)`, perhaps padded on the right.

    Returns:
        A text for each row of `data`, "" where no window has a token of the context.
    """
    best = [(-numpy.inf, "")] * len(data)
    contexts = data["context"]
    for row, (number, offsets) in enumerate(zip(windows["example"], windows["offsets"])):
        start, end = (numpy.asarray(logits[row])[: len(offsets)] for logits in (start_logits, end_logits))
        inside = numpy.array([first >= 0 for first, _ in offsets])
        for first in _likeliest(start, inside):
            for last in _likeliest(end, inside):
                score = float(start[first] + end[last])
                if first <= last < first + max_answer_tokens and score > best[number][0]:
                    best[number] = score, contexts[number][offsets[first][0] : offsets[last][1]]
    return [text for _, text in best]


def _likeliest(logits: numpy.ndarray, inside: numpy.ndarray) -> Sequence[int]:
    order = numpy.argsort(-numpy.where(inside, logits, -numpy.inf), kind="stable")[:CANDIDATES]
    return [int(place) for place in order if inside[place]]
