"""One table, `AUTO_MAP`, names every public class; choices named in a config are the ones that are implemented."""

import inspect
from typing import get_args

import pytest
import torch
import transformers
from tiny import build, inputs, tiny
from transformers import PreTrainedModel
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.models.auto import modeling_auto

import variform
from variform.forms import SHAPES
from variform.model import configuration_variform, modeling_variform
from variform.model.configuration_variform import AUTO_MAP, NormPlacement, NormType, Pooling, PositionEmbeddingType
from variform.model.patterns import PATTERNS
from variform.registration import register

ENTRIES = [
    (model_type, auto_name, reference)
    for model_type, entries in AUTO_MAP.items()
    for auto_name, reference in entries.items()
]
CONFIGS = {
    model_type: getattr(configuration_variform, entries["AutoConfig"].split(".")[1])
    for model_type, entries in AUTO_MAP.items()
}


def public_classes() -> set[str]:
    """The classes of the payload that a user builds: not the bases, which have no forward."""
    return {
        name
        for name, value in inspect.getmembers(modeling_variform, inspect.isclass)
        if issubclass(value, PreTrainedModel) and name.startswith("Variform") and not name.endswith("PreTrainedModel")
    }


def test_table_names_every_public_class_once():
    named = [reference.split(".")[1] for _, auto_name, reference in ENTRIES if auto_name != "AutoConfig"]
    assert sorted(named) == sorted(public_classes())


def test_table_names_the_files_that_hold_the_classes():
    for _, auto_name, reference in ENTRIES:
        module, name = reference.split(".")
        source = configuration_variform if auto_name == "AutoConfig" else modeling_variform
        assert source.__name__.endswith(f".{module}")
        assert getattr(source, name).__module__ == source.__name__


@pytest.mark.parametrize("model_type, auto_name, reference", ENTRIES)
def test_entry_is_what_is_registered(model_type, auto_name, reference):
    name = reference.split(".")[1]
    if auto_name == "AutoConfig":
        assert type(transformers.AutoConfig.for_model(model_type)) is getattr(configuration_variform, name)
        assert getattr(configuration_variform, name).model_type == model_type
    else:
        registered = getattr(transformers, auto_name)._model_mapping[CONFIGS[model_type]]
        assert registered is getattr(modeling_variform, name)
        assert registered.config_class is CONFIGS[model_type]


def test_nothing_else_is_registered():
    tables = {
        name: auto._model_mapping
        for name, auto in vars(transformers).items()
        if name.startswith("AutoModel") and hasattr(auto, "_model_mapping")
    }
    for model_type, config_class in CONFIGS.items():
        found = {name for name, table in tables.items() if config_class in table._extra_content}
        assert found == set(AUTO_MAP[model_type]) - {"AutoConfig"}


def test_registering_again_changes_nothing():
    before = dict(transformers.AutoModelForCausalLM._model_mapping._extra_content)
    register()
    assert transformers.AutoModelForCausalLM._model_mapping._extra_content == before


def test_trainer_shifts_labels_of_the_causal_classes():
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    causal = {reference.split(".")[1] for _, auto_name, reference in ENTRIES if auto_name == "AutoModelForCausalLM"}
    assert causal and causal <= set(names)


def test_public_names_are_exported_and_exist():
    assert public_classes() <= set(variform.__all__)
    assert {config.__name__ for config in CONFIGS.values()} <= set(variform.__all__)
    assert all(hasattr(variform, name) for name in variform.__all__)
    assert len(set(variform.__all__)) == len(variform.__all__)


def test_every_shape_has_a_default_head():
    assert set(SHAPES) == set(AUTO_MAP)
    for model_type, (config_class, auto_class) in SHAPES.items():
        assert config_class is CONFIGS[model_type]
        assert auto_class.__name__ in AUTO_MAP[model_type]


def test_every_pattern_has_a_layer_type_that_the_platform_knows():
    needed = {"sliding_window": ":3", "dilated": ":3", "chunked": ":3", "local_global": ":3", "strided": ":3"}
    needed |= {"fixed": ":3", "big_bird": ":3", "lsh": ":4"}
    for name in PATTERNS:
        config = tiny("decoder", attention_patterns=[name + needed.get(name, "")])
        assert set(config.layer_types) <= set(ALLOWED_LAYER_TYPES)


@pytest.mark.parametrize(
    "field, choices",
    [
        ("position_embedding_type", get_args(PositionEmbeddingType)),
        ("norm_type", get_args(NormType)),
        ("norm_placement", get_args(NormPlacement)),
        ("qk_norm", (None, "head", "full")),
    ],
)
@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@torch.no_grad()
def test_every_choice_is_implemented_and_differs_from_the_others(shape, field, choices):
    input_ids = inputs()
    outputs = [build(tiny(shape, **{field: choice}))(input_ids).last_hidden_state for choice in choices]
    for i, first in enumerate(outputs):
        assert torch.isfinite(first).all()
        assert all((first - second).abs().max() > 1e-3 for second in outputs[:i])


@torch.no_grad()
def test_every_pooling_is_implemented_and_differs_from_the_others():
    input_ids = inputs()
    outputs = [
        build(tiny("encoder", classifier_pooling=how), transformers.AutoModelForSequenceClassification)(
            input_ids
        ).logits
        for how in get_args(Pooling)
    ]
    for i, first in enumerate(outputs):
        assert all((first - second).abs().max() > 1e-3 for second in outputs[:i])
