"""The experts of a stack: their fields, what follows from those that are given, and what they may not say."""

from dataclasses import dataclass
from typing import Any, Literal

from .checks import Number, differ_within_groups, one_of, refuse

RouterType = Literal["softmax_topk", "switch", "sigmoid_bias", "expert_choice"]


@dataclass(kw_only=True)
class ExpertFields:
    """
    What a config says of experts, networks among which each token of a sparse layer chooses.

    Args:
        num_experts: how many there are in a sparse layer; 0 for none.
        mlp_layer_types: "dense" or "sparse" for each layer; a shorter list is tiled. Default: all sparse if there are experts.
        num_experts_per_tok: how many a token uses (with expert_choice, on average). Default: 2; 1 for switch.
        moe_intermediate_size: inner width of an expert. Default: intermediate_size.
        num_shared_experts: experts that all tokens use besides.
        shared_expert_gate: a sigmoid gate on their sum (Qwen2-MoE).
        router_type: softmax_topk (Mixtral); switch (one expert, of limited capacity, weighted by its softmax score);
            sigmoid_bias (DeepSeek-V3: a bias for choosing only); expert_choice (each expert takes its best tokens; encoders).
        norm_topk_prob: the weights of a token's experts add up to 1. Default: where it has several.
        routed_scaling_factor: factor on the weights.
        router_bias: the logits of routers have a bias (gpt-oss).
        n_group, topk_group: sigmoid_bias chooses within the topk_group best of n_group groups of experts.
        router_bias_update_rate: step of that bias towards an even load, after each optimizer step.
        router_jitter_noise: in training, the router (not the experts) reads its input times 1 +- this much.
        expert_capacity_factor: an expert takes at most this many times its even share of a sequence's real tokens, the first
            ones; others pass by on the residual. Default: no limit; 1.25 for switch.
        expert_capacity: the same as a number of tokens.
        expert_capacity_in_eval: a decoder has the limit in evaluation as well, and then no cache (encoders always have it).
        router_aux_loss_coef: of the balance loss, in training. Default: 0.01; 0 where routers balance otherwise.
        router_z_loss_coef: of the mean squared logsumexp of router logits, in training.
        experts_layout: "fused" (one tensor a projection) or "modulelist" (one nn.Linear an expert, for LoRA and quantizers).
    """

    num_experts: int = 0
    mlp_layer_types: list[str] | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    num_shared_experts: int = 0
    shared_expert_gate: bool = False
    router_type: RouterType = "softmax_topk"
    norm_topk_prob: bool | None = None
    routed_scaling_factor: Number = 1.0
    router_bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    router_bias_update_rate: Number = 0.001
    router_jitter_noise: Number = 0.0
    expert_capacity_factor: Number | None = None
    expert_capacity: int | None = None
    expert_capacity_in_eval: bool = False
    router_aux_loss_coef: Number | None = None
    router_z_loss_coef: Number = 0.0
    experts_layout: Literal["fused", "modulelist"] = "fused"

    def is_sparse_layer(self, layer_idx: int) -> bool:
        """Whether a layer has experts in place of a feed-forward."""
        types = self.mlp_layer_types or ["dense"]
        return types[layer_idx % len(types)] == "sparse"

    @property
    def routes_by_row(self) -> bool:
        """Whether the tokens of a row compete for the experts."""
        has_capacity = self.expert_capacity is not None or self.expert_capacity_factor is not None
        return self.num_experts > 0 and (has_capacity or self.router_type == "expert_choice")


def set_expert_defaults(config: Any) -> None:
    """What follows from the number of experts and the router, where it is not given."""
    is_switch = config.router_type == "switch"
    if config.router_aux_loss_coef is None:
        config.router_aux_loss_coef = default_balance_coef(config.num_experts, config.router_type)
    if config.num_experts_per_tok is None:
        config.num_experts_per_tok = 1 if is_switch else min(2, max(1, config.num_experts))
    if config.moe_intermediate_size is None:
        config.moe_intermediate_size = config.intermediate_size
    if config.norm_topk_prob is None:
        config.norm_topk_prob = config.num_experts_per_tok > 1 and config.router_type in (
            "softmax_topk",
            "sigmoid_bias",
        )
    if is_switch and config.expert_capacity is None and config.expert_capacity_factor is None:
        config.expert_capacity_factor = 1.25
    if config.mlp_layer_types is None and config.num_experts > 0:
        config.mlp_layer_types = ["sparse"]
    if config.mlp_layer_types:
        # transformers checks that there is one for each layer
        types = config.mlp_layer_types
        config.mlp_layer_types = [types[i % len(types)] for i in range(config.num_hidden_layers)]


def default_balance_coef(num_experts: int, router_type: str) -> float:
    """Of the balance loss: routers with a bias, and experts that choose, are even without it."""
    return 0.01 if num_experts > 0 and router_type in ("softmax_topk", "switch") else 0.0


