"""What there is to draw of patterns and forms: one view for each group of heads whose queries see alike."""

import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ..model.local_patterns import LocalGlobal
from ..model.pattern_base import Full, Pattern, PrefixLm, Text
from ..model.patterns import parse
from ..model.sparse_patterns import BigBird, Lsh
from .costs import stacks_of

# Without a length, texts have so many tokens, or more where a pattern would hide nothing of them
SHORT_LENGTH = 32
# Of a layer whose form is not given
NUM_HEADS = 4
# A picture of a longer text would take more than seconds, or gigabytes where all of its pairs are looked at together
LONGEST_LENGTH, LONGEST_AT_ONCE = 16384, 4096
# Without a prefix, the prefix of a prefix language model is this part of a text
PREFIX_PART = 4

Subject = str | dict[str, Any] | Pattern | PreTrainedConfig | Sequence[str | dict[str, Any] | Pattern]


class View(NamedTuple):
    """One picture: what the queries of some heads of some layers see."""

    title: str  # the pattern as a config writes it
    where: str  # which way it sees, and which stack, layers and heads it is of, where there are others
    pattern: Pattern  # of these heads
    text: Text
    documents: tuple[int, ...] = ()  # the lengths of those that are packed into the text, in tokens; none: it is one
    note: str = ""  # what the picture does not say by itself


class Layers(NamedTuple):
    """Layers with one entry of `attention_patterns`, of which one is drawn."""

    entry: Pattern  # as the config writes it
    drawn: Pattern  # as the first of the layers has it
    is_causal: bool
    num_heads: int
    words: list[str]  # that tell these from others


