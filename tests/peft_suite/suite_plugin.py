"""The pytest plugin of the run: which models the tests take, and whether the outcomes are accepted.

The rules are those of tests/conformance: nothing fails and nothing is skipped that does not fail, or is not skipped, with
the library's own models.
"""

import os
import re
import sys
import types
from pathlib import Path

import datasets
import peft
import pytest
from models import FORMS
from verdict import Outcomes, Verdict

import variform

SHAPES = {"test_decoder_models": "decoder", "test_encoder_decoder_models": "encoder_decoder"}
SHAPES |= {"test_feature_extraction_models": "feature_extraction"}
# The lists of ids that the tests are repeated for
LISTS = {
    "PEFT_DECODER_MODELS_TO_TEST": "decoder",
    "SMALL_GRID_MODELS": "decoder",
    "PEFT_ENCODER_DECODER_MODELS_TO_TEST": "encoder_decoder",
    "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST": "feature_extraction",
}
# One model a shape is enough: the others are of the same kind, or skip many tests for what their classes are made of
REFERENCES = {
    "decoder": "tiny-random-OPTForCausalLM",
    "encoder_decoder": "tiny-random-BartForConditionalGeneration",
    "feature_extraction": "tiny-random-BertModel",
}
# Of the inside of one model class, which no form has
LEFT_OUT = {
    # Only of base models; with a head the layers lie inside one. Llama's base model, in PEFT 0.21, fails alike
    "test_training_layer_indexing": "`layers_to_transform` finds no layers that lie at the top of a model, as `layers.0`",
    "test_prompt_tuning_trust_remote_code": "reads OPT's own path to its embeddings",
    "test_lora_embed_scale_is_applied": "sets Gemma 3's buffer `embed_scale`",
    "test_lora_embed_scale_is_applied_mixed_batch": "sets Gemma 3's buffer `embed_scale`",
    "test_prefix_tuning_gemma4_works": "Gemma 4's keys and values, shared among layers of unequal heads",
    "test_prefix_tuning_gemma4_warns_if_some_layers_skipped": "the same",
    "test_prefix_tuning_gemma4_raises_if_all_layers_skipped": "the same",
}
SENTENCES = [f"A sentence of {number} words, more or less, which says nothing." for number in range(1, 41)]
MODEL_ID = re.compile(r"(?:\w+-internal-testing|variform)/(?P<name>tiny(?:-\w+)+|\w+)")
NUMBER = re.compile(r"\w+-config_kwargs(\d+)|peft_config(\d+)")


def local_dataset(name: str) -> datasets.DatasetDict:
    """What stands for the quotes on the Hub."""
    return datasets.DatasetDict(train=datasets.Dataset.from_dict({"quote": SENTENCES}))


def convert_at_half_width(model: peft.PeftModel, rank: int) -> tuple:
    """PEFT's conversion at twice the rank: the tests' bound on its error is for models half as wide as these."""
    return peft.convert_to_lora(model, rank=2 * rank)


@pytest.fixture(autouse=True)
def logits_for_cpt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPT takes a loss of its own from logits, which our heads leave out in training unless they are told to keep them."""
    if "CPTConfig" in request.node.name:
        monkeypatch.setattr(variform.VariformDecoderForCausalLM, "keep_training_logits", True)


def pytest_sessionstart() -> None:
    # Imported for one isinstance check. Only while the tests are imported: the libraries ask whether it is installed
    absent = types.ModuleType("diffusers")
    absent.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = absent
    from tests import testing_common, testing_utils

    del sys.modules["diffusers"]
    testing_utils.load_dataset = local_dataset
    testing_common.convert_to_lora = convert_at_half_width


def ids_of(shape: str) -> list[str]:
    """The models that the tests of a shape are repeated for."""
    if os.environ["SUITE"] == "reference":
        return [f"peft-internal-testing/{REFERENCES[shape]}"]
    return [f"variform/{form}" for form, (shape_of_form, _, _) in FORMS.items() if shape_of_form == shape]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, shape in LISTS.items():
        models = getattr(metafunc.module, name, None)
        if models is not None:  # the list that the marks of the tests hold as well
            models[:] = ids_of(shape)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if item.originalname in LEFT_OUT]
    items[:] = [item for item in items if item.originalname not in LEFT_OUT]
    config.hook.pytest_deselected(items=left_out)


class PeftVerdict(Verdict):
    """The verdict on tests that are repeated for models and configs, a few thousand of them."""

    def place_of(self, nodeid: str) -> tuple[str, str]:
        """As in `Verdict`; the name has no model where the test names its own."""
        file, _, test = nodeid.split("::")
        shape, found = SHAPES[Path(file).stem], MODEL_ID.search(test)
        test = NUMBER.sub(lambda match: match[1] or match[2], MODEL_ID.sub("", test)).replace("-]", "]")
        return f"{shape}__{found['name']}" if found else f"{shape}_single__tests", test

    def pack(self, outcomes: Outcomes) -> dict[str, dict[str, dict[str, str]]]:
        """One line an outcome, with the parameters of the tests that had it."""
        packed: dict[str, dict[str, dict[str, str]]] = {}
        for name, tests in outcomes.items():
            for test, outcome in tests.items():
                function, _, parameters = test.partition("[")
                group = packed.setdefault(name, {}).setdefault(function, {})
                group[outcome] = f"{group.get(outcome, '')} {parameters.rstrip(']')}".strip()
        return packed

    def unpack(self, packed: dict[str, dict[str, dict[str, str]]]) -> Outcomes:
        return {
            name: {
                f"{function}[{parameter}]" if parameter else function: outcome
                for function, groups in tests.items()
                for outcome, parameters in groups.items()
                for parameter in parameters.split(" ")
            }
            for name, tests in packed.items()
        }


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers only run, the first process reports
        config.pluginmanager.register(PeftVerdict(config, "peft"))
