"""Mixture of experts: a router that chooses, experts that compute, and the block that takes the place of the feed-forward.

Legend: E experts, k of them a token, T tokens of all sequences.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from .expert_kernel import can_fuse, run_fused, sort_by_expert
from .feed_forward import FeedForward, make_trim
from .losses import balance_loss, is_traced, router_z_loss
from .norms import make_dropout


class Routing(NamedTuple):
    """Who goes where: row r of a sequence is computed by `experts[r]`, each result times its weight."""

    logits: torch.Tensor  # (batch, seq, E), float32
    scores: torch.Tensor  # (batch, seq, E), float32: shares of 1 over the experts
    experts: torch.Tensor  # (batch, rows, k)
    weights: torch.Tensor  # (batch, rows, k); 0 for a row that its expert had no room for
    tokens: torch.Tensor | None  # (batch, rows): the token of each row where experts choose; None: row t is token t
    counts: torch.Tensor | None  # (batch, rows, k) boolean: real tokens within capacity; None: all

    def load(self) -> torch.Tensor:
        """`(batch, E)`: how many real tokens each expert computes."""
        ones = self.experts.new_ones(self.experts.shape) if self.counts is None else self.counts.long()
        load = ones.new_zeros(len(ones), self.logits.shape[-1])
        return load.scatter_add(1, self.experts.flatten(1), ones.flatten(1))


class Router(nn.Module):
    """Scores each expert for each token, in float32: a subclass chooses by the scores.

    Args:
        config: reads the fields of its section "Experts".
        is_causal: whether tokens must not depend on later ones.
    """

    def __init__(self, config, is_causal: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.router_bias else None
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.jitter = config.router_jitter_noise
        self.capacity, self.capacity_factor = config.expert_capacity, config.expert_capacity_factor
        self.has_capacity_in_eval = config.expert_capacity_in_eval or not is_causal

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, seq, hidden_size)` -> `(batch, seq, E)`, in float32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.float()
            if self.training and self.jitter:
                # The router's own copy: the experts see the states as they are (Switch, arXiv:2101.03961, sec. 2.2)
                noise = torch.empty_like(hidden_states).uniform_(1 - self.jitter, 1 + self.jitter)
                hidden_states = hidden_states * noise
            return F.linear(hidden_states, self.weight.float(), None if self.bias is None else self.bias.float())

    def room(self, length: int | torch.Tensor) -> Any:
        """How many tokens an expert takes of a sequence of so many real tokens: a number, or a tensor for a tensor."""
        if self.capacity is not None:
            return self.capacity
        share = (self.capacity_factor or 1.0) * self.top_k / self.num_experts
        if isinstance(length, int):
            return math.ceil(length * share)
        return (length.double() * share).ceil().long()


class TokensChoose(Router):
    """Each token goes to the k experts that score highest: softmax over all experts (Mixtral, Switch).

    With `norm_topk_prob` the k weights add up to 1, which is also the softmax over the k logits alone.
    """

    adds_up_to_one = True  # what `rate` gives a token

    def __init__(self, config, is_causal: bool):
        super().__init__(config, is_causal)
        self.is_normalised = config.norm_topk_prob
        self.scale = config.routed_scaling_factor

    def rate(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights `(batch, seq, E)` that experts would have, and by what they are chosen."""
        scores = logits.softmax(-1)
        return scores, scores

    def forward(self, hidden_states: torch.Tensor, is_real: torch.Tensor | None = None) -> Routing:
        """Args: hidden_states: `(batch, seq, hidden_size)`. is_real: `(batch, seq)`, False for padding."""
        logits = self.score(hidden_states)
        rated, ranked = self.rate(logits)
        experts = top_k(ranked, self.top_k)
        weights = rated.gather(-1, experts)
        if self.is_normalised:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        if self.scale != 1.0:
            weights = weights * self.scale
        counts = None if is_real is None else is_real[..., None].expand_as(experts)
        if self.drops():
            length = experts.shape[1] if is_real is None else is_real.sum(1, keepdim=True)
            counts = within_room(experts, counts, self.num_experts, self.room(length))
            weights = weights * counts
        scores = rated if self.adds_up_to_one else rated / rated.sum(-1, keepdim=True).clamp(min=1e-20)
        return Routing(logits, scores, experts, weights.to(hidden_states.dtype), None, counts)

    def drops(self) -> bool:
        """Whether an expert has no room for more than its capacity, in this mode."""
        has_capacity = self.capacity is not None or self.capacity_factor is not None
        return has_capacity and (self.training or self.has_capacity_in_eval)


