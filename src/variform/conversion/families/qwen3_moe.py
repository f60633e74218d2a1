"""Qwen3-MoE (arXiv:2505.09388): Qwen3 with experts in some layers, and one sliding window in all."""

from dataclasses import replace
from typing import Any

from .. import experts
from . import llama, mistral, mixtral, qwen2


def read(foreign) -> dict[str, Any]:
    # Its class reads the width of a head, which its config does not declare
    head_dim = getattr(foreign, "head_dim", None)
    return mistral.read(foreign) | experts.read_layers(foreign) | {"head_dim": head_dim}


def write(form) -> dict[str, Any]:
    values = mistral.write(form) | experts.write_layers(form)
    return values | qwen2.write_head_dim(form) | {"use_sliding_window": values["sliding_window"] is not None}


FAMILY = replace(
    llama.FAMILY,
    model_type="qwen3_moe",
    same={ours: name for ours, name in llama.SAME.items() if ours not in ("mlp_bias", "head_dim")} | experts.SAME,
    fixed={"qk_norm": "head"},
    read=read,
    write=write,
    inert=experts.INERT,
    rows=mixtral.rows,
    stored=experts.stored,
    heads=llama.heads("Qwen3Moe"),
)
