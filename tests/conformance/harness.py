"""Turns a form into a test class that carries transformers' own common tests.

The tests know the library's classes by name. What a class from elsewhere needs is told to them here, in copies of
their tables; the library itself stays as it is.
"""

import contextlib
import copy
import functools
import tempfile
import unittest
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from standins.pipeline_checks import CHECKS
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_expert_parallel_mixin import ExpertParallelTesterMixin
from tests.test_fsdp_mixin import FSDPTesterMixin
from tests.test_modeling_common import ModelTesterMixin
from tests.test_pipeline_mixin import PipelineTesterMixin
from tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from tests import (
    test_expert_parallel_mixin,
    test_fsdp_mixin,
    test_modeling_common,
    test_pipeline_mixin,
    test_tensor_parallel_mixin,
)

# task of a class -> the table by whose names the tests choose labels and inputs
TABLES = {
    "base": "MODEL_MAPPING_NAMES",
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq_lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "sequence_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token_classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question_answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "multiple_choice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
}
PIPELINES = {
    "feature-extraction": "base",
    "text-generation": "causal_lm",
    "fill-mask": "masked_lm",
    "text-classification": "sequence_classification",
    "zero-shot": "sequence_classification",
    "token-classification": "token_classification",
}
# The first ids of `tiny_tokenizer`, in this order
SPECIAL_TOKENS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]"]
FIRST_WORD_ID = 3
COMPARE_EXPERTS_IMPLEMENTATIONS = test_modeling_common._test_eager_matches_batched_and_grouped_inference


@dataclass(frozen=True)
class Family:
    """The classes of one shape: `models` maps a task (a key of `TABLES`) to its class."""

    shape: Literal["decoder", "encoder", "encoder_decoder"]
    config_class: type[PreTrainedConfig]
    models: dict[str, type[PreTrainedModel]]


@dataclass(frozen=True)
class Form:
    """One tiny configuration to test: at most 2 layers, and under a million parameters.

    Args:
        name: of the test class.
        fields: arguments of the config.
        exclude: test name -> reason, for a test that does not apply; it is skipped with that reason.
    """

    name: str
    family: Family
    fields: dict[str, Any]
    exclude: dict[str, str] = field(default_factory=dict)

    def config(self) -> PreTrainedConfig:
        return self.family.config_class(**copy.deepcopy(self.fields))


