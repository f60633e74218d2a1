"""What every test runs under: no network, fixed seeds, and memory that shows when it was read before it was written."""

import os
import sys

# Read when transformers is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import set_seed

# Derandomized, so that a red run is red again; `HYPOTHESIS_PROFILE=search` looks for new examples
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("fixed", derandomize=True, database=None, deadline=None, suppress_health_check=CHECKS)
settings.register_profile("search", deadline=None, suppress_health_check=CHECKS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers for every test, in whichever order they run."""
    set_seed(0)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """`torch.empty` gives NaN (integers: the largest), as `torch.utils.deterministic` does it in deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def nothing_is_compiled():
    """Graphs of other tests count against the limit of recompilations, and tests run in any order."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["stats"]:
        dynamo.reset()
        dynamo.utils.counters.clear()
