"""Forms by name: the YAML configs of `configs/models`, and the models built from them."""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from .model.checks import one_of
from .model.configuration_variform import VariformDecoderConfig, VariformEncoderConfig, VariformEncoderDecoderConfig

# An installed package carries the forms beside this file; in a checkout they lie in configs/models
INSTALLED = Path(__file__).parent / "forms_data"
FORMS = INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[2] / "configs" / "models"

# What each shape is by default: (config class, Auto class of its language-model head)
SHAPES = {
    VariformEncoderConfig.model_type: (VariformEncoderConfig, AutoModelForMaskedLM),
    VariformDecoderConfig.model_type: (VariformDecoderConfig, AutoModelForCausalLM),
    VariformEncoderDecoderConfig.model_type: (VariformEncoderDecoderConfig, AutoModelForSeq2SeqLM),
}


class FormLoader(yaml.SafeLoader):
    """Reads `1e-6` as a number, as YAML 1.2 does; PyYAML's rule, of YAML 1.1, makes it a string. Refuses a name given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"`{key.value}` is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


FormLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789"
)


def list_forms() -> list[str]:
    """The names that `load_config` knows, sorted."""
    return sorted(path.stem for path in FORMS.glob("*.yaml"))


def load_config(name_or_path: str | os.PathLike) -> PreTrainedConfig:
    """Reads a form into the config class that its key `model_type` names.

    Args:
        name_or_path: a name such as "bert-base" (see `list_forms`), or the path of a YAML or JSON file.

    Raises:
        FileNotFoundError, ValueError: as `load_fields`, and ValueError if a field is refused by the config.
    """
    return config_from_dict(load_fields(name_or_path))


def load_fields(name_or_path: str | os.PathLike) -> dict[str, Any]:
    """The fields that a form names, as its file has them; what is not there is derived when the config is built.

    Args:
        name_or_path: as for `load_config`.

    Raises:
        FileNotFoundError: if there is neither such a form nor such a file; lists the forms and the nearest one.
        ValueError: if the file is not a mapping of fields.
    """
    name = str(name_or_path)
    path = FORMS / f"{name}.yaml" if name in list_forms() else Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name.lower(), list_forms(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise FileNotFoundError(f"{name!r} is neither a file nor one of the forms {', '.join(list_forms())}{hint}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), FormLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must hold `field: value` lines, got {type(values).__name__}.")
    return dict(values)


def config_from_dict(values: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of the class that `values["model_type"]` names, with the other values as its fields."""
    fields = dict(values)
    model_type = fields.pop("model_type", None)
    one_of("model_type", model_type, SHAPES)
    return SHAPES[model_type][0](**fields)


def from_config(
    config: PreTrainedConfig | Mapping[str, Any] | str | os.PathLike, *, auto_class: Any = None, **kwargs
) -> PreTrainedModel:
    """Builds a model with new weights from a form.

    Args:
        config: a config, a dict with the key `model_type`, or what `load_config` takes.
        auto_class: the Auto class to build through, such as `AutoModelForSequenceClassification`. Default: the
            language-model head of the shape (masked, causal or sequence-to-sequence).
        kwargs: passed to `auto_class.from_config`, such as `dtype` and `attn_implementation`.

    Raises:
        FileNotFoundError, ValueError: as `load_config`, and for a config of another family.
    """
    if isinstance(config, (str, os.PathLike)):
        config = load_config(config)
    elif isinstance(config, Mapping):
        config = config_from_dict(config)
    one_of("model_type", config.model_type, SHAPES)
    auto_class = auto_class or SHAPES[config.model_type][1]
    return auto_class.from_config(config, **kwargs)
