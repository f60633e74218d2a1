"""Routers, experts and their losses, each beside a plain reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build, inputs, pad, tiny
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from variform.model.feed_forward import FeedForward
from variform.model.losses import balance_loss, router_z_loss
from variform.model.moe import MixtureOfExperts, Router, top_k

BATCH, LENGTH = 3, 8
IMPLEMENTATIONS = ["grouped_mm", "eager", "batched_mm"]


def block(shape="encoder", **fields) -> MixtureOfExperts:
    """The experts of a form's only layer, in evaluation mode."""
    config = tiny(shape, num_hidden_layers=1, **{"num_experts": 4, **fields})
    return build(config).layers[0].mlp


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masked(batch: int = BATCH, length: int = LENGTH) -> torch.Tensor:
    """Padding on the right, on the left, and none."""
    is_real = torch.ones(batch, length, dtype=torch.bool)
    is_real[0, 5:] = False
    is_real[1, :2] = False
    return is_real


def one_expert(experts, number: int, row: torch.Tensor) -> torch.Tensor:
    """What one network makes of one vector."""
    into = (experts.gate_up_proj if experts.has_gate else experts.up_proj)[number]
    inner = into @ row
    if experts.has_bias:
        inner = inner + (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias)[number]
    if experts.has_gate:
        gate, up = inner.chunk(2)
        if experts.config.glu_limit is not None:
            most = torch.tensor(experts.config.glu_limit)
            gate, up = torch.minimum(gate, most), torch.maximum(torch.minimum(up, most), -most)
        inner = experts.activation(gate) * (up + experts.config.glu_offset)
    else:
        inner = experts.activation(inner)
    output = experts.down_proj[number] @ inner
    return output + experts.down_proj_bias[number] if experts.has_bias else output


def score(mlp: MixtureOfExperts, row: torch.Tensor) -> torch.Tensor:
    """The logits of one token."""
    logits = mlp.gate.weight.to(row.dtype) @ row
    return logits if mlp.gate.bias is None else logits + mlp.gate.bias


