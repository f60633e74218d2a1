"""Fetches transformers' own tests: `python prepare.py FOLDER` prints where the ones of the installed version lie.

They come from the source distribution on the package registry, which carries the common test mixins. Nothing is
fetched when FOLDER holds them already.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path


def prepare(folder: Path) -> Path:
    """Unpacks the tests of the installed transformers under `folder`, once.

    Returns: the folder to put on `sys.path`; it holds the package `tests`.
    Raises subprocess.CalledProcessError: if the source distribution has to be fetched and cannot be.
    """
    name = f"transformers-{metadata.version('transformers')}"
    root = folder.resolve() / name
    if root.exists():
        return root
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*pip, "--dest", scratch, name.replace("-", "==")], check=True, stdout=sys.stderr)
        with tarfile.open(Path(scratch) / f"{name}.tar.gz") as archive:
            tests = [member for member in archive if member.name.startswith(f"{name}/tests/")]
            archive.extractall(scratch, members=tests, filter="data")
        # The pipeline tests read a list of tiny models at import; harness.py gives each form its own later
        summary = Path(scratch) / name / "tests" / "utils" / "tiny_model_summary.json"
        summary.parent.mkdir(exist_ok=True)
        summary.write_text("{}")
        (Path(scratch) / name).rename(root)  # last, so that an interrupted run leaves nothing half done
    return root


if __name__ == "__main__":
    print(prepare(Path(sys.argv[1])))
