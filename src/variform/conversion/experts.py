"""What families with experts have in common: fields of their configs, and rows of their name tables, in memory and on disk."""

from typing import Any, Literal

from transformers import PreTrainedConfig

from .compare import mlp_type
from .tables import Row

BLOCK = "layers.{i}.mlp"
SAME = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "norm_topk_prob": "norm_topk_prob",
    "moe_intermediate_size": "moe_intermediate_size",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
# The first turns the balance loss on, which ours has in training; the others say what is read layer by layer
INERT = frozenset({"output_router_logits", "decoder_sparse_step", "mlp_only_layers"})


def rows(form: PreTrainedConfig) -> list[Row]:
    """Rows of a router and of gated experts that the foreign class holds as one tensor a projection, as ours does or not."""
    names = ("gate_up_proj", "down_proj")
    experts = [Row(f"{BLOCK}.experts.{name}", f"{BLOCK}.experts.{name}") for name in names]
    if form.experts_layout == "modulelist":
        experts = matrices(form.num_experts)
    return [Row(f"{BLOCK}.gate.weight", f"{BLOCK}.gate.weight"), *experts]


def matrices(
    num_experts: int,
    block: str = BLOCK,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    kind: Literal["weight", "bias"] = "weight",
) -> list[Row]:
    """Rows from one tensor a projection to the matrices of each expert: its gate's, its input's and its output's."""
    gate, up, down = ([f"{block}.experts.{number}.{name}.{kind}" for number in range(num_experts)] for name in names)
    pairs = tuple(name for pair in zip(gate, up) for name in pair)
    end = "_bias" if kind == "bias" else ""
    return [
        Row(f"{BLOCK}.experts.gate_up_proj{end}", pairs, ("unstack_pairs",)),
        Row(f"{BLOCK}.experts.down_proj{end}", tuple(down), ("unstack",)),
    ]


def stored(foreign: PreTrainedConfig) -> list[Row]:
    """How the relatives of Qwen2-MoE store their experts."""
    return matrices(foreign.num_experts)


def read_layers(foreign: PreTrainedConfig) -> dict[str, Any]:
    """Which layers are sparse, in the configs of Qwen's families."""
    steps = range(1, foreign.num_hidden_layers + 1)
    dense = {*foreign.mlp_only_layers, *(step - 1 for step in steps if step % foreign.decoder_sparse_step)}
    return {"mlp_layer_types": ["dense" if step - 1 in dense else "sparse" for step in steps]}


def write_layers(form: PreTrainedConfig) -> dict[str, Any]:
    """The same, layer by layer."""
    dense = [layer for layer in range(form.num_hidden_layers) if mlp_type(form, layer) == "dense"]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}
