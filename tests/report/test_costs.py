"""Costs are those of real models: counted parameters, counted arithmetic, the bytes of a real cache."""

import time

import pytest
import torch
from tiny import build, inputs, tiny
from torch.utils.flop_counter import FlopCounterMode

import variform
from variform.forms import SHAPES
from variform.report.costs import Costs, count_costs, default_length, seen_pairs, subtract

LENGTH = 11
# Everything that has a say in the arithmetic, in few forms
FORMS = {
    "encoder": tiny("encoder"),
    "narrow embeddings, shared layers": tiny("encoder", embedding_size=6, num_hidden_layers=6, num_hidden_groups=3),
    "plain": tiny("encoder", gated_mlp=False, lm_head_transform=True, pooler=True, type_vocab_size=2, mlp_bias=True),
    "both ways in a window": tiny("encoder", num_hidden_layers=3, attention_patterns=["full", "sliding_window:2"]),
    "decoder": tiny("decoder", num_key_value_heads=1, tie_word_embeddings=False),
    "wide heads": tiny("decoder", head_dim=10, attention_sinks=True, qk_norm="head", position_embedding_type="alibi"),
    "causal in a window": tiny("decoder", num_hidden_layers=3, attention_patterns=["sliding_window:4", "full"]),
    "pair": tiny("encoder_decoder"),
    "uneven pair": tiny(
        "encoder_decoder",
        encoder={"hidden_size": 20, "num_hidden_layers": 3, "position_embedding_type": "relative_bias"},
        decoder={"num_key_value_heads": 1, "head_dim": 6, "num_hidden_layers": 4, "num_hidden_groups": 2},
    ),
}


def seen_by_mask(length, window, is_causal):
    """The naive twin: the mask, drawn."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = torch.ones(length, length, dtype=torch.bool)
    if is_causal:
        seen &= distance >= 0
        seen &= distance < (length if window is None else window)
    elif window is not None:
        seen &= distance.abs() <= window
    return int(seen.sum())


def language_model(config, **kwargs):
    return build(config, SHAPES[config.model_type][1], **kwargs)


def stacks(config):
    return (config.encoder, config.decoder) if config.is_encoder_decoder else (config,)


def hidden_flops(config, length):
    """What eager attention computes and the mask then hides: the counter sees it, the form does not need it."""
    hidden = 0
    for stack in stacks(config):
        for layer_type in stack.layer_types:
            window = stack.sliding_window if layer_type == "sliding_attention" else None
            pairs = length**2 - seen_by_mask(length, window, stack.is_causal_stack)
            hidden += 4 * stack.num_attention_heads * stack.head_dim * pairs
    return hidden


@pytest.mark.parametrize("length", [1, 5, 9])
@pytest.mark.parametrize("window", [None, 2, 4, 9, 20])
@pytest.mark.parametrize("is_causal", [True, False])
def test_seen_pairs_are_those_of_the_mask(length, window, is_causal):
    assert seen_pairs(length, window, is_causal) == seen_by_mask(length, window, is_causal)


@pytest.mark.parametrize("name", FORMS)
def test_flops_are_what_a_forward_pass_counts(name):
    """Eager attention multiplies every query with every key: equal once the pairs that the mask hides are taken off."""
    config = FORMS[name]
    model = language_model(config, attn_implementation="eager")
    ids = inputs(batch=1, length=LENGTH)
    targets = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, **targets)
    counted = counter.get_total_flops() - hidden_flops(config, LENGTH)
    assert round(count_costs(config, LENGTH).flops * LENGTH, 3) == counted


@pytest.mark.parametrize("name", FORMS)
def test_parameters_are_those_of_the_built_model(name):
    model = language_model(FORMS[name])
    assert count_costs(FORMS[name]).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("form", "parameters"),
    [("albert-base", 11_221_680), ("qwen3-0.6b", 596_049_920), ("t5-v1.1-small", 76_961_152)],
)
def test_parameters_are_the_published_ones(form, parameters):
    assert count_costs(variform.load_config(form)).parameters == parameters


def test_bert_takes_two_flops_a_weight_and_four_a_key_and_channel():
    """Kaplan et al., arXiv:2001.08361, table 1, plus BERT's transform and head; attention both ways sees every key."""
    layers = 12 * (4 * 768**2 + 2 * 768 * 3072)
    head = 768**2 + 768 * 30522
    assert count_costs(variform.load_config("bert-base"), length=128).flops == 2 * (layers + head) + 12 * 4 * 768 * 128


