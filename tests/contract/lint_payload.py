"""Transformers' own structure linter over the files that travel to the Hub: `python tests/contract/lint_payload.py`.

The linter reads only files that are called `modeling_*.py` or `configuration_*.py`, so each file is copied under such a name
first. It exits with 1 if a rule is broken.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PAYLOAD = Path(__file__).parents[2] / "src" / "variform" / "model"

# Rules of transformers' repository that are not ours, with the reason
SWITCHED_OFF = {
    "TRF010": "asks for @strict on the configs' common base, a mixin that is never built: its three subclasses have it",
    "TRF028": "asks for Hugging Face's license header; ours is the file LICENSE",
    "TRF031": "takes every dataclass for a model output; ours are the patterns, values that a config names",
    "TRF041": "asks for a note on every branch on a config field: one native class serves few checkpoints, ours is all forms",
    "TRF057": "asks for @auto_docstring, which fills docstrings from templates; ours are written",
}


def copy_payload(folder: Path) -> dict[str, str]:
    """Copies the payload under names that the linter reads; returns {name of the copy: name of the file}."""
    names = {}
    for path in sorted(PAYLOAD.glob("*.py")):
        is_named = path.name.startswith(("modeling_", "configuration_"))
        if path.stem != "__init__":
            names[path.name if is_named else f"modeling_{path.name}"] = path.name
    for copy, name in names.items():
        shutil.copy(PAYLOAD / name, folder / copy)
    return names


def lint() -> dict[str, list[str]]:
    """Every broken rule of the linter, with the places as `file.py:12: TRF000: message`."""
    with tempfile.TemporaryDirectory() as folder:
        names, report = copy_payload(Path(folder)), Path(folder) / "findings.json"
        command = [sys.executable, "-m", "mlinter", "--no-cache", "--no-progress", "--enable-all-trf-rules"]
        result = subprocess.run(
            [*command, "--output-json", str(report), folder], capture_output=True, text=True, check=False
        )
        if not report.is_file():
            raise RuntimeError(f"The linter did not run:\n{result.stdout}{result.stderr}")
        findings = json.loads(report.read_text(encoding="utf-8"))["findings"]
    broken: dict[str, list[str]] = {}
    for finding in findings:
        place = f"{names[Path(finding['path']).name]}:{finding['line']}: {finding['message']}"
        broken.setdefault(finding["rule"], []).append(place)
    return broken


def main() -> int:
    """Prints what breaks a rule that is ours too; the number of such places."""
    places = [place for rule, places in lint().items() if rule not in SWITCHED_OFF for place in places]
    print("\n".join(places) or f"{PAYLOAD}: no rule broken")
    return len(places)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
