"""The console script `variform`: it begins without torch and transformers, whose imports take seconds."""

import importlib.util
import sys
from types import ModuleType
from typing import Any


def main() -> int:
    """Runs `variform.cli.main` in a process that has not run `variform/__init__.py`, which registers the family.

    A command that loads models has it registered; `--help` and `info` have no need of it.
    """
    if "variform" not in sys.modules:
        sys.modules["variform"] = package_on_demand()
    from variform.cli import main

    return main()


def package_on_demand() -> ModuleType:
    """The package `variform`, whose `__init__` runs when one of its names is asked for."""
    spec: Any = importlib.util.find_spec("variform")
    package = importlib.util.module_from_spec(spec)

    def get(name: str) -> Any:
        if name.startswith("__") or importlib.util.find_spec(f"variform.{name}") is not None:
            raise AttributeError(f"module 'variform' has no attribute {name!r}")
        del package.__dict__["__getattr__"]
        spec.loader.exec_module(package)
        return getattr(package, name)

    package.__dict__["__getattr__"] = get
    return package


if __name__ == "__main__":
    sys.exit(main())