def choose(mlp: MixtureOfExperts, row: torch.Tensor, config) -> list[tuple[int, float]]:
    """The experts of one token and their weights, as the papers say it."""
    logits = score(mlp, row.double())
    if config.router_type == "sigmoid_bias":
        scores = logits.sigmoid()
        merits = scores + mlp.gate.e_score_correction_bias.double()
        size = config.num_experts // config.n_group
        groups = [merits[g * size : (g + 1) * size] for g in range(config.n_group)]
        best = sorted(range(config.n_group), key=lambda g: (-groups[g].sort(descending=True).values[:2].sum(), g))
        allowed = [e for e in range(config.num_experts) if e // size in best[: config.topk_group]]
    else:
        scores = merits = logits.softmax(0)
        allowed = range(config.num_experts)
    chosen = sorted(allowed, key=lambda e: (-merits[e], e))[: config.num_experts_per_tok]
    weights = scores[chosen].tolist()
    if config.norm_topk_prob:
        weights = [w / sum(weights) for w in weights]
    return [(e, w * config.routed_scaling_factor) for e, w in zip(chosen, weights)]


def by_the_papers(mlp: MixtureOfExperts, hidden: torch.Tensor, is_real: torch.Tensor, config) -> torch.Tensor:
    """The block, token by token; its capacity in the order of the tokens."""
    output = torch.zeros_like(hidden)
    for b in range(len(hidden)):
        real = is_real[b].nonzero().flatten().tolist()
        room = math.inf
        if config.expert_capacity is not None:
            room = config.expert_capacity
        elif config.expert_capacity_factor is not None:
            even = len(real) * config.num_experts_per_tok / config.num_experts
            room = math.ceil(even * config.expert_capacity_factor)
        taken = dict.fromkeys(range(config.num_experts), 0)
        if config.router_type == "expert_choice":
            scores = torch.stack([score(mlp, hidden[b, t]).softmax(0) for t in real])  # (real, E)
            if config.expert_capacity_factor is None and config.expert_capacity is None:
                room = math.ceil(len(real) * config.num_experts_per_tok / config.num_experts)
            for e in range(config.num_experts):
                for i in sorted(range(len(real)), key=lambda i: (-scores[i, e], i))[: min(room, len(real))]:
                    output[b, real[i]] += scores[i, e] * one_expert(mlp.experts, e, hidden[b, real[i]])
            continue
        for t in real:
            for e, weight in choose(mlp, hidden[b, t], config):
                if taken[e] < room:
                    taken[e] += 1
                    output[b, t] += weight * one_expert(mlp.experts, e, hidden[b, t])
    return output


ROUTED = [
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 2},
    {"num_experts_per_tok": 3, "norm_topk_prob": False, "routed_scaling_factor": 2.5},
    {"router_type": "switch"},
    {"router_type": "switch", "expert_capacity": 1},
    {"num_experts_per_tok": 2, "expert_capacity_factor": 0.5},
    {"router_type": "sigmoid_bias", "num_experts_per_tok": 2},
    {"router_type": "sigmoid_bias", "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    {"router_type": "sigmoid_bias", "num_experts_per_tok": 3, "norm_topk_prob": False, "num_experts": 6, "n_group": 3}
    | {"topk_group": 2},
    {"router_type": "expert_choice"},
    {"router_type": "expert_choice", "num_experts_per_tok": 1, "expert_capacity_factor": 1.5},
    {"router_type": "expert_choice", "num_experts_per_tok": 4, "expert_capacity_factor": 2.0},
    {"router_bias": True, "num_experts_per_tok": 2},
    {"router_bias": True, "router_type": "sigmoid_bias", "num_experts_per_tok": 2},
    {"router_bias": True, "router_type": "expert_choice"},
]
# The middle one is gpt-oss', with a limit that many entries are beyond
NETWORKS = [
    {},
    {"gated_mlp": False},
    {"mlp_bias": True, "hidden_act": "quick_gelu", "glu_limit": 0.3, "glu_offset": 1.0},
    {"mlp_bias": True},
    {"gated_mlp": False, "mlp_bias": True, "hidden_act": "gelu"},
]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: "-".join(network) or "gated")
@pytest.mark.parametrize("fields", ROUTED, ids=lambda fields: "-".join(map(str, fields.values())))
def test_the_block_is_what_the_papers_say(fields, network):
    config = tiny("encoder", num_hidden_layers=1, **{"num_experts": 4, **fields, **network})
    mlp = build(config).layers[0].mlp
    if config.router_type == "sigmoid_bias":
        mlp.gate.e_score_correction_bias.copy_(states(config.num_experts, seed=3))
    hidden, is_real = states(BATCH, LENGTH, 12), masked()
    output, losses = mlp(hidden, is_real)
    assert losses is None
    assert_close(output[is_real], by_the_papers(mlp, hidden, is_real, config)[is_real], rtol=1e-4, atol=1e-5)
    everything = torch.ones_like(is_real)
    assert_close(mlp(hidden)[0], by_the_papers(mlp, hidden, everything, config), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: "-".join(network) or "gated")