def cached_bytes(config, length):
    """The bytes of the cache after a forward pass over `length` tokens."""
    model = language_model(config).to(config.dtype or torch.bfloat16)
    with torch.no_grad():
        if config.is_encoder_decoder:
            cache = model(inputs(1, 5), decoder_input_ids=inputs(1, length)).past_key_values.self_attention_cache
        else:
            cache = model(inputs(1, length), use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize(
    "config",
    [
        tiny("decoder", num_hidden_layers=3, num_key_value_heads=1, head_dim=10),
        tiny("decoder", num_hidden_layers=4, num_hidden_groups=2, dtype=torch.float32),
        tiny("encoder_decoder", decoder={"num_key_value_heads": 1, "num_hidden_layers": 3}),
        tiny("decoder", num_key_value_heads=1, attention_patterns=["lsh:4", "full"]),
    ],
    ids=["shared wide heads", "shared layers in float32", "pair", "queries that are keys"],
)
def test_cache_bytes_are_those_of_a_real_cache(config):
    assert count_costs(config).cache_bytes == cached_bytes(config, 7) / 7


def test_a_pair_also_caches_its_source():
    config = FORMS["uneven pair"]
    model = language_model(config).to(torch.bfloat16)
    cache = model(inputs(1, 5), decoder_input_ids=inputs(1, 3)).past_key_values.cross_attention_cache
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert count_costs(config).source_cache_bytes == held / 5


def test_sliding_layers_stop_growing_at_their_window():
    """A window of 6 keys holds the query's own: five are cached, and from there on the full layers alone grow."""
    config = tiny("decoder", num_hidden_layers=3, attention_patterns=["sliding_window:6", "full", "sliding_window:6"])
    costs = count_costs(config)
    assert cached_bytes(config, 5) == 5 * costs.cache_bytes
    assert cached_bytes(config, 9) == 5 * costs.cache_bytes + 4 * costs.cache_bytes_past_window


def test_an_encoder_caches_nothing():
    assert count_costs(tiny("encoder"))[2:] == (0, 0, 0)


def test_a_cache_of_another_dtype_takes_its_bytes():
    config = tiny("decoder", dtype="float16")
    assert count_costs(config, dtype=torch.float32).cache_bytes == 2 * count_costs(config).cache_bytes


def test_a_window_costs_less_than_all():
    full, windowed = (tiny("decoder", attention_patterns=[pattern]) for pattern in ("full", "sliding_window:4"))
    change = subtract(count_costs(windowed, LENGTH), count_costs(full, LENGTH))
    # Two layers of 3 heads, 4 wide; 66 pairs become 38
    assert change == Costs(0, pytest.approx(-2 * 4 * 3 * 4 * (66 - 38) / LENGTH), 0, -2 * 2 * 3 * 4 * 2, 0)


def test_the_default_length_is_what_all_stacks_were_made_for():
    pair = tiny("encoder_decoder", encoder={"max_position_embeddings": 17})
    assert (default_length(pair), default_length(variform.load_config("qwen3-0.6b"))) == (17, 2048)


def test_counting_leaves_the_config_as_it_is():
    config = tiny("encoder_decoder")
    before = config.to_dict()
    count_costs(config)
    assert config.to_dict() == before


def test_counting_is_quick():
    start = time.process_time()
    count_costs(variform.load_config("bert-base"))
    assert time.process_time() - start < 1


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="`length=0` must be at least 1 token"):
        count_costs(tiny("encoder"), length=0)
