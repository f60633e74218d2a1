"""Mixtral (arXiv:2401.04088): Mistral with experts in all layers.

Its router jitter multiplies what the experts read as well; ours only what the router reads.
"""

from dataclasses import replace

from .. import experts
from ..tables import Row
from . import llama, mistral


def rows(form) -> list[Row]:
    return [*llama.rows(form), *experts.rows(form)]


def stored(foreign) -> list[Row]:
    block = "layers.{i}.block_sparse_moe"
    table = experts.matrices(foreign.num_local_experts, block, names=("w1", "w3", "w2"))
    return [Row(f"{experts.BLOCK}.gate.weight", f"{block}.gate.weight"), *table]


FAMILY = replace(
    mistral.FAMILY,
    model_type="mixtral",
    same={
        # Written from the experts' width, where there is another
        "moe_intermediate_size": "intermediate_size",
        **mistral.FAMILY.same,
        "num_experts": "num_local_experts",
        "num_experts_per_tok": "num_experts_per_tok",
        "router_aux_loss_coef": "router_aux_loss_coef",
        "router_jitter_noise": "router_jitter_noise",
    },
    fixed={"norm_topk_prob": True, "mlp_layer_types": ["sparse"]},
    inert=experts.INERT,
    rows=rows,
    stored=stored,
    heads=llama.heads("Mixtral", answers="model."),
)