@pytest.mark.parametrize("layout", ["fused", "modulelist"])
def test_implementations_and_layouts_agree_in_outputs_and_gradients(layout, network):
    """Eager, grouped_mm and batched_mm on the same weights; a list of modules with the same numbers."""
    reference = block(**network, num_experts_per_tok=2)
    other = block(**network, num_experts_per_tok=2, experts_layout=layout)
    other.gate.load_state_dict(reference.gate.state_dict())
    if layout == "modulelist":
        for e, expert in enumerate(other.experts):
            with torch.no_grad():
                into = (reference.experts.gate_up_proj if reference.experts.has_gate else reference.experts.up_proj)[e]
                parts = [expert.gate_proj, expert.up_proj] if reference.experts.has_gate else [expert.up_proj]
                for linear, weight in zip(parts, into.chunk(len(parts))):
                    linear.weight.copy_(weight)
                expert.down_proj.weight.copy_(reference.experts.down_proj[e])
                if reference.experts.has_bias:
                    name = "gate_up_proj_bias" if reference.experts.has_gate else "up_proj_bias"
                    for linear, bias in zip(parts, getattr(reference.experts, name)[e].chunk(len(parts))):
                        linear.bias.copy_(bias)
                    expert.down_proj.bias.copy_(reference.experts.down_proj_bias[e])
    else:
        other.load_state_dict(reference.state_dict())
    found = []
    for mlp, implementation in [(reference, "eager"), *((other, name) for name in IMPLEMENTATIONS)]:
        if layout == "fused" or mlp is reference:
            mlp.experts.config._experts_implementation = implementation
        hidden = states(BATCH, LENGTH, 12).requires_grad_()
        mlp.zero_grad()
        output, _ = mlp(hidden)
        output.square().sum().backward()
        down = mlp.experts.down_proj.grad if mlp is reference or layout == "fused" else None
        if down is None:
            down = torch.stack([expert.down_proj.weight.grad for expert in mlp.experts])
        found.append((output, hidden.grad, mlp.gate.weight.grad.clone(), down.clone()))
    for tensors in found[1:]:
        for tensor, expected in zip(tensors, found[0]):
            assert_close(tensor, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [{"glu_limit": 0.3}, {"glu_offset": 1.0}, {"glu_limit": 0.3, "glu_offset": -0.5}])
def test_a_dense_network_and_an_expert_keep_within_the_same_limits(fields):
    """Beside the network written out, in which no entry of the limited factors is beyond the limit."""
    mlp, hidden = block(num_experts=1, num_experts_per_tok=1, norm_topk_prob=False, **fields), states(1, 30, 12)
    dense = FeedForward(tiny("encoder", **fields))
    with torch.no_grad():
        for linear, weight in zip((dense.gate_proj, dense.up_proj), mlp.experts.gate_up_proj[0].chunk(2)):
            linear.weight.copy_(weight)
        dense.down_proj.weight.copy_(mlp.experts.down_proj[0])
    gate, up = dense.gate_proj(hidden), dense.up_proj(hidden)
    limit = fields.get("glu_limit")
    if limit is not None:
        assert (gate > limit).any() and (gate < -limit).any() and (up > limit).any() and (up < -limit).any()
        gate, up = gate.where(gate < limit, limit), up.where(up.abs() < limit, limit * up.sign())
    expected = dense.down_proj(F.silu(gate) * (up + fields.get("glu_offset", 0.0)))
    assert_close(dense(hidden), expected)
    assert_close(mlp(hidden)[0], expected)


def test_a_kernel_that_knows_no_limits_is_refused():
    """Before it is looked for: it is downloaded where it can run."""
    mlp = block(glu_limit=7.0)
    mlp.experts.config._experts_implementation = "sonicmoe"
    with pytest.raises(ValueError, match=r"'sonicmoe'` .* no `glu_limit` and `glu_offset`; use 'grouped_mm'"):
        mlp(states(1, 2, 12))


@given(
    st.sampled_from([4, 600]),
    st.integers(1, 40),
    st.integers(1, 5),
    st.sampled_from([1, 2, 3, 100]),
    st.integers(0, 99),
)
@settings(max_examples=100)
def test_of_equal_scores_the_first_is_chosen(rows, length, k, levels, seed):
    """`levels` distinct scores make ties; a stable sort is the truth, of few and of many."""
    k = min(k, length)
    scores = states(rows, length, seed=seed).mul(levels).round() / levels
    scores[0] *= 0.0
    scores[1, ::2] = float("-inf")
    assert_close(top_k(scores, k), scores.sort(dim=-1, descending=True, stable=True).indices[..., :k])


