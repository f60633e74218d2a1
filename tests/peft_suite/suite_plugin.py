"""The pytest plugin of the run: which models the tests take, and whether the outcomes are accepted.

The rules are those of tests/conformance: nothing fails and nothing is skipped that does not fail, or is not skipped, with
the library's own models.
"""

import json
import os
import re
import sys
import types
from importlib import metadata
from pathlib import Path

import datasets
import peft
import pytest
from models import FORMS
from verdict import WORST_FIRST, Outcomes, judge, kind, outcome_of, table

IS_REFERENCE = os.environ["PEFT_SUITE"] == "natives"
REFERENCE = Path(os.environ["PEFT_SUITE_REFERENCE"])
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


def pytest_sessionstart() -> None:
    # Imported for one isinstance check. Only while the tests are imported: the libraries ask whether it is installed
    absent = types.ModuleType("diffusers")
    absent.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = absent
    from tests import testing_common, testing_utils  # noqa: F401

    del sys.modules["diffusers"]
    testing_utils.load_dataset = local_dataset


def ids_of(shape: str) -> list[str]:
    """The models that the tests of a shape are repeated for."""
    if IS_REFERENCE:
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


def place_of(nodeid: str) -> tuple[str, str, str]:
    """Shape, model and test of a node; the model is "" where the test names its own."""
    file, _, test = nodeid.split("::")
    found = MODEL_ID.search(test)
    test = NUMBER.sub(lambda match: match[1] or match[2], MODEL_ID.sub("", test)).replace("-]", "]")
    return SHAPES[Path(file).stem], found["name"] if found else "", test


class PeftVerdict:
    """Collects outcomes in the process that reports them, then records or judges them."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.reference = {} if IS_REFERENCE else read_reference()
        self.outcomes: Outcomes = {}
        self.uncollected: list[str] = []
        self.against: list[str] | None = None  # until the run can be judged

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = outcome_of(report)
        if outcome is None:
            return
        shape, model, test = place_of(report.nodeid)
        name = f"{shape}__{model}" if model else f"{shape}_single__tests"
        tests = self.outcomes.setdefault(name, {})
        tests[test] = min(outcome, tests.get(test, outcome), key=lambda each: WORST_FIRST.index(kind(each)))

    @pytest.hookimpl
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.uncollected.append(f"{report.nodeid} could not be collected")

    @pytest.hookimpl
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        ended = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
        if session.exitstatus not in ended:
            return
        is_whole = not (self.config.option.keyword or any("::" in argument for argument in self.config.args))
        if IS_REFERENCE:
            if is_whole and not self.uncollected:
                write_reference(self.outcomes)
            return
        self.against = self.uncollected + judge(self.outcomes, self.reference, is_whole)
        if not self.outcomes:
            self.against.append("nothing ran")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED if self.against else pytest.ExitCode.OK

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("PEFT's tests")
        for line in table(self.outcomes, self.reference):
            terminalreporter.line(line)
        for line in self.against or []:
            terminalreporter.line(f"REJECTED {line}")
        if self.against == []:
            terminalreporter.line("accepted: no failure, and no skip that the library's own models do not have")


def write_reference(outcomes: Outcomes) -> None:
    """One line an outcome, with the tests that had it: a few thousand tests, told apart by number."""
    grouped: dict[str, dict[str, dict[str, str]]] = {}
    for name, tests in sorted(outcomes.items()):
        for test, outcome in sorted(tests.items()):
            function, _, parameters = test.partition("[")
            group = grouped.setdefault(name, {}).setdefault(function, {})
            group[outcome] = f"{group.get(outcome, '')} {parameters.rstrip(']')}".strip()
    REFERENCE.write_text(json.dumps({"peft": metadata.version("peft"), "outcomes": grouped}, indent=1) + "\n")


def read_reference() -> Outcomes:
    """The outcomes that `write_reference` recorded.

    Raises ValueError: if there are none, or they are of another version of PEFT, whose tests may differ.
    """
    if not REFERENCE.is_file():
        raise ValueError(f"{REFERENCE} is missing: `run.sh --reference` records it.")
    record = json.loads(REFERENCE.read_text())
    if record["peft"] != peft.__version__:
        raise ValueError(f"{REFERENCE} is of PEFT {record['peft']}, installed is {peft.__version__}.")
    return {
        name: {
            f"{function}[{parameter}]" if parameter else function: outcome
            for function, groups in tests.items()
            for outcome, parameters in groups.items()
            for parameter in parameters.split(" ")
        }
        for name, tests in record["outcomes"].items()
    }


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers only run, the first process reports
        config.pluginmanager.register(PeftVerdict(config))
