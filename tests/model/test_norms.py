"""Norms against their formulas, and where each placement puts them around a branch."""

import pytest
import torch
from tiny import build, inputs, tiny
from torch import nn
from torch.testing import assert_close

from variform.model.norms import LayerScale, Residual, RMSNorm, make_norm

SIZE = 12


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def normalise(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """The formula of the module's own kind, in float64."""
    states = states.double()
    if isinstance(module, RMSNorm):
        gain = module.weight.double() + module.unit_offset
        return states / (states.square().mean(-1, keepdim=True) + module.eps).sqrt() * gain
    centred = states - states.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight.double()
    return scaled if module.bias is None else scaled + module.bias.double()


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_type": "rms_norm"},
        {"norm_type": "rms_norm", "norm_unit_offset": True},
        {"norm_type": "rms_norm", "norm_eps": 0.3},
        {"norm_type": "layer_norm"},
        {"norm_type": "layer_norm", "norm_bias": False},
        {"norm_type": "layer_norm", "norm_eps": 0.3},
    ],
    ids=str,
)
def test_a_norm_is_its_formula(fields):
    norm = randomised(make_norm(tiny("decoder", **fields)))
    states = 3 * torch.randn(2, 5, SIZE) + 1
    assert_close(norm(states), normalise(norm, states).float(), rtol=1e-5, atol=1e-5)


def test_a_norm_starts_as_the_identity_on_normed_states():
    for fields in ({"norm_unit_offset": True}, {}, {"norm_type": "layer_norm"}):
        states = torch.randn(4, SIZE)
        states = states - states.mean(-1, keepdim=True)
        states = states / states.square().mean(-1, keepdim=True).sqrt()
        assert_close(make_norm(tiny("decoder", **fields))(states), states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_half_precision_is_normed_in_float32(unit_offset):
    norm = randomised(RMSNorm(SIZE, 1e-6, unit_offset))
    states = (300 * torch.randn(3, SIZE)).half()  # the square of 300 has no place in float16
    output = norm.half()(states)
    assert output.dtype == torch.float16
    assert_close(output.float(), normalise(norm, states).float(), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_the_dtype_of_the_states_is_kept_when_the_weight_has_another(unit_offset):
    norm = RMSNorm(SIZE, 1e-6, unit_offset)
    assert norm(torch.randn(2, SIZE).bfloat16()).dtype == torch.bfloat16


class TestPlacement:
    """`run(residual, states)` is the residual around the branch `f(h) = 2 h + 1`."""

    def residual(self, **fields) -> Residual:
        return randomised(Residual(tiny("decoder", norm_type="layer_norm", **fields))).eval()

    def run(self, residual, states):
        return residual.leave(states, 2 * residual.enter(states) + 1)

    def test_pre_norms_what_the_branch_reads(self):
        residual, states = self.residual(norm_placement="pre"), torch.randn(3, SIZE)
        expected = states + 2 * normalise(residual.input_norm, states) + 1
        assert_close(self.run(residual, states), expected.float(), rtol=1e-4, atol=1e-4)

    def test_post_norms_the_sum(self):
        residual, states = self.residual(norm_placement="post"), torch.randn(3, SIZE)
        expected = normalise(residual.output_norm, states + 2 * states + 1)
        assert_close(self.run(residual, states), expected.float(), rtol=1e-4, atol=1e-4)

    def test_sandwich_norms_what_the_branch_reads_and_writes(self):
        residual, states = self.residual(norm_placement="sandwich"), torch.randn(3, SIZE)
        branch = 2 * normalise(residual.input_norm, states) + 1
        expected = states + normalise(residual.branch_norm, branch)
        assert_close(self.run(residual, states), expected.float(), rtol=1e-4, atol=1e-4)

    def test_reordered_norms_what_the_branch_writes(self):
        residual, states = self.residual(norm_placement="reordered"), torch.randn(3, SIZE)
        expected = states + normalise(residual.branch_norm, 2 * states + 1)
        assert_close(self.run(residual, states), expected.float(), rtol=1e-4, atol=1e-4)

    def test_layer_scale_multiplies_the_branch_after_its_norm(self):
        residual = self.residual(norm_placement="reordered", layer_scale_init=0.1)
        states = torch.randn(3, SIZE)
        expected = states + normalise(residual.branch_norm, 2 * states + 1) * residual.layer_scale.weight
        assert_close(self.run(residual, states), expected.float(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("placement", ["pre", "post", "sandwich", "reordered"])
    def test_only_the_norms_of_the_placement_exist(self, placement):
        residual = self.residual(norm_placement=placement)
        wanted = {"pre": {"input"}, "post": {"output"}, "sandwich": {"input", "branch"}, "reordered": {"branch"}}
        found = {name.split("_")[0] for name, _ in residual.named_parameters()}
        assert found == wanted[placement]

    def test_dropout_falls_on_the_branch_and_not_on_the_stream(self):
        residual = self.residual(norm_placement="pre", hidden_dropout=0.9).train()
        states = torch.full((400, SIZE), 5.0)
        output = residual.leave(states, torch.ones_like(states))
        assert set(output.unique().tolist()) == {5.0, 15.0}


def test_a_layer_scale_starts_at_its_value():
    assert_close(LayerScale(tiny("decoder", layer_scale_init=0.25))(torch.ones(2, SIZE)), torch.full((2, SIZE), 0.25))


def test_the_first_norm_is_skipped_in_the_first_layer_alone():
    model = build(tiny("encoder", skip_first_norm=True))
    assert model.layers[0].attention_residual.input_norm is None
    assert isinstance(model.layers[0].mlp_residual.input_norm, RMSNorm)
    assert isinstance(model.layers[1].attention_residual.input_norm, RMSNorm)


def test_a_final_norm_norms_the_last_hidden_states():
    model = build(tiny("decoder", final_norm=True))
    seen = []
    model.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    output = model(inputs()).last_hidden_state
    assert_close(output, normalise(model.norm, seen[0]).float(), rtol=1e-4, atol=1e-5)
    assert build(tiny("decoder", final_norm=False)).norm is None


def test_a_parallel_residual_feeds_both_branches_the_same_states():
    model = build(tiny("decoder", parallel_residual=True, num_hidden_layers=1, final_norm=False))
    layer, states = model.layers[0], torch.randn(1, 5, SIZE)
    branches = [
        layer.self_attn(layer.attention_residual.enter(states))[0],
        layer.mlp(layer.mlp_residual.enter(states)),
    ]
    assert_close(layer(states)[0], states + branches[0] + branches[1], rtol=1e-4, atol=1e-5)