def test_the_softmax_over_the_chosen_is_the_normalised_softmax_over_all():
    mlp = block(num_experts_per_tok=2)
    routing = mlp.gate(states(BATCH, LENGTH, 12))
    logits = routing.logits.gather(-1, routing.experts)
    assert_close(routing.weights, logits.softmax(-1))


def test_a_bias_chooses_and_does_not_weigh():
    mlp = block(router_type="sigmoid_bias", num_experts_per_tok=2, norm_topk_prob=False)
    hidden = states(BATCH, LENGTH, 12)
    mlp.gate.e_score_correction_bias[3] = 10.0
    routing = mlp.gate(hidden)
    assert (routing.experts[..., 0] == 3).all()
    assert_close(routing.weights[..., 0], routing.logits[..., 3].sigmoid())


def test_jitter_touches_the_router_alone_and_only_in_training():
    mlp = block(router_jitter_noise=0.5)
    hidden = states(BATCH, LENGTH, 12)
    seen = []
    mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    calm = mlp.gate(hidden).logits
    assert_close(mlp.gate(hidden).logits, calm, rtol=0, atol=0)
    mlp.train()
    mlp(hidden)
    assert_close(seen[0], hidden.flatten(0, 1), rtol=0, atol=0)
    assert (mlp.gate(hidden).logits - calm).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routing_is_in_float32(dtype):
    mlp = block().to(dtype)
    routing = mlp.gate(states(BATCH, LENGTH, 12).to(dtype))
    assert routing.logits.dtype == torch.float32
    assert routing.weights.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = block()
        routing = single.gate(states(BATCH, LENGTH, 12))
    assert_close(routing.logits, states(BATCH, LENGTH, 12) @ single.gate.weight.T)


def test_a_decoder_drops_tokens_in_training_only():
    config = tiny("decoder", num_experts=4, expert_capacity=1, num_experts_per_tok=2)
    mlp = build(config).layers[0].mlp
    hidden = states(BATCH, LENGTH, 12)
    assert mlp.gate(hidden).counts is None
    counts = mlp.train().gate(hidden).counts
    assert 0 < counts.sum() < counts.numel()
    strict = tiny("decoder", num_experts=4, expert_capacity=1, expert_capacity_in_eval=True, use_cache=False)
    model = build(strict, AutoModelForCausalLM)
    assert not model.model.layers[0].mlp.gate(hidden).counts.all()
    with pytest.raises(ValueError, match=r"`past_key_values` is given, but .*`expert_capacity_in_eval=True`"):
        model(inputs(), use_cache=True)
    assert model.generate(inputs(), max_new_tokens=3).shape[1] == 10


def test_capacity_of_a_decoder_depends_on_earlier_tokens_only():
    """A later token takes no room from an earlier one, whichever choices they are."""
    config = tiny("decoder", num_experts=4, expert_capacity=2, num_experts_per_tok=2)
    gate = build(config).layers[0].mlp.gate.train()
    hidden = states(1, LENGTH, 12)
    counts = gate(hidden).counts
    for length in range(1, LENGTH):
        assert_close(gate(hidden[:, :length]).counts, counts[:, :length])


