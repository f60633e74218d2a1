"""Foreign checkpoints into the family and back, exactly."""

import importlib
import pkgutil

from . import families
from .family import Family

# {name of the file, mostly the model_type: family}: every module of `families` that says what a FAMILY is
FAMILIES: dict[str, Family] = {
    info.name: importlib.import_module(f"{families.__name__}.{info.name}").FAMILY
    for info in pkgutil.iter_modules(families.__path__)
}
