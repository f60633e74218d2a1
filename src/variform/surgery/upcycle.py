"""A dense model made sparse: its feed-forward networks become experts that together compute what they did."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..fields import EXPERT_CHOICES, ROUTER_COEFFICIENTS
from ..model.checks import one_of, refuse
from ..report.costs import stacks_of
from .experts import Network, below, fuse, fused_names, sparse_blocks
from .rebuilding import (
    Part,
    Statement,
    by_stack,
    change_config,
    rebuild,
    refuse_unfit,
    take_generation_config,
)

# What a caller may say of the experts besides their number; the rest follows
CHOICES = (*EXPERT_CHOICES, "experts_layout")
FOLLOWING = (
    "num_experts",
    "num_experts_per_tok",
    "mlp_layer_types",
    "moe_intermediate_size",
    *ROUTER_COEFFICIENTS[:1],
)
REFUSED = {
    "moe_intermediate_size": "it is `intermediate_size` / `granularity`; choose `granularity`",
    "num_shared_experts": "their output would be added to what the dense model computes; leave it out",
    "shared_expert_gate": "there are no shared experts; leave it out",
    "mlp_layer_types": "say which with `layers`",
}
# A router whose weights are its scores starts with logits of a few roundings: they choose, and change no weight
ROUNDINGS = 4


class Start(NamedTuple):
    """How the experts of a stack are made of a feed-forward network.

    Attributes:
        granularity: into how many slices its inner width is cut; expert e holds slice e % granularity.
        slice_scale: factor on the output weights of a slice. bias_scale: on the output bias.
        router_std: standard deviation of the router's rows, of which each group of `granularity` experts has one.
        noise: standard deviation of what is added to each weight matrix of an expert, in those of the matrix.
    """

    granularity: int
    slice_scale: float
    bias_scale: float
    router_std: float
    noise: float


def upcycle(
    model: PreTrainedModel,
    num_experts: int | dict[str, int],
    num_experts_per_tok: int | dict[str, int] | None = None,
    granularity: int | dict[str, int] = 1,
    *,
    layers: Any = "all",
    noise: float = 0.0,
    seed: int = 0,
    is_exact: bool = True,
    return_statement: bool = False,
    **choices: Any,
) -> Any:
    """The model with experts in place of its feed-forward networks, each a copy of one (arXiv:2212.05055) or, with
    `granularity` G, of a G-th of its inner width (arXiv:2410.07524).

    Expert e holds slice e % G, and the G experts of a group have one row of the router between them: they score alike, so
    that a token that uses k x G experts uses k whole groups, which is k times the network. `routed_scaling_factor` makes the
    weights add up to what the slices need. So the result computes what the original does on every input, until a training
    step moves the rows apart.

    Args:
        model: any model of the family without experts; it stays as it is.
        num_experts: a multiple of G. Of an encoder-decoder for both stacks, or `{"decoder": 8}` for those named; so all below.
        num_experts_per_tok: a multiple of G. Default: two groups; one for the router "switch".
        granularity: G; it divides `intermediate_size`.
        layers: "all"; "every:2", the second, fourth, ... one; or a list of numbers from 0 on.
        noise: adds noise to the experts, of this part of each matrix's standard deviation (arXiv:2406.06563). Then the
            result is the original no more.
        seed: of the routers and the noise.
        is_exact: refuse what cannot start as the original. False allows it, and the statement tells what differs.
        return_statement: return what is preserved and what is not, instead of logging it.
        choices: `router_type norm_topk_prob routed_scaling_factor router_bias n_group topk_group router_bias_update_rate
            router_jitter_noise expert_capacity_factor expert_capacity expert_capacity_in_eval experts_layout
            router_aux_loss_coef router_z_loss_coef`, as in the config. Default: as there, but without a limit of tokens for
            "switch", and with the `routed_scaling_factor` that leaves all weights as they are; another one is made up for in
            the output weights of the experts (1.0: for families that have no such field).

    Returns:
        A model of the same class, with copies of the tensors, on the original's device, in its dtypes and mode. With
        `return_statement`, that model and a `Statement`. Nothing of an optimizer comes along: its moments are of other
        tensors.

    Raises:
        ValueError: for a model that is not ours, that holds adapters, or is quantised, sharded or not whole; that has experts
            already; for numbers that do not fit, a form that the config refuses, and one that cannot start as the original.
    """
    refuse_unfit(model)
    stacks = stacks_of(model.config)
    for name, reason in REFUSED.items():
        refuse(name in choices, f"`{name}={choices.get(name)!r}` is not for `upcycle`: {reason}.")
    for name in choices:
        one_of("argument of upcycle", name, (*CHOICES, *ROUTER_COEFFICIENTS))
    of_pair = {name: choices.pop(name) for name in ROUTER_COEFFICIENTS if name in choices}
    counts = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok, "granularity": granularity}
    wanted = by_stack(stacks, **counts, layers=layers, noise=noise, **choices)
    sides = [side for side in stacks if "num_experts" in wanted[side]]
    refuse_forgotten(sides, {**counts, "layers": layers, **choices})
    whole = of_whole(model.config, of_pair)
    changes, starts = {}, {}
    for side in sides:
        prefix = f"{side}." if model.config.is_encoder_decoder else ""
        own = {"granularity": 1, "layers": "all", "noise": 0.0, **wanted[side]}
        changed = sparse_fields(stacks[side], own, prefix)
        stack = stacks_of(change_config(model.config, {side: changed}, **whole))[side]
        start = plan_start(stack, own, model)
        if "routed_scaling_factor" not in own:
            start, changed["routed_scaling_factor"] = scaled_by_router(stack, start)
        obstacle = inexact(stack)
        refuse(
            is_exact and bool(obstacle),
            f"`{prefix}{obstacle}, so that the result cannot start as the original; change it, or give `is_exact=False`.",
        )
        changes[side], starts[side] = changed, start
    config = change_config(model.config, changes, **whole)
    generator = torch.Generator().manual_seed(seed)
    result = rebuild(model, config, partial(plan_experts, starts, generator))
    take_generation_config(model, result)
    statement = compare(model, result, starts)
    if return_statement:
        return result, statement
    statement.log()
    return result


def refuse_forgotten(sides: list[str], values: Mapping[str, Any]) -> None:
    """Raises `ValueError` for arguments of a stack that gets no experts, or if none does."""
    refuse(not sides, f"`num_experts={values['num_experts']!r}` names no stack; give a number.")
    for name, value in values.items():
        forgotten = sorted(value.keys() - set(sides)) if isinstance(value, dict) else []
        refuse(
            bool(forgotten),
            f"`{name}={value!r}` is for a stack that `num_experts` leaves dense: {', '.join(forgotten)}.",
        )


def of_whole(config: PreTrainedConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The coefficients of the routers' losses, which belong to the whole: those given, and the default of a first router."""
    has_experts = any(stack.num_experts for stack in stacks_of(config).values())
    return {**({} if has_experts else {"router_aux_loss_coef": None}), **given}