class ModelTester:
    """What the tests ask of their `model_tester`: sizes by their usual names, a config and a batch."""

    batch_size, seq_length, num_choices = 13, 7, 4
    is_training = True
    conditional_generation_class = None

    def __init__(self, form: Form):
        self.form = form
        self.config_class = form.family.config_class
        self.base_model_class = form.family.models["base"]
        self.causal_lm_class = form.family.models.get("causal_lm")
        self.sequence_classification_class = form.family.models.get("sequence_classification")
        text_config = form.config().get_text_config(decoder=True)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, getattr(text_config, name))

    def get_config(self) -> PreTrainedConfig:
        return self.form.config()

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        """A config and a batch with rows of unequal length, as the shape is used: padded on the right."""
        shape = (self.batch_size, self.seq_length)
        # Special tokens inside the text would be taken for padding or for its end
        inputs = {
            "input_ids": torch.randint(FIRST_WORD_ID, self.vocab_size, shape),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
        if self.form.family.shape == "decoder":
            inputs["attention_mask"].tril_()
        elif self.form.family.shape == "encoder":
            inputs["attention_mask"][: self.batch_size // 2, -2:] = 0
        else:
            inputs["decoder_input_ids"] = torch.randint(FIRST_WORD_ID, self.vocab_size, shape)
            inputs["decoder_attention_mask"] = torch.ones(shape, dtype=torch.long)
            inputs["use_cache"] = False
        return self.form.config(), inputs

    def prepare_config_and_inputs(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        return self.prepare_config_and_inputs_for_common()


class FormTests:
    """What each of HF's own model test classes adds, and the tests that must know more of a form than its names."""

    form: Form
    # Models older than 2023 may skip this test; the year is read from a comment in the config's file
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = ModelTester(self.form)
        self.skipped_parts: list[unittest.SkipTest] = []

    @contextlib.contextmanager
    def subTest(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """A part that skips lets the other parts run and then skips the test; one that fails ends it.

        pytest's own reports each of some 20,000 parts, which takes longer than the tests.
        """
        try:
            yield
        except unittest.SkipTest as skip:
            self.skipped_parts.append(skip)

    def _callTestMethod(self, method: Callable[[], None]) -> None:
        super()._callTestMethod(method)
        if self.skipped_parts:
            raise self.skipped_parts[0]

    def test_config(self):
        # ConfigTester compares what is written with what was given: lists and dicts are written in their full form
        flat = {name: value for name, value in self.form.fields.items() if not isinstance(value, (dict, list))}
        ConfigTester(self, config_class=self.form.family.config_class, **flat).run_common_tests()

    def test_model_rope_scaling_frequencies(self):
        """Rope that differs by layer type has one module a layer type here: the test looks at one at a time."""
        parameters = self.form.fields.get("rope_parameters", {})
        if not any(isinstance(value, dict) for value in parameters.values()):
            return super().test_model_rope_scaling_frequencies()
        for one_type in parameters.values():
            self.model_tester = ModelTester(
                replace(self.form, fields=self.form.fields | {"rope_parameters": one_type})
            )
            super().test_model_rope_scaling_frequencies()

    def test_model_rope_with_partial_rotation(self):
        if not has_rope(self.form.config().get_text_config(decoder=True)):
            self.skipTest("This model does not have RoPE")
        super().test_model_rope_with_partial_rotation()

    def test_moe_models_record_router_logits(self):
        """Whether there are experts is read from the model's file, by a decorator: here the form knows."""
        source = "@use_experts_implementation" if has_experts(self.form) else ""
        with mock.patch.object(test_modeling_common.inspect, "getsource", return_value=source):
            super().test_moe_models_record_router_logits()

    def run_task_tests(self, task: str, dtype: str = "float32") -> None:
        """Runs a pipeline test on the form's own tiny model: HF's list has one model a class, on the Hub."""
        model_class = self.pipeline_model_mapping.get(task)
        if model_class is None:
            return super().run_task_tests(task, dtype)
        entry = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
        with tempfile.TemporaryDirectory() as folder:
            save_tiny_model(self.form, model_class, Path(folder) / model_class.config_class.model_type)
            with mock.patch.multiple(
                test_pipeline_mixin,
                TRANSFORMERS_TINY_MODEL_PATH=folder,
                tiny_model_summary={model_class.__name__: entry},
            ):
                super().run_task_tests(task, dtype)


class UnequalStacksTests:
    """The tests that take both stacks for equally wide and deep by the same checks on each stack's own size."""

    def stacks(self) -> Iterator[tuple[PreTrainedModel, dict[str, Any], PreTrainedConfig, PreTrainedConfig]]:
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class._from_config(config, attn_implementation="eager").eval()
            yield model, self._prepare_for_class(inputs, model_class), model.config.encoder, model.config.decoder

    def test_attention_outputs(self):
        for model, inputs, encoder, decoder in self.stacks():
            length = self.model_tester.seq_length
            plain = model(**inputs)
            by_argument = model(**inputs, output_attentions=True)
            for config in (model.config, encoder, decoder):
                config.output_attentions = True
            for outputs in (by_argument, model(**inputs)):
                self.assertEqual(len(outputs), len(plain) + 3)
                for name, stack in (("encoder", encoder), ("decoder", decoder), ("cross", decoder)):
                    attentions = outputs[f"{name}_attentions"]
                    self.assertEqual(len(attentions), stack.num_hidden_layers)
                    for weights in attentions:
                        self.assertEqual(weights.shape[-3:], (stack.num_attention_heads, length, length))

    def test_hidden_states_output(self):
        for model, inputs, encoder, decoder in self.stacks():
            by_argument = model(**inputs, output_hidden_states=True)
            for config in (model.config, encoder, decoder):
                config.output_hidden_states = True
            for outputs in (by_argument, model(**inputs)):
                for name, stack in (("encoder", encoder), ("decoder", decoder)):
                    states = outputs[f"{name}_hidden_states"]
                    self.assertEqual(len(states), stack.num_hidden_layers + 1)
                    for state in states:
                        self.assertEqual(state.shape[-2:], (self.model_tester.seq_length, stack.hidden_size))

    def test_inputs_embeds(self):
        for model, inputs, _, _ in self.stacks():
            with torch.no_grad():
                expected = model(**inputs)[0]
                for name, stack in (("", model.get_encoder()), ("decoder_", model.get_decoder())):
                    inputs[f"{name}inputs_embeds"] = stack.get_input_embeddings()(inputs.pop(f"{name}input_ids"))
                torch.testing.assert_close(model(**inputs)[0], expected)

    def test_inputs_embeds_matches_input_ids(self):
        self.test_inputs_embeds()


def has_rope(config: PreTrainedConfig) -> bool:
    return getattr(config, "rope_parameters", None) is not None


def has_experts(form: Form) -> bool:
    stacks = [form.fields, *(form.fields.get(side, {}) for side in ("encoder", "decoder"))]
    return any(stack.get("num_experts") for stack in stacks)


def has_unequal_stacks(form: Form) -> bool:
    config = form.config()
    if not {"encoder", "decoder"} <= set(config.sub_configs):
        return False
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    return any(getattr(config.encoder, name) != getattr(config.decoder, name) for name in sizes)


@functools.cache
def tiny_tokenizer(shape: str) -> PreTrainedTokenizerFast:
    """Letters, and `SPECIAL_TOKENS` where the shape wants them: fewer than 99 tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*SPECIAL_TOKENS, ",", ".", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    frames = {"encoder": ("[BOS] $A [EOS]", "$B [EOS]"), "encoder_decoder": ("$A [EOS]", "$B [EOS]")}
    if shape in frames:
        single, second = frames[shape]
        ids = [(token, vocabulary[token]) for token in ("[BOS]", "[EOS]")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} {second}", special_tokens=ids
        )
    pad, bos, eos, unknown, mask = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        mask_token=mask,
        cls_token=bos,
        sep_token=eos,
        model_max_length=100_000,
        padding_side="left" if shape == "decoder" else "right",
    )


def save_tiny_model(form: Form, model_class: type[PreTrainedModel], folder: Path) -> None:
    """Writes random weights and a tokenizer to `folder/<class name>`, where the pipeline tests look."""
    set_seed(0)
    model_class(form.config()).save_pretrained(folder / model_class.__name__)
    tiny_tokenizer(form.family.shape).save_pretrained(folder / model_class.__name__)


def set_known_norm_epsilons(config: PreTrainedConfig) -> None:
    """transformers' `set_config_for_less_flaky_test` for strict configs: an epsilon of 1 in the fields that there are.

    HF's own sets every name an epsilon goes by, and a config that refuses unknown keys then does not load again.
    """
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"):
            if hasattr(part, name):
                setattr(part, name, 1.0)


def compare_experts_implementations(test: FormTests, name: str, dtype: str) -> None:
    """transformers' comparison, for forms that have experts: it asks the class, which takes forms with and without."""
    if not has_experts(test.form):
        test.skipTest("This model has no sparse experts.")
    config, inputs = test.model_tester.prepare_config_and_inputs_for_common()
    tensors = {
        key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)
    }  # the test casts them all
    with mock.patch.object(
        test.model_tester, "prepare_config_and_inputs_for_common", lambda: (copy.deepcopy(config), tensors)
    ):
        COMPARE_EXPERTS_IMPLEMENTATIONS(test, name, dtype)


def teach(family: Family) -> None:
    """Enters a family into the tests' tables, and opens the lists of model types that keep others out."""
    for task, model_class in family.models.items():
        table = getattr(test_modeling_common, TABLES[task])
        names = {**table, family.config_class.model_type: model_class.__name__}
        setattr(test_modeling_common, TABLES[task], names)
    test_modeling_common._config_supports_rope_scaling = has_rope
    test_modeling_common._test_eager_matches_batched_and_grouped_inference = compare_experts_implementations
    test_modeling_common.set_config_for_less_flaky_test = set_known_norm_epsilons
    test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
    test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
    test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
    # Two ranks wherever it runs, so that the outcomes do not depend on the machine
    test_fsdp_mixin._get_available_fsdp_workers = lambda: 2
    for task, check in CHECKS.items():
        test_pipeline_mixin.pipeline_test_mapping[task]["test"] = f"{check.__module__}.{check.__name__}"


def build_test_class(form: Form) -> type[unittest.TestCase]:
    """The test class of a form: the mixins that HF gives to a model of its shape."""
    teach(form.family)
    models = tuple(form.family.models.values())
    bases = [UnequalStacksTests] if has_unequal_stacks(form) else []
    bases += [FormTests, ModelTesterMixin]
    if any(model_class.can_generate() for model_class in models):
        bases.append(GenerationTesterMixin)
    bases.append(PipelineTesterMixin)
    if form.family.shape == "decoder":  # HF's suites train, shard and split causal language models
        bases += [TrainingTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin]
        if has_experts(form):
            bases.append(ExpertParallelTesterMixin)
    body = {
        "form": form,
        "model_tester": None,
        "all_model_classes": models,
        "is_encoder_decoder": form.family.shape == "encoder_decoder",
        "pipeline_model_mapping": {
            task: form.family.models[role] for task, role in PIPELINES.items() if role in form.family.models
        },
    }
    for name, reason in form.exclude.items():
        body[name] = unittest.skip(reason)(lambda self: None)
    return type(f"{form.family.shape}__{form.name}", (*bases, unittest.TestCase), body)
