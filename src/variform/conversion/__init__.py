"""Foreign checkpoints into the family and back, exactly."""

import importlib
import pkgutil

from . import families
from .family import Family

# {model_type: family}: every module of `families` that says what a FAMILY is
FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        importlib.import_module(f"{families.__name__}.{info.name}") for info in pkgutil.iter_modules(families.__path__)
    )
}