def sparse_fields(stack: PreTrainedConfig, own: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The fields of a stack that change.

    Args:
        own: the arguments of the stack. prefix: what stands before a field's name in a message.

    Raises:
        ValueError: for numbers that do not fit.
    """
    refuse(
        stack.num_experts > 0,
        f"`{prefix}num_experts={stack.num_experts}`: the model has experts already, and only a dense one can be upcycled.",
    )
    experts, slices = whole_number("num_experts", own["num_experts"]), whole_number("granularity", own["granularity"])
    refuse(experts < 2, f"`{prefix}num_experts={experts}` must be 2 or more.")
    router_type = own.get("router_type", "softmax_topk")
    refuse(
        router_type == "switch" and slices > 1,
        f"`granularity={slices}` needs as many experts a token, and `router_type='switch'` uses one; use 'softmax_topk'.",
    )
    per_token = own.get("num_experts_per_tok")
    if per_token is None:
        per_token = slices if router_type == "switch" else min(2 * slices, experts)
    per_token = whole_number("num_experts_per_tok", per_token)
    refuse(
        slices < 1 or stack.intermediate_size % slices != 0,
        f"`granularity={slices}` does not divide `{prefix}intermediate_size={stack.intermediate_size}`.",
    )
    for name, value in (("num_experts", experts), ("num_experts_per_tok", per_token)):
        refuse(
            value % slices != 0,
            f"`{name}={value}` is not a multiple of `granularity={slices}`: {slices} experts make up one network.",
        )
    changed = {f.name: f.default for f in fields(type(stack)) if f.name in (*CHOICES, *FOLLOWING)}
    changed.update({name: own[name] for name in CHOICES if name in own})
    changed.update(
        num_experts=experts,
        num_experts_per_tok=per_token,
        moe_intermediate_size=stack.intermediate_size // slices,
        mlp_layer_types=[
            "sparse" if i in sparse_layers(stack, own["layers"]) else "dense" for i in layer_range(stack)
        ],
    )
    has_limit = changed["expert_capacity"] is not None or changed["expert_capacity_factor"] is not None
    if router_type == "switch" and not has_limit:
        changed["expert_capacity_factor"] = experts / per_token  # room for all tokens
    return changed


def whole_number(name: str, value: Any) -> int:
    refuse(not isinstance(value, int) or isinstance(value, bool), f"`{name}={value!r}` is not a whole number.")
    return value


def layer_range(stack: PreTrainedConfig) -> range:
    return range(stack.num_hidden_layers)


def sparse_layers(stack: PreTrainedConfig, layers: Any) -> set[int]:
    """The numbers of the layers that `layers` names.

    Raises:
        ValueError: if it names none, or one that there is not.
    """
    if layers == "all":
        return set(layer_range(stack))
    mend = 'give "all", "every:2", or a list of numbers from 0 on'
    if isinstance(layers, str):
        word, _, step = layers.partition(":")
        refuse(word != "every" or not step.isdigit() or int(step) < 1, f"`layers={layers!r}`: {mend}.")
        found = {i for i in layer_range(stack) if (i + 1) % int(step) == 0}
    else:
        refuse(not isinstance(layers, Iterable), f"`layers={layers!r}`: {mend}.")
        found = {whole_number("layers", layer) for layer in layers}
    strange = sorted(found - set(layer_range(stack)))
    refuse(
        bool(strange) or not found,
        f"`layers={layers!r}` names {strange or 'no layer'}, and the layers are 0 to {stack.num_hidden_layers - 1}.",
    )
    return found


def sum_of_weights(stack: PreTrainedConfig) -> float:
    """What the weights of a token's experts add up to, before `routed_scaling_factor`, while all experts score alike."""
    if stack.norm_topk_prob:
        return 1.0
    if stack.router_type == "sigmoid_bias":
        return stack.num_experts_per_tok / 2
    return stack.num_experts_per_tok / stack.num_experts


def plan_start(stack: PreTrainedConfig, own: Mapping[str, Any], model: PreTrainedModel) -> Start:
    """How the experts of a stack start, with the config's `routed_scaling_factor`."""
    refuse(
        not isinstance(own["noise"], (int, float)) or own["noise"] < 0,
        f"`noise={own['noise']!r}` is a share of a standard deviation: 0 (none) or more.",
    )
    total = sum_of_weights(stack) * stack.routed_scaling_factor
    refuse(
        total <= 0,
        f"`routed_scaling_factor={stack.routed_scaling_factor}` must be above 0 for experts to be made up for it.",
    )
    std = model.config.initializer_range
    if not stack.norm_topk_prob:
        # Routers compute in float32; half precision has no numbers so small
        dtype = torch.float16 if model.dtype == torch.float16 else torch.float32
        std = ROUNDINGS * torch.finfo(dtype).eps / math.sqrt(stack.hidden_size)
    return Start(own["granularity"], own["granularity"] / total, 1 / total, std, own["noise"])


def scaled_by_router(stack: PreTrainedConfig, start: Start) -> tuple[Start, float]:
    """The same with a `routed_scaling_factor`, also returned, that leaves the weights of the slices as they are."""
    if stack.router_type == "expert_choice":
        return start, stack.routed_scaling_factor
    scale = start.slice_scale * stack.routed_scaling_factor
    return start._replace(slice_scale=1.0, bias_scale=1 / start.granularity), scale


def inexact(stack: PreTrainedConfig) -> str:
    """Which field, and why, keeps a form from starting as the dense one on every input; empty if none does."""
    if stack.router_type == "expert_choice":
        return "router_type='expert_choice'` gives a token as many experts as choose it, or none"
    has_limit = stack.expert_capacity_in_eval or not stack.is_causal_stack
    if has_limit and not has_room(stack):
        name = "expert_capacity" if stack.expert_capacity is not None else "expert_capacity_factor"
        return f"{name}={getattr(stack, name)}` lets tokens pass by an expert that has no room for them"
    groups = stack.num_experts // stack.n_group
    slices = stack.intermediate_size // stack.moe_intermediate_size
    if stack.topk_group < stack.n_group and groups % slices != 0:
        return f"n_group={stack.n_group}` parts the {slices} experts that make up one network"
    return ""


def has_room(stack: PreTrainedConfig) -> bool:
    """Whether an expert has room for all tokens of a sequence."""
    if stack.expert_capacity is not None:
        return stack.expert_capacity >= stack.max_position_embeddings
    factor = stack.expert_capacity_factor
    return factor is None or factor * stack.num_experts_per_tok >= stack.num_experts * (1 - 1e-12)


def plan_experts(
    starts: Mapping[str, Start],
    generator: torch.Generator,
    result: PreTrainedModel,
    stored: Mapping[str, torch.Tensor],
) -> dict[str, Part]:
    """The tensors of all experts and routers that have a feed-forward network to come from."""
    parts: dict[str, Part] = {}
    for name, block in sparse_blocks(result).items():
        side = "encoder" if "encoder" in name.split(".") else "decoder"
        start = starts.get(side) if len(stacks_of(result.config)) > 1 else next(iter(starts.values()))
        dense = below(stored, f"{name}.")
        if start is None or f"{name}.gate.weight" in stored:
            continue
        sources = {inner: f"{name}.{inner}" for inner in dense}
        count = block.gate.num_experts
        networks = Networks(dense, start, count, generator)
        if isinstance(block.experts, torch.nn.ModuleList):
            for number in range(count):
                for inner, source in sources.items():
                    make = partial(networks.tensor, number, inner)
                    parts[f"{name}.experts.{number}.{inner}"] = Part((source,), make)
        else:
            for fused, inners in fused_names(dense).items():
                make = partial(networks.fused, inners)
                parts[f"{name}.experts.{fused}"] = Part(tuple(sources[inner] for inner in inners), make)
        rows = partial(networks.router, next(iter(dense.values())))
        parts[f"{name}.gate.weight"] = Part((), rows)
        if block.gate.bias is not None:
            parts[f"{name}.gate.bias"] = Part((), partial(next(iter(dense.values())).new_zeros, count))
        for inner, buffer in block.gate.named_buffers():
            parts[f"{name}.gate.{inner}"] = Part((), partial(torch.zeros_like, buffer))
    return parts


class Networks:
    """The experts that are made of one feed-forward network, tensor by tensor."""

    def __init__(self, dense: Network, start: Start, count: int, generator: torch.Generator):
        self.dense, self.start, self.count, self.generator = dense, start, count, generator

    def tensor(self, number: int, name: str) -> torch.Tensor:
        """One tensor of one expert."""
        start, whole = self.start, self.dense[name].detach()
        place = number % start.granularity
        if name.startswith("act_fn."):
            return whole.clone()
        if name == "down_proj.bias":
            return whole * start.bias_scale
        axis = 1 if name == "down_proj.weight" else 0
        part = whole.chunk(start.granularity, dim=axis)[place].clone()
        if name == "down_proj.weight" and start.slice_scale != 1.0:
            part *= start.slice_scale
        if start.noise and name.endswith(".weight"):
            part += self.normal(part.shape, start.noise * part.float().std().item()).to(part)
        return part

    def fused(self, names: list[str]) -> torch.Tensor:
        """One tensor of all experts."""
        return fuse([{name: self.tensor(number, name) for name in names} for number in range(self.count)], names)

    def router(self, like: torch.Tensor) -> torch.Tensor:
        """`(count, hidden_size)`: one row for each group of experts that make up a network."""
        size = self.dense["down_proj.weight"].shape[0]
        rows = self.normal((self.count // self.start.granularity, size), self.start.router_std)
        return rows.repeat_interleave(self.start.granularity, dim=0).to(like)

    def normal(self, shape: tuple[int, ...], std: float) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) * std


def compare(model: PreTrainedModel, result: PreTrainedModel, starts: Mapping[str, Start]) -> Statement:
    """What an upcycled model keeps of the dense one."""
    equal = dict.fromkeys(stacks_of(model.config), math.inf)
    added = result.num_parameters() - model.num_parameters()
    kept, lost = [], []
    for side, start in starts.items():
        stack = stacks_of(result.config)[side]
        sparse = (stack.mlp_layer_types or []).count("sparse")
        each = f"{stack.num_experts_per_tok} of {stack.num_experts} experts, {stack.moe_intermediate_size:,} wide"
        times = stack.num_experts_per_tok / start.granularity
        kept.append(
            f"The {side}: in {sparse} of {stack.num_hidden_layers} layers a token uses {each}: {times:g} times the dense "
            "network's arithmetic."
        )
        obstacle = inexact(stack)
        if start.noise:
            words = f"noise of {start.noise:g} of a standard deviation"
            lost.append(f"The {side}'s experts have {words}: it starts near the original, not as it.")
        if obstacle:
            lost.append(f"The {side}'s `{obstacle}: it does not start as the original.")
        elif not has_room(stack):
            lost.append(f"In training, the {side}'s experts have limited room: tokens beyond it pass by.")
        if start.noise or obstacle:
            equal[side] = 0
        if not stack.norm_topk_prob and not obstacle:
            kept.append(f"The {side}'s weights are scores, and its routers start near 0: equal but for rounding.")
    is_equal = all(length == math.inf for length in equal.values())
    if is_equal:
        kept.insert(0, "Equal to the original on every input, until the first step of training.")
    kept.insert(1 if is_equal else 0, f"New parameters: {added:,}.")
    lost.append("An optimizer's state does not fit the new tensors: begin with a new one.")
    return Statement(equal, added, kept, lost)
