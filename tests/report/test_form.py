"""A form in words fits a screen; the differences of two forms are all named, with what each costs."""

import pytest
import yaml
from tiny import tiny

import variform
from variform.forms import list_forms
from variform.report.compare import compare, differences
from variform.report.costs import Costs, count_costs, subtract
from variform.report.form import as_text, describe, pattern_period, patterns, plain, units

BERT, ROBERTA, LLAMA, T5 = (
    variform.load_config(name) for name in ("bert-base", "roberta-base", "llama-smollm2-135m", "t5-small")
)


def variant(config, **fields):
    """A form with some fields changed; for a pair, of its decoder."""
    kept = yaml.safe_load(yaml.safe_dump({k: v for k, v in config.to_dict().items() if v is not None}))
    target = kept["decoder"] if config.is_encoder_decoder else kept
    target.update(fields)
    return type(config)(**{k: v for k, v in kept.items() if k != "model_type"})


def by_field(rows):
    return {row.field: row for row in rows}


def total(changes):
    return Costs(*(sum(figures) for figures in zip(*changes)))


@pytest.mark.parametrize("form", list_forms())
def test_a_description_fits_the_screen(form):
    lines = as_text(describe(variform.load_config(form), form)).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100


def test_a_description_with_every_option_fits_the_screen():
    stack = {
        "norm_placement": "sandwich",
        "norm_unit_offset": True,
        "qk_norm": "head",
        "attention_bias": ["q", "v"],
        "attention_sinks": True,
        "attention_scale": 0.3,
        "attn_logit_softcapping": 50.0,
        "attention_patterns": ["sliding_window:4", "sliding_window:4", "full"],
        "num_hidden_layers": 7,
        "layer_scale_init": 0.1,
        "embedding_size": 8,
        "embedding_norm": True,
        "embedding_scale": "sqrt",
        "lm_head_transform": True,
        "lm_head_bias": True,
        "final_logit_softcapping": 30.0,
        "layerdrop": 0.1,
        "glu_limit": 7.0,
        "glu_offset": 1.0,
    }
    lines = as_text(describe(tiny("encoder_decoder", encoder=stack, decoder=stack, label_smoothing=0.1))).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100


def test_a_description_says_what_makes_the_form():
    text = as_text(describe(variform.load_config("modernbert-base"), "modernbert-base"))
    said = ["modernbert-base", "encoder", "22", "768", "50,368", "160,000", "(full, 2 x sliding_window:64) x 7, full"]
    said += ["layer norm", "pre", "no bias", "gated gelu", "1,152", "149,655,232"]
    assert [words for words in said if words not in text] == []


def test_a_pair_stands_side_by_side():
    lines = as_text(describe(tiny("encoder_decoder", decoder={"hidden_act": "relu"}))).splitlines()
    assert ["encoder", "decoder"] in [line.split() for line in lines]
    feed_forward = next(line for line in lines if line.startswith("feed-forward"))
    assert feed_forward.index("gated silu") < feed_forward.index("gated relu")


def test_experts_are_said_with_how_they_are_chosen_and_what_a_token_uses():
    text = as_text(describe(variform.load_config("qwen3-30b-a3b")))
    assert "128, gated silu, 768 wide; 8 a token, by softmax; weights add up to 1" in text
    assert "30.5 G (30,532,122,624), of which a token uses 3.35 G" in text and "feed-forward" not in text
    some = {"num_experts": 4, "mlp_layer_types": ["dense", "sparse"], "router_type": "sigmoid_bias", "n_group": 2}
    said = " ".join(as_text(describe(tiny("decoder", **some, num_shared_experts=1, router_z_loss_coef=0.1))).split())
    assert "14 wide; in 1 of 2 layers" in said and "from the 1 best of 2 groups; 1 shared by all tokens" in said
    assert "router z-loss 0.1" in said and "balance loss" not in said


def test_a_head_of_its_own_is_said_beside_tied_stacks():
    text = as_text(describe(variform.load_config("t5-v1.1-small")))
    assert "weights of its own; encoder and decoder share one table of embeddings" in text


def test_the_bound_of_a_windows_cache_is_said():
    windowed = variant(LLAMA, attention_patterns=["sliding_window:512", "full"])
    assert "23.0 kB a token of context, in bfloat16; 11.5 kB from token 512 on" in as_text(describe(windowed))