class BiasedTokensChoose(TokensChoose):
    """Sigmoid scores, and a bias that only chooses: it is moved towards an even load after each step, in place of a loss
    (DeepSeek-V3, arXiv:2412.19437, sec. 2.1.2; `variform.training.RouterBalancer` moves it).

    With groups, only experts of the `topk_group` best groups are chosen, each judged by its two best experts.
    """

    adds_up_to_one = False

    def __init__(self, config, is_causal: bool):
        super().__init__(config, is_causal)
        self.num_groups, self.num_chosen_groups = config.n_group, config.topk_group
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.num_experts, dtype=torch.float32))

    def rate(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = logits.sigmoid()
        ranked = scores + self.e_score_correction_bias.float()
        if self.num_chosen_groups < self.num_groups:
            groups = ranked.unflatten(-1, (self.num_groups, -1))
            merits = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
            chosen = torch.zeros_like(merits, dtype=torch.bool)
            chosen.scatter_(-1, top_k(merits, self.num_chosen_groups), True)
            ranked = groups.masked_fill(~chosen[..., None], float("-inf")).flatten(-2)
        return scores, ranked


class ExpertsChoose(Router):
    """Each expert takes the tokens of a sequence that score highest for it, k / E of them (arXiv:2202.09368).

    The load is even by construction; a token has as many experts as choose it, or none. A choice depends on the whole
    sequence, so that a causal stack cannot have it.
    """

    def forward(self, hidden_states: torch.Tensor, is_real: torch.Tensor | None = None) -> Routing:
        """Args: hidden_states: `(batch, seq, hidden_size)`. is_real: `(batch, seq)`, False for padding."""
        logits = self.score(hidden_states)
        scores = logits.softmax(-1)
        wanted = scores.transpose(1, 2)  # (batch, E, seq)
        if is_real is not None:
            wanted = wanted.masked_fill(~is_real[:, None], -1.0)
        length = wanted.shape[-1]
        places = min(length, self.room(length))
        tokens = top_k(wanted, places)
        weights = wanted.gather(-1, tokens)  # (batch, E, places)
        counts = None
        if is_real is not None:
            room = torch.as_tensor(self.room(is_real.sum(1)[:, None, None]))
            counts = torch.arange(places, device=tokens.device) < room.to(tokens.device)  # (batch or 1, 1, places)
            counts = (counts & is_real[:, None].expand_as(wanted).gather(-1, tokens)).flatten(1)[..., None]
        weights = weights.flatten(1)[..., None].to(hidden_states.dtype)
        if counts is not None:
            weights = weights * counts
        experts = torch.arange(self.num_experts, device=tokens.device)[:, None].expand_as(tokens)
        return Routing(logits, scores, experts.flatten(1)[..., None], weights, tokens.flatten(1), counts)


ROUTERS: dict[str, type[Router]] = {
    "softmax_topk": TokensChoose,
    "switch": TokensChoose,
    "sigmoid_bias": BiasedTokensChoose,
    "expert_choice": ExpertsChoose,
}


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k highest scores, `(..., n)` -> `(..., k)`; of equal ones the first, on every device.

    `torch.topk` leaves ties open, and a stable sort of many takes three times as long. The bits of a float, as an integer, are
    in the order of the floats once those of negative ones are flipped; below them stands the place.
    """
    if not is_traced() and scores.numel() <= 512:  # a decoded token: fewer calls
        return scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    bits = scores.detach().float().add(0.0).view(torch.int32)  # adding makes -0.0 equal to 0.0
    ranks = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    length = scores.shape[-1]
    return ((ranks << 24) + torch.arange(length - 1, -1, -1, device=scores.device)).topk(k, dim=-1).indices


def within_room(
    experts: torch.Tensor, counts: torch.Tensor | None, num_experts: int, room: int | torch.Tensor
) -> torch.Tensor:
    """`(batch, seq, k)`: which of the choices the experts have room for, in the order of the tokens.

    Args:
        experts: `(batch, seq, k)`. counts: which of them take up room; None for all. room: a number, or `(batch, 1)`.
    """
    chosen = experts if counts is None else experts.masked_fill(~counts, num_experts)
    chosen = chosen.flatten(1)
    ordered, order = chosen.sort(dim=1, stable=True)
    sizes = chosen.new_zeros(len(chosen), num_experts + 1).scatter_add(1, chosen, torch.ones_like(chosen))
    starts = sizes.cumsum(1) - sizes
    numbers = torch.arange(chosen.shape[1], device=chosen.device) - starts.gather(1, ordered)
    numbers = torch.empty_like(order).scatter(1, order, numbers)
    return ((numbers < room) & (chosen < num_experts)).view_as(experts)


class Experts(nn.Module):
    """E feed-forward networks as one tensor a projection, in the layout that transformers' experts interface computes.

    `config._experts_implementation` chooses how: "grouped_mm" (on a CPU by `run_fused`, the same and faster), "batched_mm",
    "eager" (one expert after the other), or what else is registered there.

    Args:
        config: reads `num_experts hidden_size moe_intermediate_size hidden_act gated_mlp glu_limit glu_offset mlp_bias
            activation_dropout`.
    """

    is_transposed, is_concatenated, has_post_expert_norm = False, True, False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_experts, self.has_gate, self.has_bias = config.num_experts, config.gated_mlp, config.mlp_bias
        outer, inner = config.hidden_size, config.moe_intermediate_size
        into = "gate_up_proj" if self.has_gate else "up_proj"
        into_size = 2 * inner if self.has_gate else inner
        self.register_parameter(into, nn.Parameter(torch.empty(self.num_experts, into_size, outer)))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, outer, inner))
        if self.has_bias:
            self.register_parameter(f"{into}_bias", nn.Parameter(torch.empty(self.num_experts, into_size)))
            self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, outer))
        self.activation = ACT2FN[config.hidden_act]
        self.trim = make_trim(config)
        self.dropout = make_dropout(config.activation_dropout)
        self._is_expert_parallel = False  # set by transformers' plan

    def act_fn(self, inner: torch.Tensor) -> torch.Tensor:
        inner = self.activation(inner)
        return inner if self.dropout is None else self.dropout(inner)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`(rows, 2 x moe_intermediate_size)` -> half as wide; named as the interface calls it."""
        return self.multiply(*gate_up.chunk(2, dim=-1))

    def multiply(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """`(rows, moe_intermediate_size)` twice -> as wide."""
        if self.trim is not None:
            gate, up = self.trim(gate, up)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`(T, hidden_size)`, and the experts and weights `(T, k)` of each token -> `(T, hidden_size)`."""
        name = self.config._experts_implementation
        if name == "sonicmoe" and self.trim is not None:
            raise ValueError(
                "`experts_implementation='sonicmoe'` multiplies gates in a kernel of its own, which knows no `glu_limit` and "
                "`glu_offset`; use 'grouped_mm'."
            )
        run = ALL_EXPERTS_FUNCTIONS.get_interface(name, Experts.run_eagerly)
        if run is grouped_mm_experts_forward and can_fuse(self, hidden_states):
            run = run_fused
        elif is_quantized(self.down_proj):
            run = Experts.run_eagerly
        output = run(self, hidden_states, chosen, weights)
        return self._count_bias_once(output, chosen, weights) if self.has_bias else output

    def _count_bias_once(self, output: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Tensor parallelism adds up what processes make of their slices of each expert, and each has added the whole bias."""
        bias = getattr(self, "gate_up_proj_bias" if self.has_gate else "up_proj_bias")
        of_others = 1 - bias.shape[-1] / self.config.moe_intermediate_size / (2 if self.has_gate else 1)
        if not of_others:
            return output
        shares = weights.new_zeros(len(weights), self.num_experts).scatter_add(1, chosen, weights)
        # Detached: the gradient of the bias is whole in each process
        return output - (of_others * (shares @ self.down_proj_bias.detach().to(shares.dtype))).to(output.dtype)

    def run_eagerly(self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `forward`, one expert after the other."""
        names = ("gate_up_proj" if self.has_gate else "up_proj", "down_proj")
        parts = [matrices_of(getattr(self, name)) for name in names]
        biases = [
            getattr(self, f"{name}_bias").unbind(0) if self.has_bias else [None] * len(parts[0]) for name in names
        ]
        networks = [partial(self.run_one, *tensors) for tensors in zip(*parts, *biases)]
        return run_in_turn(networks, hidden_states, chosen, weights)

    def run_one(self, into, out_of, into_bias, out_of_bias, rows: torch.Tensor) -> torch.Tensor:
        inner = F.linear(rows, into, into_bias)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        return F.linear(inner, out_of, out_of_bias)


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a weight is a tensor of torchao, which computes products of one matrix and no others."""
    return hasattr(weight, "tensor_data_names")


def matrices_of(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """`(E, ...)` -> E matrices; unbound, as the backward of an index copies the whole, unless they are quantized."""
    return [weight[number] for number in range(len(weight))] if is_quantized(weight) else weight.unbind(0)


class ExpertList(nn.ModuleList):
    """E feed-forward networks of their own, whose `nn.Linear`s LoRA and quantizers find; fields as for `Experts`."""

    def __init__(self, config):
        super().__init__([FeedForward(config, config.moe_intermediate_size) for _ in range(config.num_experts)])

    def forward(self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`(T, hidden_size)`, and the experts and weights `(T, k)` of each token -> `(T, hidden_size)`."""
        return run_in_turn(list(self), hidden_states, chosen, weights)


EXPERTS_LAYOUTS: dict[str, type[nn.Module]] = {"fused": Experts, "modulelist": ExpertList}


def run_in_turn(
    networks: Sequence[Callable], hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum `(T, hidden_size)` of what the chosen networks make of each token.

    A chosen number without a network (an expert of another process) is left out. While a graph is recorded, every network
    computes every token: which ones are chosen is not known.
    """
    output = torch.zeros_like(hidden_states)
    if is_traced():
        for number, network in enumerate(networks):
            share = (weights * (chosen == number)).sum(-1, keepdim=True)
            output = output + (network(hidden_states) * share).to(output.dtype)
        return output
    order, tokens, sizes = sort_by_expert(chosen, len(networks))
    shares = weights.flatten()[order, None]
    # With gradients, an idle network computes no rows: its weights get zeros, which distributed training waits for
    needs_all = torch.is_grad_enabled()
    for network, own, share in zip(networks, tokens.split(sizes), shares.split(sizes)):
        if len(own) or needs_all:
            part = network(hidden_states.index_select(0, own)) * share
            output = output.index_add(0, own, part.to(output.dtype))
    return output


class MixtureOfExperts(nn.Module):
    """A feed-forward of which each token uses a few experts, and shared experts that all tokens use.

    Args:
        config: reads the fields of its section "Experts". is_causal: whether tokens must not depend on later ones.
    """

    def __init__(self, config, is_causal: bool):
        super().__init__()
        self.gate = ROUTERS[config.router_type](config, is_causal)
        self.experts = EXPERTS_LAYOUTS[config.experts_layout](config)
        self.shared_experts = self.shared_expert_gate = None
        if config.num_shared_experts:
            self.shared_experts = FeedForward(config, config.num_shared_experts * config.moe_intermediate_size)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, is_real: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, seq, hidden_size)` -> as many, and in training the router's losses `(batch, 2)`: balance and z.

        Args:
            is_real: `(batch, seq)`, False for padding, which takes up no room and counts in no loss.
        """
        routing: Routing = self.gate(hidden_states, is_real)
        inputs = hidden_states
        if routing.tokens is not None:
            index = routing.tokens[..., None].expand(-1, -1, hidden_states.shape[-1])
            inputs = hidden_states.gather(1, index)
        chosen, weights = routing.experts.flatten(0, 1), routing.weights.flatten(0, 1)
        output = self.experts(inputs.flatten(0, 1), chosen, weights).view_as(inputs)
        if routing.tokens is not None:
            output = torch.zeros_like(hidden_states).scatter_add(1, index, output.to(hidden_states.dtype))
        if self.shared_experts is not None:
            shared = self.shared_experts(hidden_states)
            if self.shared_expert_gate is not None:
                shared = shared * self.shared_expert_gate(hidden_states).sigmoid()
            output = output + shared
        if not self.training:
            return output, None
        z_loss = router_z_loss(routing.logits, is_real)
        # Where experts choose, the load is even
        balance = (
            torch.zeros_like(z_loss)
            if routing.tokens is not None
            else balance_loss(routing.scores, routing.experts, is_real)
        )
        return output, torch.stack((balance, z_loss), dim=-1)
