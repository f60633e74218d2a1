"""Debian's package descriptions, in English and as their translators have them.

    python -m variform.training.data.sources.package_descriptions            # fetches the lists, about 45 MB

fetches the lists by a Debian system's own apt into `$VARIFORM_DATA`, without touching what that apt knows.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .base import Rows, Source, data_folder, find_folder

FOLDER = "package_descriptions"
LANGUAGES = ("en", "it", "de")
SOURCE_NAMES = "sources.tsv"
INSTALL = "fetch the lists on a Debian system with `python -m variform.training.data.sources.package_descriptions`"
# What is left of a package's name where its source is not known
SIBLING = re.compile(r"(-(dev|doc|dbg|data|common|bin|utils|tools|docs|examples))+$")
HELD_OUT_EVERY = 20
MIN_WORDS = 20
APT_CAT = "/usr/lib/apt/apt-helper"


class Description(NamedTuple):
    """A package's description in one language."""

    package: str
    digest: str  # of the English one: the same in all languages
    short: str
    paragraphs: list[str]


def fetch(folder: str | Path | None = None) -> Path:
    """Fetch the lists of the suite that this Debian system uses, as text.

    The system's apt reads its own settings with other folders for its lists, so that nothing of it changes.

    Raises:
        ValueError: where there is no apt, or it fails; holds its last line.
    """
    target = Path(folder or data_folder() / FOLDER)
    if not Path(APT_CAT).is_file():
        raise ValueError(
            f"There is no {APT_CAT}: the lists are fetched on a Debian system, and can be copied from there."
        )
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        lists, parts = Path(temporary, "lists"), Path(temporary, "parts")
        (lists / "partial").mkdir(parents=True)
        parts.mkdir()
        for path in Path("/etc/apt/apt.conf.d").iterdir():
            if "language" not in path.name:  # images of containers switch translations off there
                (parts / path.name).write_bytes(path.read_bytes())
        languages = " ".join(f'"{language}";' for language in LANGUAGES)
        settings = Path(temporary, "apt.conf")
        settings.write_text(
            f'Dir::Etc::parts "{parts}";\nDir::State::lists "{lists}";\nAcquire::Languages {{ {languages} }};\n',
            encoding="utf-8",
        )
        _run(["apt-get", "update"], settings)
        for language in LANGUAGES:
            found = sorted(map(str, lists.glob(f"*_main_i18n_Translation-{language}*")))
            (target / f"Translation-{language}").write_bytes(
                _run([APT_CAT, "cat-file", *found], settings) if found else b""
            )
        packages = _run([APT_CAT, "cat-file", *sorted(map(str, lists.glob("*_main_binary-*_Packages*")))], settings)
        names = sorted(set(read_source_names(packages.decode("utf-8"))))
        text = "".join(f"{package}\t{source}\n" for package, source in names)
        (target / SOURCE_NAMES).write_text(text, encoding="utf-8")
    return target


