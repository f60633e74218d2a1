"""The table of docs/reliability.md: all sixty cases, each with a test that is there or the reason for none."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
ROWS = {
    int(row[0]): row[1:]
    for line in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and (row := [cell.strip() for cell in line.strip("| ").split(" | ")])[0].isdigit()
}


@cache
def names_in(path: str) -> set[str]:
    """The names of the test functions of a file, of its classes too."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_case_is_there_once():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)]
    assert sorted(numbers) == list(range(1, 61))


@pytest.mark.parametrize("number", ROWS)
def test_a_case_says_what_happens_and_names_a_test_or_a_reason(number):
    case, answer, shown = ROWS[number]
    assert case
    assert answer
    named = NAMED.findall(shown)
    assert named or shown.startswith("no test: "), shown
    for path, name in named:
        assert (ROOT / path).is_file(), path
        assert name in names_in(path), f"{path} has no {name}"
