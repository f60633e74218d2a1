"""How a form is shared out among processes: the plans that transformers' parallelism reads from a config."""

from typing import Any

from .patterns import parse
from .sparse_patterns import Lsh


def fsdp_plan(config: Any) -> dict[str, str]:
    """The units that FSDP2 shards; the last norm stays whole because the head reads it at once.

    The head is part of the root's unit, where its weight is whole and plain while the loss reads it (the fast way of
    `linear_cross_entropy`); a table that it is tied to must stay whole as well.
    """
    table = "keep_full_weight" if config.tie_word_embeddings else "free_full_weight"
    plan = {"embed_tokens": table, "layers.*": "free_full_weight"}
    return {**plan, "norm": "keep_full_weight"} if config.final_norm else plan


def tensor_plan(config: Any) -> dict[str, str]:
    """How tensor parallelism shards a layer: each process computes some heads and a slice of the feed-forward.

    Where a head has data of its own (its bias, sink, pattern or share of a norm), queries, keys and values are gathered
    and each process computes all heads: still right, and slower.
    """
    patterns = [parse(entry) for entry in config.attention_patterns]
    is_per_head = config.attention_sinks or config.qk_norm == "full"
    is_per_head = is_per_head or any(len(p.by_head(config.num_attention_heads)) > 1 for p in patterns)
    hashes = [isinstance(p, Lsh) for p in patterns]
    is_per_head = is_per_head or any(hashes)
    if is_per_head or config.position_embedding_type in ("relative_bias", "alibi", "transformer_xl"):
        split, merge = "colwise_gather_output", "rowwise_split_input"
    else:
        split, merge = "colwise", "rowwise"
    attention = {"q_proj": split, "k_proj": split, "v_proj": split, "o_proj": merge}
    if all(hashes):
        del attention["k_proj"]
    if config.position_embedding_type == "transformer_xl":
        attention["r_proj"] = split
    if any(getattr(p, "global_projections", False) for p in patterns):
        attention |= {f"{name}_global": split for name in ("q_proj", "k_proj", "v_proj")}
    if config.qk_norm == "head":
        norm = "replicated_with_grad_allreduce" if split == "colwise" else "replicate"
        attention |= dict.fromkeys(["q_norm"] if all(hashes) else ["q_norm", "k_norm"], norm)
    plan = {f"layers.*.self_attn.{name}": style for name, style in attention.items()}
    plan |= {f"layers.*.mlp.{name}": style for name, style in feed_forward_plan(config).items()}
    return {"embed_tokens": "embedding_rowwise", **plan}


def feed_forward_plan(config: Any) -> dict[str, str]:
    """Each process holds a slice of every expert and of the shared ones; routers and their gates stay whole."""
    feed_forward = {"up_proj": "colwise", "down_proj": "rowwise"}
    if config.gated_mlp:
        feed_forward["gate_proj"] = "colwise"
    are_sparse = set(map(config.is_sparse_layer, range(config.num_hidden_layers)))
    plan = dict(feed_forward) if False in are_sparse else {}
    if True not in are_sparse:
        return plan
    if config.num_shared_experts:
        plan |= {f"shared_experts.{name}": style for name, style in feed_forward.items()}
    if config.experts_layout == "modulelist":
        return plan | {f"experts.*.{name}": style for name, style in feed_forward.items()}
    # On the biases, one row an expert, the row styles split the last axis; that of the output has none and stays whole
    styles = {
        "gate_up_proj": "packed_colwise",
        "gate_up_proj_bias": "packed_rowwise",
        "up_proj": "colwise",
        "up_proj_bias": "rowwise",
        "down_proj": "rowwise",
    }
    plan |= {f"experts.{name}": styles[name] for name in config.expert_parameters if name in styles}
    return {**plan, "experts": "moe_tp_experts"}


def expert_plan(config: Any) -> dict[str, str] | None:
    """How expert parallelism shares out sparse layers: each process holds some experts whole, and tokens travel to them."""
    has_experts = any(map(config.is_sparse_layer, range(config.num_hidden_layers)))
    if not has_experts or config.experts_layout == "modulelist":
        return None
    plan = {f"layers.*.mlp.experts.{name}": "grouped_gemm" for name in config.expert_parameters}
    return {**plan, "layers.*.mlp.experts": "ep_dispatch_experts"}
