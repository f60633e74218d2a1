"""What `sparsify` refuses, with the reason."""

import peft
import pytest
import torch
from sparsified import LONGER, PATTERNS, SCALED, WINDOW, bert, check_claim, original, stated
from tiny import tiny
from torch import nn
from transformers import AutoModelForCausalLM

from variform.surgery import sparsify


@pytest.mark.parametrize(
    ("shape", "kwargs", "message"),
    [
        ("decoder", {"patterns": []}, "`attention_patterns=\\[\\]` is empty"),
        ("decoder", {"patterns": None}, "`attention_patterns=None` has a wrong type"),
        ("decoder", {"patterns": ["sliding_windw"]}, "Did you mean 'sliding_window'"),
        ("decoder", {"patterns": ["sliding_window:99"]}, "wider than `max_position_embeddings=24`"),
        ("decoder", {"max_position_embeddings": 23}, "`max_position_embeddings=23` is below the original's 24"),
        ("decoder", {"max_position_embeddings": "96"}, "`max_position_embeddings='96'` has a wrong type"),
        ("encoder", {"patterns": {"decoder": PATTERNS}}, "`attention_patterns='decoder'` is not one of"),
        ("encoder_decoder", {"patterns": {"encodr": PATTERNS}}, "Did you mean 'encoder'"),
        (
            "encoder_decoder",
            {"max_position_embeddings": {"decoder": 7}},
            "`decoder.max_position_embeddings=7` is below the original's 24",
        ),
        ("decoder", {"rope_scaling": "yarn"}, "stretches rope to a larger `max_position_embeddings`: give one"),
        (
            "decoder",
            {"rope_scaling": "longrope", "max_position_embeddings": 96},
            "`rope_scaling='longrope'` is not one",
        ),
        ("decoder", {"rope_parameters": "linear"}, "`rope_parameters='linear'` is not a dict"),
        (
            "decoder",
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            "leaves `rope_theta` out; the original has 10000.0",
        ),
        (
            "decoder",
            {"rope_parameters": SCALED["linear"], "rope_scaling": "linear", "max_position_embeddings": 96},
            "both given",
        ),
    ],
)
def test_what_cannot_be_is_refused(shape, kwargs, message):
    with pytest.raises(ValueError, match=message):
        sparsify(original(shape), **{"patterns": PATTERNS, **kwargs})


def test_rope_arguments_need_rope():
    for kwargs in ({"rope_scaling": "linear"}, {"rope_parameters": SCALED["linear"]}):
        with pytest.raises(ValueError, match="is given, but `position_embedding_type='alibi'`: leave it out"):
            sparsify(original("decoder", "alibi"), PATTERNS, LONGER, **kwargs)


def test_a_stretched_rope_is_not_stretched_again():
    model = sparsify(original("decoder"), PATTERNS, LONGER, rope_scaling="yarn")
    with pytest.raises(ValueError, match="stretches rope of type 'default', and the original's is 'yarn'"):
        sparsify(model, PATTERNS, 2 * LONGER, rope_scaling="linear")


def test_layers_that_share_weights_share_a_pattern():
    model = original("encoder", num_hidden_groups=1)
    with pytest.raises(ValueError, match="`num_hidden_groups=1` makes layers share weights"):
        sparsify(model, ["full", f"sliding_window:{WINDOW}"])
    check_claim(model, *stated(model, PATTERNS))


@pytest.mark.parametrize("make", [lambda: "bert-base", lambda: nn.Linear(2, 3), bert])
def test_another_family_s_model_is_refused(make):
    model = make()
    with pytest.raises(ValueError, match=r"is not a Variform model.*`variform.from_hf` first"):
        sparsify(model, PATTERNS)


def test_an_adapted_model_is_refused_until_it_is_merged():
    adapted = peft.get_peft_model(original("decoder"), peft.LoraConfig(r=2, init_lora_weights=False)).eval()
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(ValueError, match="holds adapters: call `merge_and_unload"):
            sparsify(model, PATTERNS)
    merged = adapted.merge_and_unload()
    check_claim(merged, *stated(merged, PATTERNS))


def test_a_quantised_model_is_refused():
    model = original("decoder")
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="quantised"):
        sparsify(model, PATTERNS)


def test_a_model_without_data_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny("decoder"))
    with pytest.raises(ValueError, match="weights are on meta"):
        sparsify(model, PATTERNS)


def test_a_tie_that_does_not_hold_is_refused():
    model = original("decoder")
    model.lm_head.weight = nn.Parameter(torch.ones_like(model.lm_head.weight))
    with pytest.raises(ValueError, match=r"ties 'lm_head.weight' to 'model.embed_tokens.weight', whose values differ"):
        sparsify(model, PATTERNS)
    model.config.tie_word_embeddings = False
    check_claim(model, *stated(model, PATTERNS))


def test_a_part_of_a_model_is_refused():
    with pytest.raises(ValueError, match=r"no place for .*cross_attn.*hand in a whole model"):
        sparsify(original("encoder_decoder").model.decoder, PATTERNS)
