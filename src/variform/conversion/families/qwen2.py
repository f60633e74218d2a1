"""Qwen2 (arXiv:2407.10671): Llama with biases on queries, keys and values, and windows in some layers."""

from dataclasses import replace
from typing import Any

from ..family import patterns
from . import llama


def read(foreign) -> dict[str, Any]:
    return {"attention_patterns": patterns(foreign)}


def write(form) -> dict[str, Any]:
    window = form.sliding_window
    return {"layer_types": form.layer_types, "sliding_window": window, "use_sliding_window": window is not None}


FAMILY = replace(
    llama.FAMILY,
    model_type="qwen2",
    same={ours: name for ours, name in llama.SAME.items() if ours not in ("attention_bias", "mlp_bias", "head_dim")},
    fixed=llama.FIXED | {"attention_bias": ["q", "k", "v"]},
    read=read,
    write=write,
    inert=frozenset({"max_window_layers"}),  # `layer_types` says it layer by layer
    heads=llama.heads("Qwen2"),
)
