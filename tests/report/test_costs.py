"""Costs are those of real models: counted parameters, counted arithmetic, the bytes of a real cache."""

import time

import pytest
import torch
from tiny import build, inputs, tiny
from torch.utils.flop_counter import FlopCounterMode

import variform
from variform.forms import SHAPES
from variform.model.lsh import OwnKeys, as_key, count_in_chunks, hash_keys, rotations, see_by_hash
from variform.model.patterns import parse
from variform.report.costs import (
    Costs,
    count_costs,
    default_length,
    hash_products,
    subtract,
)
from variform.report.pairs import expected_pairs, seen_pairs

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
    "experts": tiny("decoder", num_experts=4, num_shared_experts=1, shared_expert_gate=True, router_bias=True),
    "some experts": tiny(
        "encoder",
        num_experts=4,
        num_experts_per_tok=1,
        mlp_layer_types=["dense", "sparse"],
        experts_layout="modulelist",
    ),
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


def test_a_token_uses_a_part_of_the_experts():
    """Qwen3-30B-A3B: "3.3B activated", arXiv:2505.09388, table 2; here by hand, of two layers with experts of four."""
    assert count_costs(variform.load_config("qwen3-30b-a3b")).active_parameters == 3_353_032_704
    config = tiny("encoder", num_experts=4, num_experts_per_tok=1, mlp_bias=True)
    costs = count_costs(config)
    expert = 3 * 12 * 14 + 2 * 14 + 12
    assert costs.parameters - costs.active_parameters == 2 * 3 * expert
    assert count_costs(tiny("encoder")).active_parameters == count_costs(tiny("encoder")).parameters


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
    assert count_costs(tiny("encoder"))[3:] == (0, 0, 0)


def test_a_cache_of_another_dtype_takes_its_bytes():
    config = tiny("decoder", dtype="float16")
    assert count_costs(config, dtype=torch.float32).cache_bytes == 2 * count_costs(config).cache_bytes


def test_a_window_costs_less_than_all():
    full, windowed = (tiny("decoder", attention_patterns=[pattern]) for pattern in ("full", "sliding_window:4"))
    change = subtract(count_costs(windowed, LENGTH), count_costs(full, LENGTH))
    # Two layers of 3 heads, 4 wide; 66 pairs become 38
    assert change == Costs(0, 0, pytest.approx(-2 * 4 * 3 * 4 * (66 - 38) / LENGTH), 0, -2 * 2 * 3 * 4 * 2, 0)


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


class TestHashing:
    def of_random_buckets(self, spec, length, is_causal, draws=4000):
        """The naive twin: the pairs of many draws of buckets, on average; a token sees itself only where nothing else."""
        pattern, generator = parse(spec), torch.Generator().manual_seed(0)
        total = pattern.factors[0] * (pattern.factors[1] if len(pattern.factors) > 1 else 1)
        buckets = torch.randint(total, (draws, pattern.rounds, length), generator=generator)
        meets = (buckets[..., :, None] == buckets[..., None, :]).any(1)
        others = meets & ~torch.eye(length, dtype=torch.bool)
        others = others.tril() if is_causal else others
        alone = ~others.any(-1)
        return float(others.sum() + alone.sum()) / draws

    @pytest.mark.parametrize("is_causal", [True, False])
    @pytest.mark.parametrize(("spec", "length"), [("lsh:4", 7), ("lsh:8,rounds=3", 13), ("lsh:2/4", 5), ("lsh:2", 1)])
    def test_pairs_are_those_to_be_expected_of_even_hashes(self, spec, length, is_causal):
        expected = self.of_random_buckets(spec, length, is_causal)
        assert expected_pairs(parse(spec), length, is_causal) == pytest.approx(expected, rel=0.02)

    @pytest.mark.parametrize("is_causal", [True, False])
    def test_pairs_are_near_those_of_random_states(self, is_causal):
        """Hashes of normal states fall almost evenly, so that the layer's own definition agrees."""
        pattern, length = parse("lsh:4,rounds=2"), 29
        key = as_key(torch.randn(40, 8, length, 16, generator=torch.Generator().manual_seed(0)))
        shown = torch.ones(1, 1, length, length, dtype=torch.bool)
        shown = shown.tril() if is_causal else shown
        seen, _ = see_by_hash(pattern, 0, OwnKeys(key, torch.arange(length)), key, shown)
        assert expected_pairs(pattern, length, is_causal) == pytest.approx(float(seen.sum()) / 320, rel=0.05)

    def test_chunks_are_as_many_as_are_computed(self):
        """In each round a query meets two chunks, its own key with them."""
        pattern, length = parse("lsh:4,rounds=2,chunked=true,chunk=3"), 12
        key = as_key(torch.randn(1, 1, length, 8, generator=torch.Generator().manual_seed(0)))
        shown = torch.ones(1, 1, length, length, dtype=torch.bool)
        met = count_in_chunks(hash_keys(key, pattern, 0), pattern, shown)
        assert expected_pairs(pattern, length, is_causal=False) == int(met.sum())

    @pytest.mark.parametrize(("spec", "products"), [("lsh:8", 4), ("lsh:8,rounds=3", 12), ("lsh:4/6", 5), ("full", 0)])
    def test_a_key_is_multiplied_with_each_direction(self, spec, products):
        pattern = parse(spec)
        assert hash_products(pattern) == products
        if products:
            assert rotations(pattern, 0, num_heads=1, size=5).shape[2:].numel() == products

    def test_hashes_count_as_arithmetic(self):
        """Two layers of 3 heads, 4 wide: two operations a term, two directions a round and token, two terms a pair."""
        few, many = (tiny("decoder", attention_patterns=[f"lsh:4,rounds={rounds}"]) for rounds in (1, 3))
        pairs = [expected_pairs(parse(f"lsh:4,rounds={rounds}"), LENGTH, True) for rounds in (1, 3)]
        change = subtract(count_costs(many, LENGTH), count_costs(few, LENGTH)).flops * LENGTH
        assert change == pytest.approx(2 * 2 * 3 * 4 * (2 * (pairs[1] - pairs[0]) + LENGTH * (6 - 2)))

    def test_what_sorts_whole_texts_has_no_cache(self):
        config = tiny("decoder", attention_patterns=["lsh:4,chunked=true,chunk=4", "full"], use_cache=False)
        assert count_costs(config)[-3:] == (0, 0, 0)
