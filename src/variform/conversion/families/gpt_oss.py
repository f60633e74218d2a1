"""gpt-oss (arXiv:2508.10925): windows in every other layer, sinks, and experts with a clamped gate and biases.

The class holds the matrices of its experts transposed, the columns of a gate and of what it scales in turn.
"""

from dataclasses import replace
from typing import Any

from .. import experts
from ..family import patterns, windows
from ..tables import Row
from . import llama

SAME = {ours: name for ours, name in llama.SAME.items() if ours not in ("mlp_bias", "hidden_act")}
# What their tensors of all experts go through before they are as Mixtral's
HELD = {
    f"{experts.BLOCK}.experts.gate_up_proj": ("transpose_each", "unzip"),
    f"{experts.BLOCK}.experts.gate_up_proj_bias": ("unzip",),
    f"{experts.BLOCK}.experts.down_proj": ("transpose_each",),
    f"{experts.BLOCK}.experts.down_proj_bias": (),
}


def read(foreign) -> dict[str, Any]:
    return llama.read(foreign) | {"attention_patterns": patterns(foreign), "glu_limit": foreign.swiglu_limit}


def write(form) -> dict[str, Any]:
    types, window = windows(form)
    values = llama.write(form) | {"layer_types": types}
    # What has no window, or no limit, is refused when it is compared
    values |= {} if window is None else {"sliding_window": window}
    return values | ({} if form.glu_limit is None else {"swiglu_limit": float(form.glu_limit)})


def rows(form) -> list[Row]:
    router, sinks = "layers.{i}.mlp.router.{p}", "layers.{i}.self_attn.sinks"
    return [
        *llama.rows(form),
        Row(sinks, sinks),
        Row(router, f"{experts.BLOCK}.gate.{{p}}"),
        *(row._replace(operations=(*HELD[str(row.foreign)], *row.operations)) for row in projections(form)),
    ]


def projections(form) -> list[Row]:
    """Rows of the experts, as if they were held as ours."""
    if form.experts_layout == "modulelist":
        return [*experts.matrices(form.num_experts), *experts.matrices(form.num_experts, kind="bias")]
    return [Row(name, name) for name in HELD]


FAMILY = replace(
    llama.FAMILY,
    model_type="gpt_oss",
    same={
        # Written from the experts' width, where there is another
        "moe_intermediate_size": "intermediate_size",
        **SAME,
        "num_experts": "num_local_experts",
        "num_experts_per_tok": "num_experts_per_tok",
        "router_aux_loss_coef": "router_aux_loss_coef",
    },
    fixed={
        "attention_sinks": True,
        "hidden_act": "quick_gelu",
        "glu_offset": 1.0,
        "mlp_bias": True,
        "mlp_layer_types": ["sparse"],
        "norm_topk_prob": True,
        "router_bias": True,
    },
    read=read,
    write=write,
    # `layer_types` says where windows are; the class has one activation, whatever its config names
    inert=experts.INERT | {"sliding_window", "hidden_act"},
    rows=rows,
    heads={name: head for name, head in llama.heads("GptOss").items() if name != "AutoModelForQuestionAnswering"},
)
