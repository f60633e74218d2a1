"""The pairs that patterns show are those of their masks, whatever their numbers and the length of the text."""

from typing import Literal, get_args, get_origin

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from variform.model.pattern_base import Pattern, Text, public_fields, visible_matrix
from variform.model.patterns import PATTERNS, parse
from variform.model.sparse_patterns import Column, Lsh, Near
from variform.report.pairs import PAIRS, visible_pairs

LONGEST = 60
# Those of `lsh` depend on the states: what is expected of them is in test_costs.py
COUNTED = sorted(set(PATTERNS) - {Lsh.name})


def values(field) -> st.SearchStrategy:
    if field.type is bool:
        return st.booleans()
    if get_origin(field.type) is Literal:
        return st.sampled_from(get_args(field.type))
    numbers = st.integers(field.metadata["at_least"], 9)
    return numbers if field.type is int else numbers | st.lists(numbers, min_size=1, max_size=3)


def entries(name: str) -> st.SearchStrategy:
    fields = {field.name: values(field) for field in public_fields(PATTERNS[name])}
    return st.fixed_dictionaries({"name": st.just(name), **fields})


def counted(pattern: Pattern, text: Text, num_heads: int) -> float:
    heads = pattern.by_head(num_heads).items()
    return sum(int(visible_matrix(own, text).sum()) * len(of_heads) for own, of_heads in heads) / num_heads


@pytest.mark.parametrize("name", COUNTED)
@settings(max_examples=150)
@given(data=st.data())
def test_pairs_are_those_of_the_mask(name, data):
    pattern = parse(data.draw(entries(name))).at_layer(data.draw(st.integers(0, 3)))
    text, num_heads = Text(data.draw(st.integers(1, LONGEST)), data.draw(st.booleans())), data.draw(st.integers(1, 4))
    try:
        pattern.check(text.is_causal, 10 * LONGEST, num_heads)
    except ValueError:
        assume(False)
    assert visible_pairs(pattern, text.length, text.is_causal, num_heads) == counted(pattern, text, num_heads)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("half", [Near(3), Column(3), Column(3, is_far=True)])
def test_pairs_of_one_half_are_those_of_its_mask(half, is_causal):
    for length in (1, 3, 10):
        assert visible_pairs(half, length, is_causal) == counted(half, Text(length, is_causal), 1)


def test_every_pattern_of_heads_is_counted():
    assert set(PAIRS) == {*PATTERNS.values(), Near, Column}