def test_a_form_that_sorts_whole_texts_says_that_it_has_no_cache():
    sorted_texts = ["lsh:4,chunked=true,chunk=4", "full"]
    lines = as_text(describe(tiny("decoder", attention_patterns=sorted_texts, use_cache=False))).splitlines()
    (cache,) = [" ".join(line.split()) for line in lines if line.startswith("cache")]
    assert cache == "cache none: a layer sorts the whole text anew with each token"
    assert "none: a layer sorts" not in as_text(describe(tiny("decoder", attention_patterns=["lsh:4"])))


def test_an_encoder_says_nothing_of_a_cache():
    assert "cache" not in as_text(describe(tiny("encoder", attention_patterns=["lsh:4,chunked=true,chunk=4"])))


@pytest.mark.parametrize(
    ("spec", "num_layers", "expected"),
    [
        (["full"], 3, "3 x full"),
        (["sliding_window:9", "sliding_window:9", "full"], 6, "(2 x sliding_window:9, full) x 2"),
        (["sliding_window:9", "full"] * 2 + ["sliding_window:9"], 5, "(sliding_window:9, full) x 2, sliding_window:9"),
        (["full", "sliding_window:9", "sliding_window:9"], 4, "full, 2 x sliding_window:9, full"),
    ],
)
def test_patterns_are_read_from_the_first_layer_to_the_last(spec, num_layers, expected):
    assert patterns(tiny("decoder", attention_patterns=spec, num_hidden_layers=num_layers)) == expected


def test_a_pattern_written_out_is_the_tiled_one():
    tiled, written = ["full", "sliding_window:9"], ["full", "sliding_window:9", "full", "sliding_window:9"]
    configs = [tiny("decoder", attention_patterns=spec, num_hidden_layers=4) for spec in (tiled, written)]
    assert pattern_period(configs[0]) == pattern_period(configs[1]) == tiled
    assert differences(*configs) == []


@pytest.mark.parametrize("form", ["albert-base", "qwen3-0.6b", "t5-small"])
def test_a_form_does_not_differ_from_itself(form):
    assert differences(variform.load_config(form), variform.load_config(form)) == []


def test_what_is_no_part_of_a_form_is_no_difference():
    other = variant(BERT, pad_token_id=3, dtype="float16", architectures=["X"], id2label={0: "a"}, use_cache=False)
    assert differences(BERT, other) == []


def test_one_choice_written_in_two_ways_is_no_difference():
    written = variant(tiny("encoder"), attention_scale=0.5, attention_bias=[], num_hidden_groups=2, head_act="silu")
    assert differences(tiny("encoder"), written) == []


def test_bert_and_roberta_differ_in_tables_and_epsilon():
    rows = by_field(differences(BERT, ROBERTA))
    assert {field: row.change.parameters for field, row in rows.items()} == {
        "vocab_size": (50265 - 30522) * (768 + 1),
        "type_vocab_size": -768,
        "position_offset": 2 * 768,
        "norm_eps": 0,
    }
    assert rows["vocab_size"].change.flops == 2 * 768 * (50265 - 30522)
    assert (rows["norm_eps"].a, rows["norm_eps"].b) == (1e-12, 1e-5)


def test_independent_changes_add_up_to_the_whole():
    whole = subtract(count_costs(ROBERTA, 512), count_costs(BERT, 512))
    assert total(row.change for row in differences(BERT, ROBERTA)) == whole


def test_a_window_takes_arithmetic_and_later_cache_alone():
    (row,) = differences(LLAMA, variant(LLAMA, attention_patterns=["sliding_window:512"]), length=2048)
    assert (row.field, row.a, row.b) == ("attention_patterns", ["full"], ["sliding_window:512"])
    hidden = (2048 - 512) * (2048 - 512 + 1) // 2  # (query, key) pairs out of reach
    assert row.change == Costs(0, 0, -30 * 4 * 9 * 64 * hidden / 2048, 0, -30 * 2 * 3 * 64 * 2, 0)


def test_what_follows_another_field_goes_with_it():
    """Neither form sets the embeddings' width or the groups: they are no differences of their own."""
    rows = differences(tiny("encoder"), tiny("encoder", hidden_size=24, num_hidden_layers=3))
    assert [row.field for row in rows] == ["hidden_size", "num_hidden_layers"]
    wide = tiny("encoder", hidden_size=24)
    assert rows[0].change == subtract(count_costs(wide), count_costs(tiny("encoder")))


