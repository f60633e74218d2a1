"""Experts as dicts of tensors, from and to each layout; and a model's experts moved from one layout to the other."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model.checks import one_of, refuse
from ..model.moe import EXPERTS_LAYOUTS, MixtureOfExperts
from ..report.costs import stacks_of
from .rebuilding import (
    Part,
    Statement,
    by_stack,
    change_config,
    rebuild,
    refuse_unfit,
    take_generation_config,
)

# One feed-forward network: {name within `FeedForward`: tensor}
Network = Mapping[str, torch.Tensor]
INTO = ("gate_proj", "up_proj")


def sparse_blocks(model: nn.Module) -> dict[str, MixtureOfExperts]:
    """{name: the block of each sparse layer}."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)}


def below(stored: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """{rest of the name: tensor} of the tensors whose names begin so."""
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}


def fused_names(network: Network) -> dict[str, list[str]]:
    """{name within `Experts`: the names of an expert's tensors that it holds}."""
    kinds = [kind for kind in ("weight", "bias") if f"down_proj.{kind}" in network]
    names: dict[str, list[str]] = {}
    for kind in kinds:
        suffix = "" if kind == "weight" else "_bias"
        into = [f"{name}.{kind}" for name in INTO if f"{name}.{kind}" in network]
        names["gate_up_proj" + suffix if len(into) == 2 else "up_proj" + suffix] = into
        names["down_proj" + suffix] = [f"down_proj.{kind}"]
    for name in network:
        if name.startswith("act_fn."):
            names["activation." + name.removeprefix("act_fn.")] = [name]
    return names


def fuse(networks: Sequence[Network], names: list[str]) -> torch.Tensor:
    """One tensor of the "fused" layout: of each expert the tensors of these names, below each other."""
    if names[0].startswith("act_fn."):
        return networks[0][names[0]].clone()  # all experts share it
    return torch.stack([torch.cat([network[name] for name in names]) for network in networks])


def take_expert(stored: Network, number: int) -> dict[str, torch.Tensor]:
    """One expert of the "fused" layout; its tensors are views."""
    network = {}
    for name, tensor in stored.items():
        if name.startswith("activation."):
            network["act_fn." + name.removeprefix("activation.")] = tensor
            continue
        kind = "bias" if name.endswith("_bias") else "weight"
        stem = name.removesuffix("_bias")
        if stem == "gate_up_proj":
            halves = tensor[number].chunk(2)
            network.update({f"{half}.{kind}": value for half, value in zip(INTO, halves)})
        else:
            network[f"{stem}.{kind}"] = tensor[number]
    return network


def change_experts_layout(
    model: PreTrainedModel, experts_layout: str | dict[str, str], *, return_statement: bool = False
) -> Any:
    """The model with its experts in another layout, bit by bit the same: "modulelist" for LoRA and quantizers that look for
    `nn.Linear`, "fused" for speed and expert parallelism.

    Args:
        model: a model of the family with experts; it stays as it is.
        experts_layout: "fused" or "modulelist", of an encoder-decoder for both stacks or by stack.
        return_statement: return what is preserved as well.

    Returns:
        A model of the same class, with copies of the tensors. With `return_statement`, that model and a `Statement`.

    Raises:
        ValueError: for a model without experts, or whose tensors have no place in the other layout: activations with weights
            that differ between experts, and experts of which some are frozen.
    """
    refuse_unfit(model)
    stacks = stacks_of(model.config)
    wanted = by_stack(stacks, experts_layout=experts_layout)
    for own in wanted.values():
        if own:
            one_of("experts_layout", own["experts_layout"], EXPERTS_LAYOUTS)
    sides = [side for side, own in wanted.items() if own and stacks[side].num_experts]
    refuse(
        not sides,
        f"`experts_layout={experts_layout!r}` is for experts, and the model has none: `upcycle` gives it some.",
    )
    changes = {side: wanted[side] for side in sides}
    config = change_config(model.config, changes)
    config.origin = model.config.origin  # the same form, stored otherwise
    result = rebuild(model, config, partial(plan_layout, model))
    take_generation_config(model, result)
    same = "Equal to the original on every input: the same experts, bit by bit, stored otherwise."
    statement = Statement(
        dict.fromkeys(stacks, float("inf")), result.num_parameters() - model.num_parameters(), [same], []
    )
    if return_statement:
        return result, statement
    statement.log()
    return result


def plan_layout(
    model: PreTrainedModel, result: PreTrainedModel, stored: Mapping[str, torch.Tensor]
) -> dict[str, Part]:
    """The tensors of all experts whose layout changes."""
    parts: dict[str, Part] = {}
    befores = sparse_blocks(model)
    for name, block in sparse_blocks(result).items():
        prefix = f"{name}.experts."
        tensors = below(stored, prefix)
        if type(block.experts) is type(befores[name].experts):
            continue
        if isinstance(block.experts, nn.ModuleList):
            parts.update(spread_parts(prefix, tensors, len(block.experts)))
        else:
            parts.update(fuse_parts(prefix, tensors))
    return parts


def spread_parts(prefix: str, tensors: Network, num_experts: int) -> dict[str, Part]:
    """From one tensor a projection to one network an expert."""
    sources = {name: take_expert({name: tensor}, 0) for name, tensor in tensors.items()}
    source_of = {inner: name for name, inners in sources.items() for inner in inners}
    return {
        f"{prefix}{number}.{inner}": Part((prefix + name,), partial(take_copy, tensors, number, inner))
        for number in range(num_experts)
        for inner, name in source_of.items()
    }


def take_copy(tensors: Network, number: int, name: str) -> torch.Tensor:
    return take_expert(tensors, number)[name].clone()


def fuse_parts(prefix: str, tensors: Network) -> dict[str, Part]:
    """From one network an expert to one tensor a projection."""
    count = 1 + max(int(name.partition(".")[0]) for name in tensors)
    networks = [below(tensors, f"{number}.") for number in range(count)]
    parts = {}
    for name, inners in fused_names(networks[0]).items():
        sources = [network[inner] for network in networks for inner in inners]
        refuse(
            len({source.requires_grad for source in sources}) > 1,
            f"Some tensors of '{prefix}{name}' are frozen and others are not, and 'fused' makes them one: freeze all or none.",
        )
        refuse(
            name.startswith("activation.") and any(not torch.equal(source, sources[0]) for source in sources),
            f"The weights of `hidden_act` differ between the experts of '{prefix[:-1]}', and 'fused' has one for all: keep "
            "`experts_layout='modulelist'`.",
        )
        names = tuple(f"{prefix}{number}.{inner}" for number in range(count) for inner in inners)
        parts[prefix + name] = Part(names, partial(fuse, networks, inners))
    return parts
