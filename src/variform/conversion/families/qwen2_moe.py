"""Qwen2-MoE (arXiv:2407.10671): Qwen2 with experts in some layers, and beside them a gated one that all tokens use."""

from dataclasses import replace
from typing import Any

from .. import experts
from ..tables import Row
from . import llama, mixtral, qwen2


def read(foreign) -> dict[str, Any]:
    shared, width = foreign.shared_expert_intermediate_size, foreign.moe_intermediate_size
    if shared % width:
        raise ValueError(
            f"qwen2_moe: `shared_expert_intermediate_size={shared}` must be a multiple of `moe_intermediate_size={width}`: "
            "shared experts are as wide as the others."
        )
    return {
        **qwen2.read(foreign),
        **experts.read_layers(foreign),
        "attention_bias": ["q", "k", "v"] if foreign.qkv_bias else False,
        "num_shared_experts": shared // width,
    }


def write(form) -> dict[str, Any]:
    return {
        **qwen2.write(form),
        **experts.write_layers(form),
        "qkv_bias": bool(form.biased_projections),
        # Its class always has one
        "shared_expert_intermediate_size": max(1, form.num_shared_experts) * form.moe_intermediate_size,
    }


def rows(form) -> list[Row]:
    shared, ours = f"{experts.BLOCK}.shared_expert", f"{experts.BLOCK}.shared_experts"
    return [
        *mixtral.rows(form),
        Row(f"{shared}.{{mlp}}_proj.weight", f"{ours}.{{mlp}}_proj.weight"),
        Row(f"{shared}_gate.weight", f"{shared}_gate.weight"),
    ]


FAMILY = replace(
    qwen2.FAMILY,
    model_type="qwen2_moe",
    same=qwen2.FAMILY.same | experts.SAME,
    fixed={"shared_expert_gate": True},
    read=read,
    write=write,
    inert=qwen2.FAMILY.inert | experts.INERT,
    rows=rows,
    stored=experts.stored,
    heads=llama.heads("Qwen2Moe", answers="model."),
)
