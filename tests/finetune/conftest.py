"""Scripts as modules, and tokenizers of a few hundred tokens."""

import importlib.util
import sys

import pytest
from script_inputs import ROOT, WORDS

from variform.training.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def load_script():
    """Gives the module of a script in finetune/ by its name."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "finetune" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Folders of tokenizers, `{frame: folder}`, trained on a handful of words."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for frame in ("both", "end", "start"):
        tokenizer = train_tokenizer([" ".join(WORDS)] * 4, 320, frame=frame, sentinels=8)
        tokenizer.save_pretrained(folder / frame)
    return {frame: str(folder / frame) for frame in ("both", "end", "start")}
