"""The family's configs, patterns, words and costs without torch and transformers, whose imports take seconds.

`variform --help` and `variform info` need fields, checks, patterns and arithmetic: plain Python, in files that also import
torch and transformers for what they do with models. `light` runs such a file a second time, in a package of its own, in which
stand-ins are imported in place of the two. So there is one table of fields, one set of checks and one set of words. What
a config takes from transformers is transformers' own: its files on configs are run over stand-ins as well.

The stand-ins compute nothing: what would use them raises `NeedsTorch`, and so does what transformers would warn of. The real
classes are then asked.
"""

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

# The files of this package a second time, under a name of their own
MIRROR = "_variform_light"
# Those that are nothing without torch, whose names others import
HEAVY = (f"{MIRROR}.model.moe", f"{MIRROR}.model.stacks")
# The files of transformers that are run over stand-ins for all others
PLAIN = (
    "transformers.configuration_utils",
    "transformers.modeling_rope_utils",
    "transformers.generation.configuration_utils",
    "transformers.integrations.heterogeneity",
    "transformers.integrations.heterogeneity.configuration_utils",
)
SPEC: Any = importlib.util.find_spec("transformers")
TRANSFORMERS = Path(SPEC.submodule_search_locations[0])
# The bytes of a number, by dtype; other dtypes are torch's to know
ITEM_SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
# The stand-ins and what was run over them, by name, while they are not in `sys.modules`
standing_in: dict[str, ModuleType] = {}


def is_hidden(name: str) -> bool:
    return name.partition(".")[0] in ("torch", "transformers")


class NeedsTorch(ImportError):
    """What was asked for takes the real torch or transformers."""


class Names(type):
    """Of a class that stands for a module or a name in it: it has every name."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Names(name, (Absent,), {})


class Absent(metaclass=Names):
    """A name of an absent module: good in annotations and as a base class, and for nothing else."""

    def __new__(cls, *args, **kwargs):
        raise NeedsTorch(f"{cls.__name__} is not there: torch and transformers are not imported.")


class AbsentModule(ModuleType):
    """A module from which every name can be imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Names(name, (Absent,), {})


class StandIns:
    """Finds an absent module wherever one of torch, of transformers or of `HEAVY` is imported that is not `PLAIN`."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        is_absent = name in HEAVY or (is_hidden(name) and name not in PLAIN)
        return ModuleSpec(name, StandIns, is_package=True) if is_absent else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return AbsentModule(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        root, *folders = module.__name__.split(".")
        module.__path__ = [str(TRANSFORMERS.joinpath(*folders))] if root == "transformers" else []


class DType(NamedTuple):
    """A dtype of torch, as far as words and arithmetic go."""

    name: str
    itemsize: int

    def __str__(self) -> str:
        return f"torch.{self.name}"


class Logger:
    """transformers' logger: what it would show by default is left to the real one."""

    def info(self, *words: Any) -> None:
        """Shows nothing."""

    def warning(self, *words: Any) -> None:
        if logging.getLogger("transformers").isEnabledFor(logging.WARNING):
            raise NeedsTorch("transformers has a warning to give.")

    warning_once = warning

    @classmethod
    def get_logger(cls, name: str) -> "Logger":
        return cls()


class NoHub:
    """`PushToHubMixin`."""

    def push_to_hub(self, *args, **kwargs):
        raise NeedsTorch("transformers is not imported: nothing can be pushed.")


@functools.cache
def furnish() -> None:
    """Gives the stand-ins those names of theirs with which something is computed."""
    torch, transformers, utils, activations = (
        importlib.import_module(name)
        for name in ("torch", "transformers", "transformers.utils", "transformers.activations")
    )
    vars(torch).update({name: DType(name, size) for name, size in ITEM_SIZES.items()})
    vars(transformers).update(__version__=importlib.metadata.version("transformers"))
    vars(activations).update(ACT2FN=words_of_table("activations.py", "ACT2CLS"))
    vars(utils).update(
        PushToHubMixin=NoHub,
        copy_func=lambda function: function,
        is_torch_available=lambda: False,
        logging=Logger,
        resolve_revision=lambda path, revision, **options: revision,
    )
    parent: Any = importlib.import_module("transformers.configuration_utils").PreTrainedConfig

    class Config(parent):
        def __post_init__(self, **kwargs):
            for dtype in (self.dtype, kwargs.get("torch_dtype")):
                if dtype not in (None, *ITEM_SIZES):
                    raise NeedsTorch(f"`dtype={dtype}` is for torch to know.")
            super().__post_init__(**kwargs)

    generation = importlib.import_module("transformers.generation.configuration_utils")
    vars(transformers).update(PreTrainedConfig=Config, GenerationConfig=generation.GenerationConfig)


def words_of_table(file: str, name: str) -> list[str]:
    """The keys of a table of transformers, `name = {"key": ...}`, read from the text of the file."""
    for node in ast.parse((TRANSFORMERS / file).read_text(encoding="utf-8")).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and target.id == name and isinstance(node.value, ast.Dict):
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    raise NeedsTorch(f"transformers' {file} has no table {name}.")


@contextmanager
def without_torch() -> Iterator[None]:
    """Within it, imports find the stand-ins; the real modules, where they are imported already, are put aside."""
    if StandIns in sys.meta_path:
        yield
        return
    real = {name: sys.modules.pop(name) for name in [*sys.modules] if is_hidden(name)}
    sys.modules.update(standing_in)
    sys.meta_path.insert(0, StandIns)  # type: ignore[arg-type]
    try:
        furnish()
        yield
    finally:
        sys.meta_path.remove(StandIns)  # type: ignore[arg-type]
        standing_in.update({name: sys.modules.pop(name) for name in [*sys.modules] if is_hidden(name)})
        sys.modules.update(real)


def light(name: str) -> Any:
    """The module `variform.<name>`, such as "model.patterns", without torch and transformers.

    What its functions import when they are called they find only `without_torch`.
    """
    with without_torch():
        if MIRROR not in sys.modules:
            package = ModuleType(MIRROR)
            package.__path__ = [str(Path(__file__).parent)]
            sys.modules[MIRROR] = package
        return importlib.import_module(f"{MIRROR}.{name}")
