"""Rope of a sparsified model: kept by layer, or stretched, and what that changes."""

import math

import pytest
import strategies
import torch
from sparsified import LONGER, PATTERNS, SCALED, TRAINED, check_claim, gap, original, stated
from tiny import inputs

from variform.surgery import sparsify


@pytest.mark.parametrize("rope_scaling", SCALED)
def test_rope_is_stretched_by_the_ratio_of_the_lengths(rope_scaling):
    model = original("decoder", rope_parameters={"rope_theta": 500.0})
    config = sparsify(model, ["full"], 4 * TRAINED, rope_scaling=rope_scaling).config
    assert config.rope_parameters == {"rope_theta": 500.0, **SCALED[rope_scaling]}
    # Dynamic scaling begins at the length of the config
    assert config.max_position_embeddings == (TRAINED if rope_scaling == "dynamic" else 4 * TRAINED)


@pytest.mark.parametrize("rope_scaling", ["linear", "yarn"])
def test_stretching_changes_every_input_and_says_so(rope_scaling):
    model = original("decoder")
    result, statement = stated(model, ["full"], LONGER, rope_scaling=rope_scaling)
    assert statement.equal_up_to == {"decoder": 0}
    assert gap(model, result, 2) > 1e-4
    assert "the decoder reads no more than one token" in str(statement)
    assert f"become rotary, {rope_scaling}" in str(statement) and "on every input" in str(statement)


def test_dynamic_scaling_changes_nothing_below_the_trained_length():
    model = original("decoder")
    result, statement = stated(model, ["full"], LONGER, rope_scaling="dynamic")
    assert statement.equal_up_to == {"decoder": TRAINED - 1}
    assert gap(model, result, TRAINED) == 0  # as long as nothing longer was read
    result(inputs(length=LONGER))
    assert gap(model, result, TRAINED) > 1e-4
    assert gap(model, result, TRAINED - 1) == 0
    assert f"`max_position_embeddings` stays {TRAINED}" in str(statement)
    assert "generation past it is not the full forward" in str(statement)


@torch.no_grad()
def test_cached_keys_of_dynamic_rope_stay_as_they_were_turned():
    """What the statement warns of: transformers turns new keys alone by the angles of the longer text."""
    result = sparsify(original("decoder"), ["full"], LONGER, rope_scaling="dynamic")
    ids = inputs(length=LONGER)
    first = result(ids[:, :TRAINED], use_cache=True)
    rest = result(ids[:, TRAINED:], past_key_values=first.past_key_values).logits
    assert (rest - result(ids).logits[:, TRAINED:]).abs().max() > 1e-3


@pytest.mark.parametrize(("attention_factor", "longest"), [(1.0, 11), (1.5, 0)])
def test_longrope_with_short_factors_of_one_changes_nothing_up_to_its_length(attention_factor, longest):
    """Unless it scales the scores as well."""
    model = original("decoder")
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 11, "factor": 4.0}
    rope |= {"short_factor": [1.0, 1.0], "long_factor": [2.0, 4.0], "attention_factor": attention_factor}
    result, statement = stated(model, ["full"], LONGER, rope_parameters=rope)
    assert statement.equal_up_to == {"decoder": longest}
    assert gap(model, result, max(longest, 1)) < 1e-5
    assert gap(model, result, max(longest, 1) + 1) > 1e-4


@pytest.mark.parametrize("rope_type", [name for name in strategies.ROPES if name != "default"])
@torch.no_grad()
def test_the_original_s_rope_is_kept_whatever_its_type(rope_type):
    rope = strategies.rope_parameters(rope_type, 8)
    if rope_type == "longrope":
        rope.pop("factor")  # then it follows from the form's length, which grows
    model = original("decoder", head_dim=8, rope_parameters=rope)
    result, statement = stated(model, ["full"], LONGER)
    assert statement.equal_up_to == {"decoder": math.inf}
    assert all(gap(model, result, length) == 0 for length in (9, TRAINED, TRAINED + 3, LONGER))


def test_layers_keep_their_own_rope_when_they_change_their_type():
    """In the original it is given by layer type; the layers of both types become sliding ones, or all full."""
    local, whole = (
        {"rope_type": "default", "rope_theta": 50.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 9e3},
    )
    ropes = {"sliding_attention": local, "full_attention": whole}
    model = original("decoder", rope_parameters=ropes, attention_patterns=["full"])
    result, statement = stated(model, PATTERNS)
    assert result.config.rope_parameters == whole
    check_claim(model, result, statement)
    mixed = original("decoder", rope_parameters=ropes, attention_patterns=["sliding_window:7", "full"])
    result, statement = stated(mixed, ["full", "sliding_window:7"])
    assert result.config.rope_parameters == {"full_attention": local, "sliding_attention": whole}
    check_claim(mixed, result, statement)
    with pytest.raises(
        ValueError, match="puts layers of different `rope_parameters` into one type, 'sliding_attention'"
    ):
        sparsify(mixed, PATTERNS)
    assert sparsify(mixed, PATTERNS, rope_parameters=local).config.rope_parameters == local
