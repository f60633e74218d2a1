"""OLMoE (arXiv:2409.02060): Llama with experts in all layers, queries and keys normed over their full width."""

from dataclasses import replace

from .. import experts
from . import llama, mixtral

FAMILY = replace(
    llama.FAMILY,
    model_type="olmoe",
    same={
        # Written from the experts' width, where there is another
        "moe_intermediate_size": "intermediate_size",
        **{ours: name for ours, name in llama.SAME.items() if ours not in ("mlp_bias", "head_dim")},
        **{ours: name for ours, name in experts.SAME.items() if ours != "moe_intermediate_size"},
    },
    fixed={"qk_norm": "full", "mlp_layer_types": ["sparse"]},
    inert=experts.INERT,
    rows=mixtral.rows,
    stored=experts.stored,
    heads={name: head for name, head in llama.heads("Olmoe").items() if name in ("AutoModel", "AutoModelForCausalLM")},
)
