"""Experts move between the two layouts bit by bit, and what has no place in the other is refused."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from strategies import forms
from tiny import CONFIGS, build, inputs, tiny
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import variform
from variform.surgery import change_experts_layout

HEADS = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM, "encoder_decoder": AutoModelForSeq2SeqLM}


def sparse(**fields):
    return build(tiny("decoder", num_experts=3, mlp_bias=True, **fields), AutoModelForCausalLM)


def states_are_equal(first, second) -> bool:
    expected, found = first.state_dict(), second.state_dict()
    return expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@settings(max_examples=40)
@given(forms())
def test_every_form_with_experts_comes_back_bit_by_bit(form):
    shape, fields = form
    sides = [fields[side] for side in ("encoder", "decoder")] if shape == "encoder_decoder" else [fields]
    sparse_sides = [side for side in sides if side["num_experts"]]
    assume(sparse_sides)
    for side in sparse_sides:
        side["experts_layout"] = "fused"
    model = build(CONFIGS[shape](**fields), HEADS[shape])
    spread, statement = change_experts_layout(model, "modulelist", return_statement=True)
    assert set(statement.equal_up_to.values()) == {math.inf}
    assert not any("gate_up_proj" in name for name, _ in spread.named_parameters())
    batch = {"input_ids": inputs()} | ({"decoder_input_ids": inputs(seed=1)} if shape == "encoder_decoder" else {})
    with torch.no_grad():
        assert_close(spread(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    assert states_are_equal(model, change_experts_layout(spread, "fused"))


def test_each_expert_holds_its_own_weights():
    model = sparse()
    spread = change_experts_layout(model, "modulelist")
    fused, experts = model.model.layers[1].mlp.experts, spread.model.layers[1].mlp.experts
    for number, expert in enumerate(experts):
        gate, up = fused.gate_up_proj[number].chunk(2)
        gate_bias, up_bias = fused.gate_up_proj_bias[number].chunk(2)
        assert torch.equal(expert.gate_proj.weight, gate) and torch.equal(expert.up_proj.weight, up)
        assert torch.equal(expert.gate_proj.bias, gate_bias) and torch.equal(expert.up_proj.bias, up_bias)
        assert torch.equal(expert.down_proj.weight, fused.down_proj[number])
        assert torch.equal(expert.down_proj.bias, fused.down_proj_bias[number])
        assert expert.down_proj.weight.untyped_storage().nbytes() == expert.down_proj.weight.nbytes


def test_the_same_layout_is_a_copy_and_where_it_came_from_stays():
    model = sparse()
    model.config.origin = {"model_type": "mixtral"}
    same = change_experts_layout(model, "fused")
    assert states_are_equal(model, same) and same.model.norm.weight is not model.model.norm.weight
    assert change_experts_layout(model, "modulelist").config.origin == {"model_type": "mixtral"}


def test_one_stack_of_a_pair():
    fields = {"num_experts": 3}
    model = build(tiny("encoder_decoder", encoder=fields, decoder=fields), AutoModelForSeq2SeqLM)
    config = change_experts_layout(model, {"decoder": "modulelist"}).config
    assert (config.encoder.experts_layout, config.decoder.experts_layout) == ("fused", "modulelist")


@pytest.mark.parametrize("backend", ["eager", "batched_mm"])
def test_the_backend_of_experts_stays(backend):
    model = sparse()
    model.set_experts_implementation(backend)
    assert change_experts_layout(model, "fused").config._experts_implementation == backend


def test_what_is_frozen_stays_so_and_a_frozen_part_is_refused():
    model = change_experts_layout(sparse(), "modulelist")
    for layer in model.model.layers:
        layer.mlp.experts.requires_grad_(False)
    fused = change_experts_layout(model, "fused")
    assert not any(parameter.requires_grad for parameter in fused.model.layers[0].mlp.experts.parameters())
    model.model.layers[0].mlp.experts[1].requires_grad_(True)
    with pytest.raises(ValueError, match="are frozen and others are not, and 'fused' makes them one"):
        change_experts_layout(model, "fused")


def test_activations_that_differ_have_no_place_in_one_tensor():
    model = change_experts_layout(sparse(hidden_act="prelu"), "modulelist")
    assert states_are_equal(model, change_experts_layout(change_experts_layout(model, "fused"), "modulelist"))
    with torch.no_grad():
        model.model.layers[0].mlp.experts[1].act_fn.weight += 1
    with pytest.raises(ValueError, match=r"weights of `hidden_act` differ between the experts of 'model.layers.0.mlp"):
        change_experts_layout(model, "fused")


@pytest.mark.parametrize(
    ("fields", "layout", "message"),
    [
        ({}, "modulelist", "`experts_layout='modulelist'` is for experts, and the model has none: `upcycle` gives"),
        ({"num_experts": 3}, "module_list", "Did you mean 'modulelist'"),
        ({"num_experts": 3}, {"encoder": "fused"}, "`experts_layout='encoder'` is not one of"),
    ],
)
def test_what_cannot_be_is_refused(fields, layout, message):
    with pytest.raises(ValueError, match=message):
        change_experts_layout(build(tiny("decoder", **fields), AutoModelForCausalLM), layout)


def test_it_is_public():
    assert variform.surgery.change_experts_layout is change_experts_layout
