"""What two forms must have in common to compute the same: their fields, each said in one way, where they are read."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from ..fields import EXPERT_CHOICES


def comparable(form: PreTrainedConfig) -> dict[str, Any]:
    """All fields that say what a form computes, with their defaults resolved; stacks after `encoder.` and `decoder.`."""
    values: dict[str, Any] = {}
    for f in fields(form):
        value = getattr(form, f.name)
        if isinstance(value, PreTrainedConfig):
            values |= {f"{f.name}.{name}": inner for name, inner in comparable(value).items()}
        elif f.name not in NOT_FORM and NEEDS.get(f.name, lambda form: True)(form):
            values[f.name] = RESOLVED.get(f.name, lambda form, name=f.name: getattr(form, name))(form)
    return values


def is_same(value: Any, other: Any) -> bool:
    """Equality, up to rounding for what was computed from a rounded number."""
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-9)
    return value == other


NOT_FORM = {f.name for f in fields(PreTrainedConfig)} | {
    "origin",
    "variform_version",
    "is_encoder_decoder",
    "use_cache",
    "experts_layout",
}
# Fields that can be said in two ways, in one of them
RESOLVED: dict[str, Callable[[Any], Any]] = {
    "attention_patterns": lambda form: [str(form.pattern_of(i)) for i in range(form.num_hidden_layers)],
    "rope_parameters": lambda form: [form.rope_parameters_of(layer_type) for layer_type in form.layer_types],
    "attention_bias": lambda form: sorted(form.biased_projections),
    "attention_scale": lambda form: form.attention_scale or form.head_dim**-0.5,
    "embedding_scale": lambda form: (
        form.embedding_size**0.5 if form.embedding_scale == "sqrt" else form.embedding_scale
    ),
    "num_hidden_groups": lambda form: form.num_hidden_groups or form.num_hidden_layers,
    "mlp_layer_types": lambda form: [mlp_type(form, layer) for layer in range(form.num_hidden_layers)],
    "head_act": lambda form: form.head_act or form.hidden_act,
    "head_bias": lambda form: form.mlp_bias if form.head_bias is None else form.head_bias,
}
# Fields of a stack that only layers with experts read
OF_EXPERTS = (
    "num_experts_per_tok",
    "moe_intermediate_size",
    "num_shared_experts",
    "shared_expert_gate",
    *EXPERT_CHOICES,
)
# When a field that is not always read is read
NEEDS: dict[str, Callable[[Any], bool]] = {
    "max_position_embeddings": lambda form: form.position_embedding_type in ("learned", "axial", "sinusoidal", "rope"),
    "axial_shape": lambda form: form.position_embedding_type == "axial",
    "axial_dims": lambda form: form.position_embedding_type == "axial",
    "position_offset": lambda form: form.position_embedding_type in ("learned", "sinusoidal"),
    "sinusoidal_layout": lambda form: form.position_embedding_type == "sinusoidal",
    "sinusoidal_exponent": lambda form: form.position_embedding_type == "sinusoidal",
    "relative_attention_num_buckets": lambda form: form.position_embedding_type == "relative_bias",
    "relative_attention_max_distance": lambda form: form.position_embedding_type == "relative_bias",
    "rope_parameters": lambda form: form.position_embedding_type == "rope",
    "norm_bias": lambda form: form.norm_type == "layer_norm",
    "intermediate_size": lambda form: "dense" in RESOLVED["mlp_layer_types"](form),
    **dict.fromkeys(OF_EXPERTS, lambda form: form.num_experts > 0),
}


def mlp_type(form: PreTrainedConfig, layer_idx: int) -> str:
    """Whether a layer's feed-forward is "dense" or "sparse"."""
    return "sparse" if form.is_sparse_layer(layer_idx) else "dense"
