"""One test class a form, from the module that the environment variable `SUITE` names: forms or reference."""

import importlib
import os

from harness import build_test_class

forms = importlib.import_module(os.environ["SUITE"]).FORMS
globals().update({test_class.__name__: test_class for test_class in map(build_test_class, forms)})