def _run(command: list[str], settings: Path) -> bytes:
    environment = {"APT_CONFIG": str(settings), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    if done.returncode:
        raise ValueError(f"{command[0]} failed: {done.stderr.decode().strip().splitlines()[-1]}")
    return done.stdout


def read_source_names(text: str) -> Iterator[tuple[str, str]]:
    """`(package, source package)` of each stanza of a list of packages."""
    for stanza in text.split("\n\n"):
        fields: dict[str, str] = dict(re.findall(r"^(Package|Source): (\S+)", stanza, flags=re.MULTILINE))
        if fields:
            yield fields["Package"], fields.get("Source", fields["Package"])


def files() -> list[Path]:
    folder = find_folder(FOLDER, install=INSTALL)
    return [folder / name for name in (*(f"Translation-{language}" for language in LANGUAGES), SOURCE_NAMES)]


def read_descriptions(path: Path) -> list[Description]:
    """The stanzas of a list of translations. A line " ." separates paragraphs; the lines of a paragraph are joined."""
    return list(filter(None, map(_parse, path.read_text(encoding="utf-8").split("\n\n"))))


def _parse(stanza: str) -> Description | None:
    head = re.match(r"\s*Package: (\S+)\nDescription-md5: (\S+)\nDescription-\w+: ?(.*)", stanza)
    if not head:
        return None
    paragraphs: list[list[str]] = [[]]
    for line in stanza[head.end() :].splitlines():
        if line.strip() == ".":
            paragraphs.append([])
        elif line.strip():
            paragraphs[-1].append(line.strip())
    return Description(head[1], head[2], head[3].strip(), [" ".join(lines) for lines in paragraphs if lines])


class Descriptions(NamedTuple):
    """All descriptions, and who belongs to which source package."""

    languages: dict[str, list[Description]]
    sources: dict[str, str]

    def is_held_out(self, package: str) -> bool:
        """By the source package, so that foo, foo-dev and foo-doc, which share sentences, are on one side."""
        source = self.sources.get(package) or SIBLING.sub("", package)
        return int(hashlib.sha256(source.encode()).hexdigest(), 16) % HELD_OUT_EVERY == 0

    def split(self, rows: Sequence[tuple[str, dict]], key: str) -> dict[str, Rows]:
        """Split `(package, row)`; of rows with one text under `key` the first is kept."""
        splits: dict[str, Rows] = {"train": [], "validation": []}
        seen: set[str] = set()
        for package, row in rows:
            if row[key] not in seen:
                seen.add(row[key])
                splits["validation" if self.is_held_out(package) else "train"].append(row)
        return splits


def read_all(languages: Sequence[str] = ("en",)) -> Descriptions:
    """The lists of these languages.

    Raises:
        ValueError: where they are not; holds the command that fetches them.
    """
    *_, names = files()
    sources = dict(line.split("\t") for line in names.read_text(encoding="utf-8").splitlines())
    lists = {language: read_descriptions(names.with_name(f"Translation-{language}")) for language in languages}
    return Descriptions(lists, sources)


def load(config: str) -> dict[str, Rows]:
    """Rows `{"text", "target"}`, or `{"text"}`.

    `en-it`, `en-de`: one-line descriptions and their translations; `paragraphs-...`: paragraphs of the long ones, where both
    sides have as many. `summaries`: the long description, of at least 20 words, and the one-line one. `text`: the long ones.
    """
    if config in ("summaries", "text"):
        data = read_all()
        rows = [
            (description.package, {"text": "\n".join(description.paragraphs), "target": description.short})
            for description in data.languages["en"]
            if len(" ".join(description.paragraphs).split()) >= MIN_WORDS
        ]
        return data.split(rows, "text")
    language = config.rpartition("-")[2]
    data = read_all(("en", language))
    translations = {description.digest: description for description in data.languages[language]}
    pairs = [(english, translations.get(english.digest)) for english in data.languages["en"]]
    rows = [
        (english.package, {"text": text, "target": target})
        for english, other in pairs
        if other
        for text, target in _aligned(english, other, whole=not config.startswith("paragraphs"))
        if text and target and text != target
    ]
    return data.split(rows, "text")


def _aligned(english: Description, other: Description, *, whole: bool) -> list[tuple[str, str]]:
    if whole:
        return [(english.short, other.short)]
    if len(english.paragraphs) != len(other.paragraphs):
        return []
    return list(zip(english.paragraphs, other.paragraphs))


SPLIT = (
    "by source package: one in 20 held out, by the SHA-256 of its name, so that a library and its -dev and -doc packages "
    "are on one side; equal English texts kept once"
)
LICENCE = "each description under the free licence of its package"
CITATION = "Debian package descriptions and the Debian Description Translation Project"
HOMEPAGE = "https://www.debian.org/international/l10n/ddtp"
PAIRS = ("text", "target")
SOURCE = Source(
    configs={
        "en-it": PAIRS,
        "en-de": PAIRS,
        "paragraphs-en-it": PAIRS,
        "paragraphs-en-de": PAIRS,
        "summaries": PAIRS,
        "text": ("text",),
    },
    load=load,
    files=files,
    split=SPLIT,
    licence=LICENCE,
    citation=CITATION,
    homepage=HOMEPAGE,
)

if __name__ == "__main__":
    print(fetch(*sys.argv[1:2]))
