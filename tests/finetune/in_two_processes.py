"""Scripts one after another in the processes that run this: `in_two_processes.py JOBS`, a file of `[[script, argv], ...]`."""

import importlib.util
import json
import sys
from pathlib import Path

from variform.training.run import leave_group

FINETUNE = Path(__file__).parents[2] / "finetune"


def load(name: str):
    """The script as a module; dataclasses look it up by its name."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", FINETUNE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    for name, argv in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(f"== {name} {argv}", flush=True)
        status = load(name).main(argv)
        if status:
            sys.exit(status)
    leave_group()
