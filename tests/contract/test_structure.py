"""The payload is built as transformers builds its own models, by the judgement of transformers' own linter."""

import pytest

pytest.importorskip("mlinter", reason="transformers-mlinter belongs to the `lint` extra")

import lint_payload


@pytest.fixture(scope="module")
def broken():
    return lint_payload.lint()


def test_no_rule_of_the_platform_is_broken(broken):
    assert {rule: places for rule, places in broken.items() if rule not in lint_payload.SWITCHED_OFF} == {}


def test_a_rule_is_switched_off_only_where_something_breaks_it(broken):
    assert set(lint_payload.SWITCHED_OFF) <= set(broken)


def test_the_linter_reads_every_file(broken):
    """Every file breaks the rule on license headers."""
    files = {path.name for path in lint_payload.PAYLOAD.glob("*.py")} - {"__init__.py"}
    assert {place.split(":")[0] for place in broken["TRF028"]} == files
