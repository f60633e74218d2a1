"""What scripts are given in tests: words, forms of a few thousand parameters, files of rows."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
STACK = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
WORDS = ["the", "a", "good", "bad", "film", "play", "was", "is", "very", "quite", "dull", "bright"]
WORDS += ["and", "not", "but", "acting", "story", "end"]


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
