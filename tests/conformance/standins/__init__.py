"""What the source distribution of transformers lacks of its tests, written anew: to be imported before `tests`."""

import sys

import transformers.utils

# Two of the test modules import transformers once more through its source folder, only to read names off it: the
# installed library has the same names, and is imported already
transformers.utils.direct_transformers_import = lambda path, file="__init__.py": sys.modules["transformers"]
