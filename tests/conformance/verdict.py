"""A pytest plugin that judges a run of the forms by the run of the reference: models of the library whose tests they are.

A skip can hide a weaker model: many of the tests skip where a flag is missing. So a form is accepted when it fails in
nothing and skips nothing that the reference passes, not when pytest is content.
"""

import json
import os
import re
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

REFERENCE_NAMES = {"decoder": "Llama", "encoder": "Bert", "encoder_decoder": "T5"}
WORST_FIRST = ["failed", "skipped", "passed"]
# Skip reasons name classes; what stands for a class of ours stands for one of the reference too
CLASS_NAME = re.compile(r"[\w.]*(?:Llama|Bert|T5|Variform|__)[\w.]*")

Outcome = str  # "passed", "skipped: why" or "failed: why"
Outcomes = dict[str, dict[str, Outcome]]  # test class, named shape__form -> test -> outcome


def outcome_of(report: pytest.TestReport) -> Outcome | None:
    """The outcome that a report stands for; None for the report of a setup or teardown that went well."""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        return f"failed: {first_line(crash.message if crash else report.longreprtext)}"
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        return f"skipped: {CLASS_NAME.sub('CLASS', first_line(reason.removeprefix('Skipped: ')))}"
    return "passed" if report.when == "call" else None


def first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


def kind(outcome: Outcome) -> str:
    return outcome.partition(":")[0]


def judge(outcomes: Outcomes, reference: Outcomes, whole: bool) -> list[str]:
    """What speaks against the forms, one line each; empty if they are accepted.

    Args:
        outcomes: of the forms.
        reference: of Hugging Face's classes, one a shape.
        whole: every test was to run, so that one without an outcome is missing.
    """
    by_shape = {name.partition("__")[0]: tests for name, tests in reference.items()}
    # A form may lack what its shape's reference has, if another one lacks it for the same reason: rope, for one
    skips = {(test, outcome) for tests in by_shape.values() for test, outcome in tests.items()}
    ran = {name.partition("__")[0] for name in outcomes}
    against = [f"{shape}: no form ran" for shape in by_shape if whole and shape not in ran]
    for name, tests in outcomes.items():
        expected = by_shape[name.partition("__")[0]]
        for test, outcome in sorted(tests.items()):
            same_here = kind(expected.get(test, "passed")) == kind(outcome)
            if kind(outcome) != "passed" and not same_here and (test, outcome) not in skips:
                against.append(f"{name}::{test} {outcome}")
        missing = sorted(set(expected) - set(tests)) if whole else []
        against += [f"{name}::{test} did not run" for test in missing]
    return against


def table(outcomes: Outcomes, reference: Outcomes) -> list[str]:
    """Counts a form beside its reference."""
    lines = [f"{'shape':<28}{'form':<54}{'passed':>8}{'skipped':>9}{'failed':>8}"]
    for name, tests in sorted([*outcomes.items(), *reference.items()], key=lambda item: item[0]):
        shape, _, form = name.partition("__")
        counts = Counter(map(kind, tests.values()))
        form += " (reference)" if name in reference else ""
        lines.append(f"{shape:<28}{form:<54}{counts['passed']:>8}{counts['skipped']:>9}{counts['failed']:>8}")
    return lines


class Verdict:
    """Collects outcomes in the process that reports them, then records or judges them.

    Args:
        package: whose tests they are.
    """

    def __init__(self, config: pytest.Config, package: str):
        self.config = config
        self.package = package
        self.reference_path = Path(os.environ["SUITE_REFERENCE"])
        self.records = os.environ["SUITE"] == "reference"
        self.reference = {} if self.records else self.read_reference()
        self.outcomes: Outcomes = {}
        self.uncollected: list[str] = []
        self.against: list[str] | None = None  # until the run can be judged

    def place_of(self, nodeid: str) -> tuple[str, str]:
        """The name in `outcomes` of what ran a test, and that of the test."""
        name, test = nodeid.partition("@")[0].split("::")[-2:]  # "@" and the group that xdist ran it in
        return name, test

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = outcome_of(report)
        if outcome is None:
            return
        name, test = self.place_of(report.nodeid)
        tests = self.outcomes.setdefault(name, {})
        # A test with sub-tests reports each of them: the worst one counts
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
        if self.records:
            if is_whole and not self.uncollected:
                self.write_reference()
            return
        self.against = self.uncollected + judge(self.outcomes, self.reference, is_whole)
        if not self.outcomes:
            self.against.append("nothing ran")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED if self.against else pytest.ExitCode.OK

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(f"the tests of {self.package}")
        for line in table(self.outcomes, self.reference):
            terminalreporter.line(line)
        for line in self.against or []:
            terminalreporter.line(f"REJECTED {line}")
        if self.against == []:
            terminalreporter.line("accepted: no failure, and no skip that the library's own models do not have")

    def write_reference(self) -> None:
        outcomes = {name: dict(sorted(tests.items())) for name, tests in sorted(self.outcomes.items())}
        record = {self.package: metadata.version(self.package), "outcomes": self.pack(outcomes)}
        self.reference_path.write_text(json.dumps(record, indent=1) + "\n")

    def read_reference(self) -> Outcomes:
        """The outcomes that `write_reference` recorded.

        Raises ValueError: if they are of another version of the package, whose tests may differ.
        """
        record = json.loads(self.reference_path.read_text())
        installed = metadata.version(self.package)
        if record[self.package] != installed:
            raise ValueError(f"{self.reference_path} is of {self.package} {record[self.package]}, not of {installed}.")
        return self.unpack(record["outcomes"])

    def pack(self, outcomes: Outcomes) -> Any:
        """Outcomes as the reference's file holds them."""
        return outcomes

    def unpack(self, packed: Any) -> Outcomes:
        """What `pack` packed."""
        return packed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The tests that start processes share one worker: its fork server has the libraries loaded after the first of them
    for item in items:
        if item.name.startswith(("test_fsdp", "test_hsdp", "test_tp_", "test_ep_")):
            item.add_marker(pytest.mark.xdist_group("ranks"))


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers only run, the first process reports
        config.pluginmanager.register(Verdict(config, "transformers"))
