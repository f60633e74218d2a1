"""docs/patterns.md keeps its word: its formulas are the counted pairs, its pictures are drawn by its script."""

import ast
import random
import re
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from variform.model.pattern_base import Text, count_visible, public_fields
from variform.model.patterns import PATTERNS, parse
from variform.model.sparse_patterns import Lsh
from variform.report.pairs import expected_pairs

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "patterns.md").read_text(encoding="utf-8")
NUM_HEADS = 4
# On which each formula is tried
TEXTS = 15


class Formula(NamedTuple):
    """How many scores a pattern has, as the page says it."""

    spec: str  # with capital letters for numbers
    is_causal: bool
    definitions: dict[str, str]
    scores: str
    conditions: list[str]

    def at(self, numbers):
        """Whether the formula holds for these numbers, and its value."""
        names = dict(numbers)
        if not all(eval(condition, {}, names) for condition in self.conditions):
            return False, 0
        names |= {name: eval(meaning, {}, names) for name, meaning in self.definitions.items()}
        return True, eval(self.scores, {}, names)


def tables():
    """`{pattern: {label: cell}}` of the sections that are about a pattern."""
    found = {}
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        rows = dict(re.findall(r"^\| ([^|]+?) \| (.+) \|$", section, flags=re.MULTILINE))
        if "string" in rows:
            found[rows["string"].strip("`").partition(":")[0]] = {**rows, "section": section}
    return found


TABLES = tables()


def formulas():
    found = {}
    for name, rows in TABLES.items():
        for label in (label for label in rows if label.startswith("scores")):
            options = re.findall(r"`(.*?)`", label)
            codes = re.findall(r"`(.*?)`", rows[label])
            definitions = dict(code.split(" = ") for code in codes if " = " in code)
            scores, *conditions = [code for code in codes if " = " not in code]
            spec = ",".join([rows["string"].strip("`"), *options])
            found[f"{name}, {label}"] = Formula(spec, "causal" in label, definitions, scores, conditions)
    return found


FORMULAS = formulas()


def fill_in(template, numbers):
    """The template with numbers for its capital letters."""
    return re.sub(r"\b[A-Z]\b", lambda letter: str(numbers[letter[0]]), template)


def draw(generator, letters):
    return {letter: generator.randint(1 if letter != "T" else 0, 9) for letter in sorted(letters)}


def is_refused(pattern, is_causal):
    try:
        pattern.check(is_causal, sys.maxsize, NUM_HEADS)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_is_the_number_of_pairs(name):
    formula = FORMULAS[name]
    generator, found = random.Random(0), 0
    letters = set(re.findall(r"\b[A-Z]\b", " ".join([formula.spec, formula.scores, *formula.conditions])))
    for _ in range(20000):
        numbers = draw(generator, letters)
        length = generator.randint(1, 200)
        pattern = parse(fill_in(formula.spec, numbers))
        holds, scores = formula.at({"n": length, **numbers})
        if not holds or is_refused(pattern, formula.is_causal):
            continue
        text = Text(length, formula.is_causal, prefix=numbers.get("P", 0))
        if isinstance(pattern, Lsh):
            counted = expected_pairs(pattern, length, formula.is_causal)
        else:
            counted = count_visible(pattern, text, NUM_HEADS)
        assert scores == pytest.approx(counted, rel=1e-12), f"{pattern} on {length} tokens"
        found += 1
        if found == TEXTS:
            break
    assert found == TEXTS, "The conditions of the formula leave hardly a text."


def test_every_pattern_has_its_section():
    assert set(TABLES) == set(PATTERNS)


@pytest.mark.parametrize("name", TABLES)
def test_the_string_and_the_dict_mean_the_same(name):
    rows, generator = TABLES[name], random.Random(0)
    numbers = {letter: 2 * generator.randint(1, 9) for letter in "BCGRSTW"}
    spec, entry = (fill_in(rows[label].strip("`"), numbers) for label in ("string", "dict"))
    assert parse(spec) == parse(ast.literal_eval(entry))


@pytest.mark.parametrize("name", TABLES)
def test_every_option_is_told_with_its_default(name):
    section = TABLES[name]["section"]
    options = public_fields(PATTERNS[name])
    told = dict(re.findall(r"^- `(\w+)`(?: \((.*?)\))?", section, flags=re.MULTILINE))
    in_the_string = [field.name for field in options if f'"{field.name}"' in TABLES[name]["dict"]]
    missing = {field.name for field in options} - set(told) - set(in_the_string)
    assert not missing
    for field in options:
        if told.get(field.name):
            assert ast.literal_eval(told[field.name].capitalize() if field.type is bool else told[field.name]) == (
                field.default
            )


@pytest.mark.parametrize("name", TABLES)
def test_a_pattern_may_be_used_where_the_page_says(name):
    rows = TABLES[name]
    pattern = parse(fill_in(rows["string"].strip("`"), dict.fromkeys("BCGRSTW", 4)))
    said = {"encoder": False, "decoder": True}
    assert {shape: shape in rows["where"] for shape in said} == {
        shape: not is_refused(pattern, is_causal) for shape, is_causal in said.items()
    }


@pytest.mark.parametrize("name", TABLES)
def test_a_cache_keeps_what_the_page_says(name):
    rows, generator = TABLES[name], random.Random(0)
    for _ in range(5):
        numbers = {letter: generator.randint(2, 9) for letter in "BCGRSTW"}
        kept = parse(fill_in(rows["string"].strip("`"), numbers)).retained(is_causal=True)
        said = rows["cache"].split("`")
        assert kept == (None if rows["cache"].startswith("all") else eval(said[1], {}, numbers))


def test_the_script_draws_the_pictures_of_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["draw_patterns.py", str(tmp_path)])
    runpy.run_path(str(DOCS / "draw_patterns.py"), run_name="__main__")
    named = set(re.findall(r"\]\(patterns/(\w+\.png)\)", PAGE))
    assert {path.name for path in tmp_path.iterdir()} == named
    assert {path.name for path in (DOCS / "patterns").iterdir()} == named


@pytest.mark.parametrize("name", TABLES)
def test_a_section_shows_its_own_picture(name):
    assert f"(patterns/{name}.png)" in TABLES[name]["section"]