def check_experts(config: Any) -> None:
    """Refuses what the fields may not say, each by itself or beside the others of the stack."""
    experts, per_token = config.num_experts, config.num_experts_per_tok
    refuse(experts < 0, f"`num_experts={experts}` must be 0 (none) or more.")
    is_sparse = "sparse" in (config.mlp_layer_types or [])
    refuse(config.mlp_layer_types == [], "`mlp_layer_types=[]` is empty: name 'dense' or 'sparse' for the layers.")
    for entry in config.mlp_layer_types or []:
        one_of("mlp_layer_types", entry, ("dense", "sparse"))
    refuse(
        experts == 0 and is_sparse,
        f"`num_experts=0` leaves the sparse layers of `mlp_layer_types={config.mlp_layer_types}` without experts; set it to "
        "2 or more, or leave them dense.",
    )
    refuse(
        experts > 0 and not is_sparse,
        f"`num_experts={experts}`, but `mlp_layer_types` has no 'sparse' layer that would have them; name one, or drop it.",
    )
    if experts == 0:
        return
    refuse(
        not 1 <= per_token <= experts,
        f"`num_experts_per_tok={per_token}` must lie between 1 and `num_experts={experts}`.",
    )
    refuse(
        config.moe_intermediate_size < 1, f"`moe_intermediate_size={config.moe_intermediate_size}` must be at least 1."
    )
    refuse(
        config.num_shared_experts < 0, f"`num_shared_experts={config.num_shared_experts}` must be 0 (none) or more."
    )
    refuse(
        config.shared_expert_gate and config.num_shared_experts == 0,
        "`shared_expert_gate=True` gates shared experts: set `num_shared_experts` to 1 or more, or drop it.",
    )
    for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"):
        value = getattr(config, name)
        refuse(value < 0, f"`{name}={value}` must be 0 (off) or more.")
    jitter = config.router_jitter_noise
    refuse(not 0 <= jitter < 1, f"`router_jitter_noise={jitter}` must lie in [0, 1).")
    check_router(config)
    check_capacity(config)
    refuse(
        differ_within_groups(config, [config.is_sparse_layer(i) for i in range(config.num_hidden_layers)]),
        f"`num_hidden_groups={config.num_hidden_groups}` makes layers share weights that `mlp_layer_types` makes dense here, "
        "sparse there; give one type to each group.",
    )


def check_router(config: Any) -> None:
    """How the tokens of sparse layers choose their experts."""
    experts, per_token, router = config.num_experts, config.num_experts_per_tok, config.router_type
    refuse(
        router == "expert_choice" and config.is_causal_stack,
        "`router_type='expert_choice'` lets experts choose among all tokens, later ones too, which a decoder must not see; "
        "use 'softmax_topk'.",
    )
    refuse(
        router == "switch" and per_token != 1,
        f"`router_type='switch'` uses one expert a token, got `num_experts_per_tok={per_token}`; set it to 1, or use "
        "'softmax_topk'.",
    )
    is_normalised = bool(config.norm_topk_prob)
    refuse(
        is_normalised and router in ("switch", "expert_choice"),
        f"`norm_topk_prob=True` does not go with `router_type={router!r}`, whose weights are the scores; drop it.",
    )
    refuse(
        is_normalised and per_token == 1 and experts > 1,
        "`norm_topk_prob=True` makes the weight of `num_experts_per_tok=1` always 1, from which no router can learn; "
        "set it to False.",
    )
    refuse(
        router == "expert_choice" and config.routed_scaling_factor != 1.0,
        f"`routed_scaling_factor={config.routed_scaling_factor}` is for routers whose tokens choose; leave it 1.0.",
    )
    has_groups = config.n_group != 1 or config.topk_group != 1
    refuse(
        has_groups and router != "sigmoid_bias",
        f"`n_group={config.n_group}` and `topk_group={config.topk_group}` are for `router_type='sigmoid_bias'`; leave them 1.",
    )
    refuse(
        config.n_group < 1 or experts % config.n_group != 0,
        f"`n_group={config.n_group}` does not divide `num_experts={experts}`.",
    )
    refuse(
        not 1 <= config.topk_group <= config.n_group,
        f"`topk_group={config.topk_group}` must lie between 1 and `n_group={config.n_group}`.",
    )
    within = config.topk_group * experts // config.n_group
    refuse(
        per_token > within,
        f"`num_experts_per_tok={per_token}` is more than the {within} experts of `topk_group={config.topk_group}` groups.",
    )


def check_capacity(config: Any) -> None:
    """The limit of an expert."""
    factor, capacity = config.expert_capacity_factor, config.expert_capacity
    refuse(
        factor is not None and factor <= 0,
        f"`expert_capacity_factor={factor}` must be above 0; leave it unset for no limit.",
    )
    refuse(
        capacity is not None and capacity < 1,
        f"`expert_capacity={capacity}` must be at least 1 token; leave it unset for no limit.",
    )
    refuse(
        factor is not None and capacity is not None,
        f"`expert_capacity_factor={factor}` and `expert_capacity={capacity}` both limit an expert; give one.",
    )
    refuse(
        config.expert_capacity_in_eval and factor is None and capacity is None,
        "`expert_capacity_in_eval=True`, but there is no capacity; set `expert_capacity_factor`, or drop it.",
    )
    refuse(
        config.expert_capacity_in_eval and not config.is_causal_stack,
        "`expert_capacity_in_eval=True` is for decoders: encoders have the limit in evaluation anyway; drop it.",
    )
    refuse(
        config.expert_capacity_in_eval and config.use_cache,
        "`use_cache=True`: with `expert_capacity_in_eval` an expert's room is counted over the whole text, which a cache "
        "does not hold; set one of them to False.",
    )