class TestLosses:
    def by_hand(self, scores, experts, is_real):
        """E * sum(f * P) for one sequence."""
        real = [t for t in range(len(scores)) if is_real[t]]
        total = 0.0
        for e in range(scores.shape[1]):
            share = sum(int(c == e) for t in real for c in experts[t]) / len(real)
            total += share * float(scores[real, e].mean())
        return scores.shape[1] * total

    def test_balance_is_the_formula_of_each_sequence(self):
        scores = states(BATCH, LENGTH, 5).softmax(-1)
        experts, is_real = top_k(states(BATCH, LENGTH, 5, seed=1), 2), masked()
        expected = [self.by_hand(scores[b], experts[b].tolist(), is_real[b]) for b in range(BATCH)]
        assert_close(balance_loss(scores, experts, is_real), torch.tensor(expected))

    def test_an_even_load_costs_k_and_one_expert_for_all_costs_the_most(self):
        scores = torch.full((1, 8, 4), 0.25)
        experts = (torch.arange(8)[:, None] + torch.arange(2)) % 4
        assert_close(balance_loss(scores, experts[None]), torch.tensor([2.0]))
        collapsed = F.one_hot(torch.zeros(1, 8).long(), 4).float()
        assert_close(balance_loss(collapsed, torch.zeros(1, 8, 1).long()), torch.tensor([4.0]))

    def test_z_is_the_mean_square_of_the_logsumexp(self):
        logits, is_real = states(BATCH, LENGTH, 4), masked()
        expected = [logits[b][is_real[b]].exp().sum(-1).log().square().mean() for b in range(BATCH)]
        assert_close(router_z_loss(logits, is_real), torch.stack(expected))
        assert_close(router_z_loss(logits), router_z_loss(logits, torch.ones_like(is_real)))

    @pytest.mark.parametrize("shape", ["encoder", "decoder", "encoder_decoder"])
    def test_padding_changes_no_loss(self, shape):
        """The same texts, with padding or without: one loss, router losses and all."""
        experts = {"num_experts": 4, "num_experts_per_tok": 2}
        both = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.5}
        fields = (
            {**experts, **both} if shape != "encoder_decoder" else {"encoder": experts, "decoder": experts, **both}
        )
        head = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM}.get(shape, AutoModelForSeq2SeqLM)
        model = build(tiny(shape, **fields), head).train()
        ids = inputs(2, LENGTH)
        plain = model(ids, labels=ids)
        padded, mask = pad(ids, 0, 3)
        labels = padded.masked_fill(mask == 0, -100)
        loss = model(padded, attention_mask=mask, labels=labels)
        assert_close(loss.loss, plain.loss)
        assert_close(loss.aux_loss, plain.aux_loss)

    @pytest.mark.parametrize("layout", ["fused", "modulelist"])
    def test_they_are_on_in_training_alone_and_only_with_a_coefficient(self, layout):
        ids, losses = inputs(2, LENGTH), {}
        for coef in (0.0, 0.5):
            config = tiny("decoder", num_experts=4, experts_layout=layout, router_aux_loss_coef=coef)
            config.router_z_loss_coef = 2 * coef
            model = build(config, AutoModelForCausalLM)
            losses[coef] = model(ids, labels=ids).loss, model.train()(ids, labels=ids)
        assert_close(losses[0.0][0], losses[0.5][0], rtol=0, atol=0)
        output = losses[0.5][1]
        assert_close(output.loss, losses[0.0][1].loss + 0.5 * output.aux_loss + output.router_z_loss)

    @pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
    @pytest.mark.parametrize("shape", ["encoder", "decoder", "encoder_decoder"])
    def test_a_batch_in_pieces_has_the_gradients_of_the_whole(self, shape, checkpointing):
        experts = {"num_experts": 4, "num_experts_per_tok": 2}
        both = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
        fields = (
            {**experts, **both} if shape != "encoder_decoder" else {"encoder": experts, "decoder": experts, **both}
        )
        head = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM}.get(shape, AutoModelForSeq2SeqLM)
        model = build(tiny(shape, **fields), head).train()
        if checkpointing is not None:
            model.activation_checkpointing_enable(checkpointing)
        ids, labels = inputs(4, LENGTH), inputs(4, LENGTH)
        for row, count in enumerate((0, 3, 5, 1)):  # sequences weigh as their labels do
            labels[row, :count] = -100
        counted = labels[:, 1:] if shape == "decoder" else labels
        num_items = (counted != -100).sum()
        feed = {"decoder_input_ids": ids} if shape == "encoder_decoder" else {}
        whole = model(ids, labels=labels, **feed)
        whole.loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        total = 0.0
        for row in range(4):
            feed = {"decoder_input_ids": ids[row : row + 1]} if shape == "encoder_decoder" else {}
            loss = model(ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=num_items, **feed).loss
            loss.backward()
            total += loss.detach()
        assert_close(total, whole.loss.detach(), rtol=1e-5, atol=1e-5)
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)

    def test_classifiers_have_them_too(self):
        config = tiny("encoder", num_experts=4, router_aux_loss_coef=0.5, num_labels=3)
        model = build(config, AutoModelForSequenceClassification).train()
        output = model(inputs(3), labels=torch.tensor([0, 1, 2]))
        model.config.router_aux_loss_coef = 0.0
        assert_close(output.loss, model(inputs(3), labels=torch.tensor([0, 1, 2])).loss + 0.5 * output.aux_loss)


