"""The nearest valid form of a refused one builds, and is as near as a reader would ask for."""

import pytest
import torch
from strategies import sample, wild_forms

import variform
from variform.forms import config_from_dict
from variform.nearest import LEFT_OUT, changed, nearest_valid, patch, refusal, with_mend

SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {"model_type": "variform_encoder", **SIZES}
DECODER = {"model_type": "variform_decoder", **SIZES}
PAIR = {"model_type": "variform_encoder_decoder", "encoder": dict(SIZES), "decoder": dict(SIZES)}
EXPERTS = {**DECODER, "num_experts": 4}

REFUSED = [
    ({**ENCODER, "hidden_size": 30, "num_attention_heads": 8}, {"hidden_size": 32}),
    ({**ENCODER, "num_key_value_heads": 3}, {"num_key_value_heads": 4}),
    ({**ENCODER, "num_atention_heads": 8}, {"num_atention_heads": LEFT_OUT}),
    ({**ENCODER, "num_hiden_layers": 2}, {"num_hiden_layers": LEFT_OUT}),
    ({**DECODER, "hiden_act": "gelu"}, {"hiden_act": LEFT_OUT, "hidden_act": "gelu"}),
    ({**DECODER, "hidden_act": "gleu"}, {"hidden_act": "gelu"}),
    ({**DECODER, "norm_placement": "prenorm"}, {"norm_placement": "pre"}),
    ({**DECODER, "vocab_size": "100"}, {"vocab_size": 100}),
    ({**DECODER, "vocab_size": 0}, {"vocab_size": 32000}),
    ({**DECODER, "hidden_dropout": 1.5}, {"hidden_dropout": 0.1}),
    ({**DECODER, "pad_token_id": 100}, {"pad_token_id": 99}),
    ({**DECODER, "attention_patterns": ["slidng_window:8"]}, {"attention_patterns": ["sliding_window:8"]}),
    (
        {**DECODER, "attention_patterns": ["sliding_window:512"], "max_position_embeddings": 500},
        {"max_position_embeddings": 512},
    ),
    ({**DECODER, "head_dim": 7}, {"head_dim": 8}),
    ({**EXPERTS, "num_experts_per_tok": 5}, {"num_experts_per_tok": 4}),
    ({**EXPERTS, "router_type": "expert_choice"}, {"router_type": "softmax_topk"}),
    ({**EXPERTS, "shared_expert_gate": True}, {"shared_expert_gate": False}),
    ({**PAIR, "encoder": {**SIZES, "hidden_size": 30}}, {"encoder.hidden_size": 32}),
    ({**PAIR, "decoder": {**SIZES, "label_smoothing": 0.1}}, {"decoder.label_smoothing": 0.0}),
    ({"model_type": "variform_decodr", **SIZES}, {"model_type": "variform_decoder"}),
]


def builds(form) -> bool:
    with torch.device("meta"):
        variform.from_config(config_from_dict(form))
    return True


@pytest.mark.parametrize(("form", "changes"), REFUSED)
def test_a_reader_would_change_the_same(form, changes):
    assert refusal(form) is not None
    assert nearest_valid(form) == changes
    assert builds(changed(form, changes))


def test_two_slips_are_two_changes():
    form = {**DECODER, "hidden_size": 31, "hidden_act": "gleu"}
    changes = nearest_valid(form)
    assert changes == {"hidden_size": 32, "hidden_act": "gelu"}
    assert nearest_valid(form, most_changes=1) is None


def test_a_valid_form_needs_no_change_and_a_hopeless_one_has_none():
    assert nearest_valid(DECODER) == {}
    slips = {"norm_type": "x", "norm_placement": "x", "hidden_act": "x", "router_type": "x"}
    assert nearest_valid({**DECODER, **slips}) is None


def test_random_refused_forms_have_neighbours_that_build():
    """Of forms of which up to four fields are out of range, those for which something near is found; it always builds."""
    wild = [{"model_type": f"variform_{shape}", **fields} for shape, fields in sample(wild_forms(), 60)]
    refused = [form for form in wild if refusal(form) is not None]
    found = [(form, changes) for form in refused if (changes := nearest_valid(form)) is not None]
    assert len(refused) > 20 and len(found) > len(refused) / 2
    for form, changes in found:
        assert changes and builds(changed(form, changes))


def test_the_patch_shows_both_values():
    form = {**PAIR, "encoder": {**SIZES, "hidden_size": 30}, "hiden": 1}
    assert patch(form, {"encoder.hidden_size": 32, "hiden": LEFT_OUT}) == [
        "-encoder.hidden_size: 30",
        "+encoder.hidden_size: 32",
        "-hiden: 1",
    ]
    form = {**ENCODER, "hidden_size": 30, "num_attention_heads": 8}
    assert with_mend(form, refusal(form)).splitlines()[1:] == [
        "The nearest form that builds:",
        "-hidden_size: 30",
        "+hidden_size: 32",
    ]
