"""Joins these stand-ins and transformers' own tests into one package, ahead of any `tests` that a library has installed."""

import os

__path__.append(os.path.join(os.environ["SUITE_TESTS"], "tests"))
