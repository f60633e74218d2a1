"""Imports run one way: tools use the model, the model uses nothing of ours but files below it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import variform

PACKAGE = Path(variform.__file__).parent
MODEL = PACKAGE / "model"
ROOT = PACKAGE.parents[1]

# Inside model/, a file imports only from lines above its own
LAYERS = [
    "pattern_base",
    "local_patterns sparse_patterns",
    "patterns",
    "checks sharding",
    "limits expert_fields",
    "configuration_variform",
    "norms positions losses outputs",
    "feed_forward embeddings block_plan texts expert_kernel",
    "block_attention moe",
    "late_plan lsh",
    "attention",
    "masks layers",
    "inputs",
    "stacks",
    "heads pretrained generation",
    "modeling_variform",
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
# A published checkpoint loads wherever these are installed
ALLOWED = {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)

# The tools do not know of each other; all of them may show a form with `report`
TOOLS = ("conversion", "surgery", "training", "hub", "report")
# What may call any tool
FRONTS = {
    "cli.py",
    "__main__.py",
    "hub/publish.py",
    "training/inference.py",
    "training/merging.py",
    "training/models.py",
    "training/run.py",
    "training/sharded.py",
}


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every import of a file, wherever it stands, with the absolute name of the module."""
    package = path.relative_to(PACKAGE.parent).parent.parts if path.is_relative_to(PACKAGE) else ()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            yield node, ".".join([*base, *([node.module] if node.module else [])])


def model_violations(path: Path) -> list[str]:
    """What in a file of the payload the Hub's remote code, or the order of the layers, does not allow."""
    found = []
    for node, name in imports(path):
        where = f"{path.name}:{node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or not node.module or "." in node.module:
                found.append(f"{where}: only `from .name import x` survives publishing")
            elif RANK[node.module] >= RANK[path.stem]:
                found.append(f"{where}: {path.stem} must not import {node.module}")
        elif name.split(".")[0] not in ALLOWED:
            found.append(f"{where}: a published checkpoint may not need {name}")
    return found


def test_payload_files_are_the_ones_in_the_layers():
    assert {path.stem for path in MODEL.glob("*.py")} - {"__init__"} == set(RANK)
    assert not [path for path in MODEL.iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("name", RANK)
def test_payload_file_imports_only_from_lower_layers(name):
    assert model_violations(MODEL / f"{name}.py") == []


def test_a_relative_import_in_a_docstring_would_be_taken_for_code():
    """The Hub finds imports by text, so that such a line in a docstring makes saving fail."""
    for path in MODEL.glob("*.py"):
        code = path.read_text(encoding="utf-8").splitlines()
        by_text = {number for number, line in enumerate(code, 1) if line.strip().startswith(("from .", "import ."))}
        by_syntax = {node.lineno for node, _ in imports(path) if isinstance(node, ast.ImportFrom) and node.level}
        assert by_text == by_syntax, path.name


def test_tools_do_not_import_each_other():
    found = []
    for tool in TOOLS:
        for path in (PACKAGE / tool).glob("**/*.py"):
            if path.relative_to(PACKAGE).as_posix() in FRONTS:
                continue
            others = {f"variform.{other}" for other in (*TOOLS, "cli") if other not in (tool, "report")}
            found += [
                f"{path.name}:{node.lineno}: {name}"
                for node, name in imports(path)
                if any(name == other or name.startswith(f"{other}.") for other in others)
            ]
    assert found == []


def test_finetuning_scripts_use_public_names_only():
    """A script imports `variform` or one of its tools, never the payload's files or a private name."""
    found = []
    for path in (ROOT / "finetune").glob("**/*.py"):
        for node, name in imports(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            is_private = any(part.startswith("_") for part in [*name.split("."), *names])
            if name.startswith("variform.model") or (name.startswith("variform") and is_private):
                found.append(f"{path.name}:{node.lineno}: {name}")
    assert found == []