def views_of(
    subject: Subject,
    *,
    length: int | None = None,
    is_causal: bool | None = None,
    num_heads: int | None = None,
    marked: Sequence[int] = (),
    prefix: int | None = None,
    documents: Sequence[int] = (),
) -> list[View]:
    """The pictures of patterns, or of a form's distinct layers: one for each group of heads that see alike.

    Args:
        subject: a pattern or several, as values or as a config's entries; or a config of any shape.
        length: of the text in tokens. Default: 32, or longer where a pattern would hide nothing, within what a form reads.
        is_causal: draw only what a causal stack, or only what an encoder sees; for patterns. Default: both, where they can be.
        num_heads: of a layer, for patterns; default 4.
        marked: places that a `global_attention_mask` marks, for "local_global".
        prefix: how many first tokens see each other both ways, for "prefix_lm"; of documents, in each. Default: a quarter of
            the text, or of the shortest document.
        documents: lengths of documents that are packed into the text, in tokens, in place of `length`.

    Raises:
        ValueError: for a pattern that cannot be, or an option that nothing in the picture would read.
    """
    if isinstance(subject, PreTrainedConfig):
        if is_causal is not None or num_heads is not None:
            raise ValueError(
                "`is_causal` (--causal, --both-ways) and `num_heads` (--heads) are for patterns: a form's stacks have their "
                "own; leave them out."
            )
        drawn = layers_of_form(subject)
        longest = max(stack.max_position_embeddings for stack in stacks_of(subject).values())
    else:
        entries = [subject] if isinstance(subject, (str, dict, Pattern)) else subject
        patterns = [entry if isinstance(entry, Pattern) else parse(entry) for entry in entries]
        num_heads = NUM_HEADS if num_heads is None else num_heads
        drawn = [layers for pattern in patterns for layers in layers_of_pattern(pattern, is_causal, num_heads)]
        longest = LONGEST_LENGTH
    if documents:
        length = length_of(documents, length)
    elif length is None:
        length = enough_length(drawn, min(longest, LONGEST_LENGTH))
    text = Text(length, is_causal=True, marked=tuple(sorted(set(marked))), prefix=prefix or 0)
    check_text({layers.entry.name for layers in drawn}, text, documents)
    if prefix is None:
        text = text._replace(prefix=min(documents, default=length) // PREFIX_PART)
    return [view for layers in drawn for view in views_by_head(layers, text, tuple(documents))]


def layers_of_form(config: PreTrainedConfig) -> list[Layers]:
    """The distinct entries of each stack, with the numbers of their layers, counted from 0."""
    stacks, found = stacks_of(config), []
    for side, stack in stacks.items():
        entries = [parse(entry) for entry in stack.attention_patterns]
        numbers: dict[Pattern, list[int]] = {}
        for layer_idx in range(stack.num_hidden_layers):
            numbers.setdefault(entries[layer_idx % len(entries)], []).append(layer_idx)
        for entry, own in numbers.items():
            words = [side] * (len(stacks) > 1) + [way_of(stack.is_causal_stack), spans("layer", own)]
            drawn = entry.at_layer(own[0])
            found.append(Layers(entry, drawn, stack.is_causal_stack, stack.num_attention_heads, words))
    return found


def layers_of_pattern(pattern: Pattern, is_causal: bool | None, num_heads: int) -> list[Layers]:
    """A layer for each way in which a pattern can see, or for the one that is given.

    Raises:
        ValueError: if there is none, with the reason that a config would give.
    """
    if num_heads < 1:
        raise ValueError(f"`num_heads={num_heads}` (--heads) must be at least 1.")
    found, refusals = [], []
    for way in [False, True] if is_causal is None else [is_causal]:
        try:
            pattern.check(way, sys.maxsize, num_heads)
        except ValueError as error:
            refusals.append(error)
        else:
            found.append(Layers(pattern, pattern, way, num_heads, [way_of(way)]))
    if not found:
        raise refusals[0]
    return found


def way_of(is_causal: bool) -> str:
    return "causal" if is_causal else "both ways"


def length_of(documents: Sequence[int], length: int | None) -> int:
    """The tokens of a row of documents.

    Raises:
        ValueError: for an empty document, or another length beside them.
    """
    if min(documents) < 1:
        raise ValueError(f"`documents={list(documents)}` (--documents) must have 1 token each, or more.")
    if length not in (None, sum(documents)):
        raise ValueError(
            f"`length={length}` beside `documents={list(documents)}` of {sum(documents)} tokens: leave it out."
        )
    return sum(documents)


def enough_length(drawn: Sequence[Layers], longest: int) -> int:
    """A length at which each pattern shows its shape: 32 times a power of two, or the longest."""
    most = max(longest_plain(part.entry, part.is_causal) for part in drawn)
    length = SHORT_LENGTH
    while length < min(longest, 3 * most):
        length *= 2
    return min(length, longest, LONGEST_AT_ONCE if any(isinstance(part.entry, Lsh) for part in drawn) else longest)


def longest_plain(pattern: Pattern, is_causal: bool) -> int:
    """The longest text in which a pattern hides nothing; 0 where that is none, or all."""
    if isinstance(pattern, Lsh) and pattern.chunked:
        return 2 * pattern.chunk
    if isinstance(pattern, Full):
        return 0
    return int(pattern.longest_whole(is_causal))


def check_text(names: set[str], text: Text, documents: Sequence[int]) -> None:
    """Refuses a text that cannot be drawn, and marks and prefixes that no pattern reads.

    Raises:
        ValueError: naming the argument.
    """
    length = text.length
    if not 1 <= length <= LONGEST_LENGTH:
        raise ValueError(f"`length={length}` must lie between 1 and {LONGEST_LENGTH} tokens.")
    if length > LONGEST_AT_ONCE and (documents or "lsh" in names):
        what = "a pack of documents" if documents else "an example of 'lsh'"
        raise ValueError(f"`length={length}` is too long for {what}: at most {LONGEST_AT_ONCE} tokens.")
    if text.marked and "local_global" not in names:
        raise ValueError(
            "`marked` places (--global) are read by 'local_global', which nothing here has: leave them out."
        )
    outside = [place for place in text.marked if not 0 <= place < length]
    if outside:
        raise ValueError(
            f"`marked={outside[0]}` (--global) is no place of a text of {length} tokens, counted from 0; choose others, or a "
            "longer text."
        )
    if text.prefix != 0 and "prefix_lm" not in names:
        raise ValueError(
            f"`prefix={text.prefix}` (--prefix) is read by 'prefix_lm', which nothing here has: leave it out."
        )
    if not 0 <= text.prefix <= length:
        raise ValueError(f"`prefix={text.prefix}` (--prefix) must lie between 0 and the {length} tokens of the text.")


def views_by_head(layers: Layers, text: Text, documents: tuple[int, ...]) -> list[View]:
    """The pictures of one layer, one for each group of heads. Of the text, each reads what its pattern does."""
    groups, views = layers.drawn.by_head(layers.num_heads), []
    for pattern, heads in groups.items():
        words = layers.words + [spans("head", heads)] * (len(groups) > 1)
        own = Text(text.length, layers.is_causal)
        if isinstance(pattern, LocalGlobal) and text.marked:
            own = own._replace(marked=text.marked)
            words = [*words, spans("place", text.marked) + " marked"]
        if isinstance(pattern, PrefixLm) and text.prefix > 0:
            own = own._replace(prefix=text.prefix)
            words = [*words, f"prefix {text.prefix}"]
        if documents:
            words = [*words, f"{len(documents)} document{'s' if len(documents) > 1 else ''}"]
        longest = max(documents, default=text.length)
        note = note_on(pattern, own._replace(length=longest))
        views.append(View(str(layers.entry), ", ".join(words), pattern, own, documents, note))
    return views


def note_on(pattern: Pattern, text: Text) -> str:
    """A sentence on a picture that would mislead without one; else an empty text."""
    if isinstance(pattern, Lsh):
        return "An example: which keys hash alike depends on the states, here random ones."
    if isinstance(pattern, PrefixLm) and text.prefix == 0:
        return "Without a prefix, as full."
    longest = longest_plain(pattern, text.is_causal)
    if longest > 1 and text.length <= longest:
        return f"Texts of up to {longest} tokens are seen whole."
    if isinstance(pattern, LocalGlobal) and not pattern.tokens and not text.marked:
        return "No token is global here: none is marked."
    if isinstance(pattern, BigBird) and pattern.random > 0 and pattern.placement == "random":
        return f"Each layer draws its own random blocks; these are layer {pattern.layer}'s."
    return ""


def spans(noun: str, numbers: Sequence[int]) -> str:
    """`("layer", [0, 1, 2, 5])` as "layers 0-2, 5"; the numbers rise."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(words)}"
