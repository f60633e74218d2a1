"""Gemma 3, text (arXiv:2503.19786): Llama with norms around each sublayer, two ropes, windows in most layers."""

from dataclasses import replace
from typing import Any

from ..family import Head, patterns, windows
from ..tables import Row
from . import llama

SAME = {ours: name for ours, name in llama.SAME.items() if ours not in ("mlp_bias", "hidden_act")}
SAME |= {"hidden_act": "hidden_activation", "final_logit_softcapping": "final_logit_softcapping"}
FIXED: dict[str, Any] = {
    "embedding_scale": "sqrt",
    "norm_placement": "sandwich",
    "norm_unit_offset": True,
    "qk_norm": "head",
}


def read(foreign) -> dict[str, Any]:
    scale = foreign.query_pre_attn_scalar**-0.5
    return llama.read(foreign) | {"attention_patterns": patterns(foreign), "attention_scale": scale}


def write(form) -> dict[str, Any]:
    types, window = windows(form)
    values = llama.write(form) | {
        "layer_types": types,
        "query_pre_attn_scalar": max(1, round(form.attention_scale**-2)) if form.attention_scale else form.head_dim,
        "rope_parameters": {name: form.rope_parameters_of(name) for name in ("full_attention", "sliding_attention")},
    }
    return values if window is None else values | {"sliding_window": window}


def rows(form) -> list[Row]:
    layer = "layers.{i}"
    return [
        Row(f"{layer}.post_attention_layernorm.weight", f"{layer}.attention_residual.branch_norm.weight"),
        Row(f"{layer}.pre_feedforward_layernorm.weight", f"{layer}.mlp_residual.input_norm.weight"),
        Row(f"{layer}.post_feedforward_layernorm.weight", f"{layer}.mlp_residual.branch_norm.weight"),
        *(row for row in llama.rows(form) if "post_attention_layernorm" not in row.foreign),
    ]


LLAMA = llama.heads("Gemma3")

FAMILY = replace(
    llama.FAMILY,
    model_type="gemma3_text",
    same=SAME,
    fixed=FIXED,
    read=read,
    write=write,
    # The native class has a field for a soft-cap on the scores and does not use it; `layer_types` says where windows are
    inert=frozenset({"attn_logit_softcapping", "sliding_window"}),
    rows=rows,
    heads={
        "AutoModel": Head("Gemma3TextModel"),
        "AutoModelForCausalLM": LLAMA["AutoModelForCausalLM"],
        "AutoModelForSequenceClassification": replace(
            LLAMA["AutoModelForSequenceClassification"], foreign="Gemma3TextForSequenceClassification"
        ),
    },
)