def test_a_follower_that_one_form_sets_is_a_difference():
    rows = by_field(differences(tiny("encoder"), tiny("encoder", embedding_size=6)))
    assert (rows["embedding_size"].a, rows["embedding_size"].b) == (12, 6)


def test_a_change_that_is_refused_alone_is_said_so():
    """Six heads on two of keys and values, from three on three: no one of them allows the other alone."""
    a, b = tiny("decoder"), tiny("decoder", num_attention_heads=6, num_key_value_heads=2)
    rows = by_field(differences(a, b))
    assert rows["num_key_value_heads"].change is None
    assert rows["num_attention_heads"].change.parameters > 0
    assert "*: possible only together with others" in as_text(compare(a, b))


def test_a_pairs_fields_are_named_by_stack():
    (row,) = differences(T5, variant(T5, num_hidden_layers=3))
    assert row.field == "decoder.num_hidden_layers" and row.change.source_cache_bytes == -3 * 2 * 512 * 2


def test_a_change_that_both_stacks_share_is_one_row():
    """The vocabulary of tied embeddings, say, cannot change on one side alone."""
    sides = {"encoder": {"vocab_size": 23}, "decoder": {"vocab_size": 23}}
    (row,) = differences(tiny("encoder_decoder"), tiny("encoder_decoder", **sides))
    assert (row.field, row.change.parameters) == ("both.vocab_size", (23 - 19) * 12)


def test_an_encoder_and_a_decoder_of_the_same_fields_differ_in_shape():
    rows = differences(tiny("encoder"), tiny("decoder", classifier_pooling="mean"), length=9)
    assert [(row.field, row.a, row.b) for row in rows] == [("shape", "encoder", "decoder")]
    # Two layers of 3 heads, 4 wide; of 81 pairs the past's 45 are left
    assert rows[0].change == Costs(0, 0, -2 * 4 * 3 * 4 * (81 - 45) / 9, 96, 96, 0)


def test_a_single_stack_stands_beside_the_pairs_of_its_kind():
    single = tiny("decoder", hidden_act="relu")
    rows = by_field(differences(single, tiny("encoder_decoder", encoder={"head_dim": 6})))
    assert set(rows) == {"shape", "decoder.hidden_act"}
    assert rows["shape"].change is None


def test_a_comparison_shows_changes_and_totals():
    lines = as_text(compare(BERT, ROBERTA, ("bert-base", "roberta-base"))).splitlines()
    words = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.strip()}
    assert words["vocab_size"] == "30,522 50,265 +15.2 M +30.3 M -"
    assert words["norm_eps"] == "1e-12 1e-05 - - -"
    assert words["all"] == "together +15.2 M +30.3 M -"
    assert words["bert-base"] == "110 M 237 M 0 B"
    assert max(map(len, lines)) <= 100


def test_a_comparison_shows_the_cache_past_the_window_where_there_is_one():
    windowed = variant(LLAMA, attention_patterns=["sliding_window:512", "full"])
    lines = as_text(compare(LLAMA, windowed)).splitlines()
    assert next(line for line in lines if "past window" in line).split()[-3:] == ["cache", "past", "window"]
    assert next(line.split() for line in lines if "attention_patterns" in line)[-3:] == ["-", "-11.5", "kB"]


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, "0 "), (768, "768 "), (999.6, "1.00 k"), (12_345, "12.3 k"), (109_514_298, "110 M"), (1.5e9, "1.50 G")],
)
def test_units_have_three_digits(number, expected):
    assert units(number) == expected
    assert number == 0 or units(-number, signed=True) == f"-{expected}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "none"),
        (True, "yes"),
        ([], "none"),
        (["full", "full", "sliding_window:4"], "2 x full, sliding_window:4"),
        ({"rope_type": "default", "rope_theta": 1e4, "factor": None}, "rope_type default, rope_theta 10,000"),
        ({"full_attention": {"rope_theta": 1e4}}, "full_attention (rope_theta 10,000)"),
        (1e-12, "1e-12"),
        (30522, "30,522"),
    ],
)
def test_values_are_read_as_words(value, expected):
    assert plain(value) == expected
