"""Scripts as modules, a tokenizer of a few hundred tokens, and forms of a few thousand parameters."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from variform.training.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
STACK = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
WORDS = [
    "the",
    "a",
    "good",
    "bad",
    "film",
    "play",
    "was",
    "is",
    "very",
    "quite",
    "dull",
    "bright",
    "and",
    "not",
    "but",
    "acting",
    "story",
    "end",
]


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


def form(shape: str, **fields) -> str:
    """A tiny form as a script's `--form` takes it."""
    if shape == "encoder_decoder":
        stacks = {"encoder": {**STACK, **fields}, "decoder": {**STACK, **fields}}
        return json.dumps({"model_type": "variform_encoder_decoder", **stacks})
    return json.dumps({"model_type": f"variform_{shape}", **STACK, **fields})


def write_lines(path: Path, rows: list[dict]) -> str:
    """Writes rows as JSON lines; returns the path as an argument."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
