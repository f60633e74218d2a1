"""The family's configs, patterns and words without torch and transformers, whose imports take seconds.

`variform --help` and `variform info config.json` need fields, checks and patterns: plain Python, in files that also import
torch and transformers for what they do with models. `light` runs such a file a second time, in a package of its own in which
stand-ins are imported in place of the two. So there is one table of fields, one set of checks and one set of words.

The stand-ins compute nothing: what would use them raises `NeedsTorch`. What is refused here, for whatever reason, is for the
real classes to judge, which know more: a plain rotation is checked here, and a scaled one is refused.
"""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

# The files of this package a second time, under a name of their own
MIRROR = "_variform_light"
# Those that are nothing without torch, whose names others import
HEAVY = ("model.moe", "model.stacks")


class NeedsTorch(ImportError):
    """What was asked for takes the real torch or transformers."""


class Names(type):
    """Of a class that stands for a module or a name in it: it has every name."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Names(name, (Absent,), {})

    def __str__(cls) -> str:
        return cls.__name__


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


class NoGeneration:
    """`GenerationConfig`, of which a form has no parameters."""

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return {}


@dataclass(kw_only=True)
class FieldsOnly:
    """`PreTrainedConfig`, as far as a form's fields go: values, defaults, and the stacks of a pair."""

    sub_configs_defaults: ClassVar[dict[str, Any]] = {}

    transformers_version: str | None = None
    architectures: list[str] | None = None
    output_hidden_states: bool | None = False
    return_dict: bool | None = True
    dtype: Any = None
    chunk_size_feed_forward: int = 0
    is_encoder_decoder: bool = False
    id2label: Any = None
    label2id: Any = None
    problem_type: str | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        dataclass(cls, kw_only=True, repr=False)
        cls.__init__ = FieldsOnly.set_fields  # type: ignore[method-assign]

    def set_fields(self, **values: Any) -> None:
        for field in dataclasses.fields(self):
            if field.name in values:
                value = values.pop(field.name)
            else:
                has_factory = field.default_factory is not dataclasses.MISSING
                value = field.default_factory() if has_factory else field.default  # type: ignore[misc]
            setattr(self, field.name, value)
        self.__post_init__(**values)

    def __post_init__(self, **kwargs):
        for side, config_class in self.sub_configs_defaults.items():
            setattr(self, side, config_class(**getattr(self, side)))

    def validate_rope(self) -> None:
        """Passes plain rotations alone: transformers has checks of its own for the others."""
        if getattr(self, "rope_parameters", None) is None:
            return
        known = {"rope_type", "rope_theta", "partial_rotary_factor"}
        for layer_type in set(self.layer_types):  # type: ignore[attr-defined]
            parameters = self.rope_parameters_of(layer_type)  # type: ignore[attr-defined]
            if parameters.get("rope_type") != "default" or not parameters.keys() <= known:
                raise NeedsTorch(f"`rope_parameters={parameters}` are for transformers to check.")


def sub_config(config_class: type) -> type:
    """`SubConfigSpec`, which here is the class alone; it stands for its `model_type` as well."""
    return config_class


def words_of_table(file: str, name: str) -> list[str]:
    """The keys of a table of transformers, `name = {"key": ...}`, read from the text of the file."""
    package: Any = importlib.util.find_spec("transformers")
    text = Path(package.submodule_search_locations[0], file).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and target.id == name and isinstance(node.value, ast.Dict):
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    raise NeedsTorch(f"transformers' {file} has no table {name}.")


def stand_ins() -> dict[str, ModuleType]:
    """What is imported in place of torch, transformers and `HEAVY`."""
    activations = words_of_table("activations.py", "ACT2CLS")
    ropes = words_of_table("modeling_rope_utils.py", "ROPE_INIT_FUNCTIONS")
    names = ["torch", "transformers", "transformers.configuration_utils", "transformers.activations"]
    names += ["transformers.modeling_rope_utils", *(f"{MIRROR}.{name}" for name in HEAVY)]
    modules: dict[str, ModuleType] = {name: AbsentModule(name) for name in names}
    modules["transformers"].PreTrainedConfig = FieldsOnly  # type: ignore[attr-defined]
    modules["transformers"].GenerationConfig = NoGeneration  # type: ignore[attr-defined]
    modules["transformers.configuration_utils"].SubConfigSpec = sub_config  # type: ignore[attr-defined]
    modules["transformers.activations"].ACT2FN = activations  # type: ignore[attr-defined]
    modules["transformers.modeling_rope_utils"].ROPE_INIT_FUNCTIONS = ropes  # type: ignore[attr-defined]
    return modules


@functools.cache
def light(name: str) -> Any:
    """The module `variform.<name>`, such as "model.patterns", without torch and transformers."""
    package = ModuleType(MIRROR)
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules.setdefault(MIRROR, package)
    with mock.patch.dict(sys.modules, stand_ins()):
        module = importlib.import_module(f"{MIRROR}.{name}")
        ours = {key: value for key, value in sys.modules.items() if key.startswith(f"{MIRROR}.")}
    # Others of the mirror that it imported must be the same ones when they are asked for
    sys.modules.update(ours)
    return module