def test_router_logits_are_recorded_on_demand():
    model = build(tiny("decoder", num_experts=4, mlp_layer_types=["dense", "sparse"]), AutoModelForCausalLM)
    assert model(inputs()).router_logits is None
    (logits,) = model(inputs(), output_router_logits=True).router_logits
    assert logits.shape == (2, 7, 4)
    model = build(
        tiny("encoder_decoder", encoder={"num_experts": 2}, decoder={"num_experts": 4}), AutoModelForSeq2SeqLM
    )
    output = model(inputs(), decoder_input_ids=inputs(), output_router_logits=True)
    assert [logits.shape[-1] for logits in output.encoder_router_logits] == [2, 2]
    assert [logits.shape[-1] for logits in output.decoder_router_logits] == [4, 4]


@pytest.mark.parametrize("router_type", ["softmax_topk", "switch", "sigmoid_bias", "expert_choice"])
def test_the_load_counts_real_tokens_once(router_type):
    fields = {"expert_capacity_factor": 0.5} if router_type == "switch" else {}
    mlp = block(router_type=router_type, **fields)
    is_real = masked()
    routing = mlp.gate(states(BATCH, LENGTH, 12), is_real)
    expected = torch.zeros(BATCH, 4, dtype=torch.long)
    counts = torch.ones_like(routing.experts, dtype=torch.bool) if routing.counts is None else routing.counts
    for b, row, slot in counts.nonzero().tolist():
        token = row if routing.tokens is None else int(routing.tokens[b, row])
        assert is_real[b, token]
        expected[b, routing.experts[b, row, slot]] += 1
    assert_close(routing.load(), expected)


@pytest.mark.parametrize("layout", ["fused", "modulelist"])
@pytest.mark.parametrize("router_type", ["softmax_topk", "switch", "sigmoid_bias"])
def test_compiled_and_exported_it_is_the_same(router_type, layout):
    config = tiny("decoder", num_experts=4, router_type=router_type, experts_layout=layout, num_shared_experts=1)
    model = build(config, AutoModelForCausalLM)
    ids = inputs()
    with torch.no_grad():
        expected = model(ids).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_close(compiled(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
        exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        assert_close(exported.module()(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_compiled_model_has_the_gradients_of_the_plain_one():
    model = build(tiny("decoder", num_experts=4), AutoModelForCausalLM).train()
    ids, found = inputs(), []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        run(ids, labels=ids).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_router_reads_its_weight_only_where_it_should():
    """An expert that no token chooses gets zeros, not None: distributed training waits for each gradient."""
    for layout in ("fused", "modulelist"):
        mlp = block("decoder", experts_layout=layout, num_experts_per_tok=1, norm_topk_prob=False)
        with torch.no_grad():
            mlp.gate.weight.zero_()  # all equal: the first is chosen
        mlp(states(1, 4, 12))[0].sum().backward()
        for parameter in mlp.parameters():
            assert parameter.grad is not None
        routers = [module for module in mlp.modules() if isinstance(module, Router)]
        assert len(routers) == 1
