"""Fetches PEFT's own tests and saves the models that they load: `python prepare.py FOLDER` prints where both lie.

The tests come from the source distribution of the installed version, on the package registry. They load models by ids on
the Hub; here a model is a folder of that name below the one that the tests run in.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

NAME = f"peft-{metadata.version('peft')}"


def prepare(folder: Path) -> Path:
    """Unpacks the tests of the installed PEFT under `folder`, once.

    Returns: the folder to put on `sys.path`; it holds the package `tests`.
    Raises subprocess.CalledProcessError: if the source distribution has to be fetched and cannot be.
    """
    root = folder.resolve() / NAME
    if root.exists():
        return root
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*pip, "--dest", scratch, NAME.replace("-", "==")], check=True, stdout=sys.stderr)
        with tarfile.open(Path(scratch) / f"{NAME}.tar.gz") as archive:
            tests = [member for member in archive if member.name.startswith(f"{NAME}/tests/")]
            archive.extractall(scratch, members=tests, filter="data")
        (
            Path(scratch) / NAME / "tests" / "__init__.py"
        ).touch()  # not in the source distribution; the tests are a package
        (Path(scratch) / NAME).rename(root)  # last, so that an interrupted run leaves nothing half done
    return root


if __name__ == "__main__":
    print(prepare(Path(sys.argv[1])))
