"""Qwen2 (arXiv:2407.10671): Llama with biases on queries, keys and values, and windows in some layers."""

from dataclasses import replace
from typing import Any

from ..family import patterns, windows
from . import llama


def read(foreign) -> dict[str, Any]:
    # Read by the class, though its config does not declare it
    head_dim = getattr(foreign, "head_dim", None)
    return llama.read(foreign) | {"attention_patterns": patterns(foreign), "head_dim": head_dim}


def write_head_dim(form) -> dict[str, Any]:
    is_usual = form.head_dim * form.num_attention_heads == form.hidden_size
    return {} if is_usual else {"head_dim": form.head_dim}


def write(form) -> dict[str, Any]:
    types, window = windows(form)
    values = {"layer_types": types, "sliding_window": window, "use_sliding_window": window is not None}
    return llama.write(form) | values | write_head_dim(form)


FAMILY = replace(
    llama.FAMILY,
    model_type="qwen2",
    same={ours: name for ours, name in llama.SAME.items() if ours not in ("attention_bias", "mlp_bias", "head_dim")},
    fixed={"attention_bias": ["q", "k", "v"]},
    read=read,
    write=write,
    # `layer_types` says it layer by layer
    inert=frozenset({"max_window_layers", "use_sliding_window", "sliding_window"}),
    heads=llama.heads("Qwen2"),
)
