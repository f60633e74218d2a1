"""Fixtures of the tests that compare a native model with ours."""

import copy

import pytest
import yaml
from native_models import hash_as_ours
from pairs import Case, Pair, build
from transformers import PreTrainedConfig


def as_yaml(config: PreTrainedConfig) -> str:
    """What a config says beyond the defaults."""
    values = config.to_diff_dict()
    values |= {name: getattr(config, name).to_diff_dict() for name in ("encoder", "decoder") if name in values}
    return yaml.safe_dump(values)


@pytest.fixture
def one_hash(monkeypatch):
    """Reformer's class draws the numbers that it hashes with."""
    hash_as_ours(monkeypatch)


@pytest.fixture
def pair(case: Case) -> Pair:
    """The models of a case, of the test's own: some change with the texts they have seen (dynamic rope)."""
    print(f"seed {case.seed}, native config:\n{as_yaml(case.config)}")
    models = copy.deepcopy(build(case))
    print(f"form:\n{as_yaml(models.ours.config)}")
    return models
