"""The configs: what they derive, what they keep, and that whatever they refuse is named with its mend."""

import json
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from strategies import forms, wild_forms
from tiny import CONFIGS, build, inputs, tiny
from transformers import AutoConfig

import variform
from variform import VariformDecoderConfig, VariformEncoderConfig, VariformEncoderDecoderConfig

ROPE = {"rope_type": "default", "rope_theta": 100.0}
RELATIVE = {"position_embedding_type": "relative_bias"}
AXIAL = {"position_embedding_type": "axial"}

# (field at fault, what else the message must hold, fields of a form that are refused together)
CHOOSING = {"num_experts": 4, "router_type": "expert_choice"}
GROUPED = {"num_experts": 4, "router_type": "sigmoid_bias", "n_group": 2, "topk_group": 1}
ILLEGAL = [
    *[
        (name, "at least 1", {name: 0})
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        )
    ],
    *[
        (name, "unset to derive it", {name: -1})
        for name in ("intermediate_size", "head_dim", "num_key_value_heads", "embedding_size", "num_hidden_groups")
    ],
    ("type_vocab_size", "0 (none) or more", {"type_vocab_size": -1}),
    ("position_offset", "0 or more", {"position_offset": -1}),
    ("hidden_size", "set `head_dim`", {"hidden_size": 13, "head_dim": None}),
    ("num_key_value_heads", "`num_attention_heads=3`", {"num_key_value_heads": 2}),
    ("num_hidden_groups", "`num_hidden_layers=2`", {"num_hidden_groups": 3}),
    ("num_hidden_groups", "one pattern", {"num_hidden_groups": 1, "attention_patterns": ["full", "sliding_window:2"]}),
    ("skip_first_norm", "`num_hidden_groups=1`", {"num_hidden_groups": 1, "skip_first_norm": True}),
    *[(name, "Did you mean 'gelu'?", {name: "gellu"}) for name in ("hidden_act", "pooler_act", "head_act")],
    *[(f"{name}_dropout", "[0, 1)", {f"{name}_dropout": 1.0}) for name in ("hidden", "attention", "activation")],
    ("classifier_dropout", "[0, 1)", {"classifier_dropout": -0.1}),
    ("layerdrop", "[0, 1)", {"layerdrop": 1.0}),
    ("label_smoothing", "[0, 1)", {"label_smoothing": 1.0}),
    ("z_loss_coef", "0 (off) or more", {"z_loss_coef": -1}),
    ("num_experts", "0 (none) or more", {"num_experts": -1}),
    ("num_experts", "2 or more, or leave them dense", {"mlp_layer_types": ["sparse"]}),
    ("num_experts", "name one, or drop it", {"num_experts": 2, "mlp_layer_types": ["dense"]}),
    ("mlp_layer_types", "Did you mean 'sparse'?", {"num_experts": 2, "mlp_layer_types": ["sparce"]}),
    ("mlp_layer_types", "is empty", {"mlp_layer_types": []}),
    (
        "num_hidden_groups",
        "one type",
        {"num_hidden_groups": 1, "num_experts": 2, "mlp_layer_types": ["dense", "sparse"]},
    ),
    ("num_experts_per_tok", "`num_experts=4`", {"num_experts": 4, "num_experts_per_tok": 5}),
    ("num_experts_per_tok", "`num_experts=4`", {"num_experts": 4, "num_experts_per_tok": 0}),
    ("moe_intermediate_size", "at least 1", {"num_experts": 4, "moe_intermediate_size": 0}),
    ("num_shared_experts", "0 (none) or more", {"num_experts": 4, "num_shared_experts": -1}),
    ("shared_expert_gate", "set `num_shared_experts`", {"num_experts": 4, "shared_expert_gate": True}),
    ("router_type", "Did you mean 'softmax_topk'?", {"num_experts": 4, "router_type": "softmax_topq"}),
    ("router_type", "set it to 1", {"num_experts": 4, "router_type": "switch", "num_experts_per_tok": 2}),
    ("norm_topk_prob", "drop it", {"num_experts": 4, "router_type": "switch", "norm_topk_prob": True}),
    ("norm_topk_prob", "False", {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": True}),
    ("n_group", "leave them 1", {"num_experts": 4, "n_group": 2}),
    ("n_group", "does not divide", {"num_experts": 4, "router_type": "sigmoid_bias", "n_group": 3}),
    ("topk_group", "`n_group=2`", {"num_experts": 4, "router_type": "sigmoid_bias", "n_group": 2, "topk_group": 3}),
    ("num_experts_per_tok", "2 experts", {**GROUPED, "num_experts_per_tok": 3}),
    ("router_jitter_noise", "[0, 1)", {"num_experts": 4, "router_jitter_noise": 1.0}),
    ("expert_capacity_factor", "above 0", {"num_experts": 4, "expert_capacity_factor": 0.0}),
    ("expert_capacity", "at least 1 token", {"num_experts": 4, "expert_capacity": 0}),
    ("expert_capacity_factor", "give one", {"num_experts": 4, "expert_capacity": 1, "expert_capacity_factor": 1.0}),
    ("expert_capacity_in_eval", "drop it", {"num_experts": 4, "expert_capacity_in_eval": True}),
    *[
        (name, "0 (off) or more", {"num_experts": 4, name: -0.1})
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate")
    ],
    ("experts_layout", "is not one of ['fused', 'modulelist']", {"num_experts": 4, "experts_layout": "stacked"}),
    ("norm_placement", "Did you mean 'sandwich'?", {"norm_placement": "sandwhich"}),
    ("embedding_scale", "has a wrong type", {"embedding_scale": "root"}),
    ("qk_norm", "is not one of ['full', 'head']", {"qk_norm": "both"}),
    ("norm_eps", "above 0", {"norm_eps": 0}),
    ("initializer_range", "0 or more", {"initializer_range": -0.1}),
    *[
        (name, "null to leave it out", {name: value})
        for name in ("attn_logit_softcapping", "final_logit_softcapping", "attention_scale", "glu_limit")
        for value in (0.0, -1)
    ],
    ("glu_limit", "set `gated_mlp=True`, or leave it None", {"gated_mlp": False, "glu_limit": 7.0}),
    ("glu_offset", "set `gated_mlp=True`, or leave it 0", {"gated_mlp": False, "glu_offset": 1}),
    ("attention_bias", "'q'", {"attention_bias": ["q", "x"]}),
    ("norm_unit_offset", "norm_type", {"norm_unit_offset": True, "norm_type": "layer_norm"}),
    ("parallel_residual", "norm_placement='pre'", {"parallel_residual": True, "norm_placement": "post"}),
    ("skip_first_norm", "norm_placement='post'", {"skip_first_norm": True, "norm_placement": "post"}),
    ("attention_patterns", "at least one", {"attention_patterns": []}),
    ("attention_patterns", "Did you mean 'full'?", {"attention_patterns": ["ful"]}),
    ("attention_patterns", "'window'", {"attention_patterns": ["sliding_window"]}),
    ("attention_patterns", "at least 1 key", {"attention_patterns": ["sliding_window:0"]}),
    ("attention_patterns", "whole number", {"attention_patterns": [{"name": "sliding_window", "window": 2.5}]}),
    ("attention_patterns", "whole number", {"attention_patterns": ["sliding_window:x"]}),
    ("attention_patterns", "whole number", {"attention_patterns": ["sliding_window:true"]}),
    ("attention_patterns", "name=value", {"attention_patterns": ["dilated:3,4"]}),
    ("attention_patterns", "may have ['gap']", {"attention_patterns": ["dilated:3,gaps=2"]}),
    ("attention_patterns", "`gap=0` must be at least 1", {"attention_patterns": ["dilated:3,gap=0"]}),
    ("attention_patterns", "lists 4 numbers for 3 heads", {"attention_patterns": ["dilated:3,gap=1/2/3/4"]}),
    ("attention_patterns", "beyond `max_position_embeddings=24`", {"attention_patterns": ["dilated:9,gap=4"]}),
    ("attention_patterns", "`size=1` must be at least 2", {"attention_patterns": ["chunked:1"]}),
    ("attention_patterns", "wider than `max_position_embeddings=24`", {"attention_patterns": ["chunked:25"]}),
    ("attention_patterns", "wider than `max_position_embeddings=24`", {"attention_patterns": ["strided:25"]}),
    ("attention_patterns", "`stride=1` must be at least 2", {"attention_patterns": ["strided:1"]}),
    ("attention_patterns", "one of ['merged', 'split', 'column']", {"attention_patterns": ["strided:4,heads=all"]}),
    ("attention_patterns", "do not fit into `block=4`", {"attention_patterns": ["fixed:4,summary=3,groups=2"]}),
    ("attention_patterns", "more than there are heads, 3", {"attention_patterns": ["fixed:8,groups=4"]}),
    ("attention_patterns", "wider than `max_position_embeddings=24`", {"attention_patterns": ["big_bird:25"]}),
    ("attention_patterns", "`random=-1` must be at least 0", {"attention_patterns": ["big_bird:4,random=-1"]}),
    ("attention_patterns", "`buckets=3` must be even", {"attention_patterns": ["lsh:3"]}),
    ("attention_patterns", "`buckets=7` must be even", {"attention_patterns": ["lsh:4/7"]}),
    ("attention_patterns", "`buckets=0` must be at least 2", {"attention_patterns": ["lsh:0"]}),
    ("attention_patterns", "`buckets` is empty", {"attention_patterns": [{"name": "lsh", "buckets": []}]}),
    ("attention_patterns", "`rounds=0` must be at least 1", {"attention_patterns": ["lsh:4,rounds=0"]}),
    ("attention_patterns", "pieces of `chunked=true`", {"attention_patterns": ["lsh:4,chunk=8"]}),
    ("attention_patterns", "`chunk=25` is wider than", {"attention_patterns": ["lsh:4,chunked=true,chunk=25"]}),
    ("attention_patterns", "`before=-1` must be at least 0", {"attention_patterns": ["chunked:4,before=-1"]}),
    ("attention_patterns", "`before=3` reaches 24 tokens", {"attention_patterns": ["chunked:8,before=3"]}),
    ("attention_patterns", "`cyclic=true`", {"attention_patterns": ["chunked:8,cyclic=true"]}),
    ("attention_patterns", "`window=0` must be at least 1 key", {"attention_patterns": ["local_global:0"]}),
    ("attention_patterns", "true or false", {"attention_patterns": ["local_global:2,global_projections=3"]}),
    ("attention_patterns", "neither a string nor a dict", {"attention_patterns": [3]}),
    ("attention_patterns", "wider than `max_position_embeddings=24`", {"attention_patterns": ["sliding_window:25"]}),
    ("rope_parameters['rope_type']", "'yarn'", {"rope_parameters": {"rope_type": "ntk"}}),
    ("rope_parameters['rope_theta']", "above 0", {"rope_parameters": {**ROPE, "rope_theta": -1.0}}),
    ("rope_parameters", "factor", {"rope_parameters": {**ROPE, "rope_type": "linear"}}),
    ("rope_parameters", "high_freq_factor", {"rope_parameters": {**ROPE, "rope_type": "llama3", "factor": 2.0}}),
    (
        "rope_parameters['rope_type']",
        "4 channels",
        {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5}},
    ),
    ("head_dim", "even number", {"head_dim": 5}),
    ("partial_rotary_factor", "even number", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.3}}),
    ("partial_rotary_factor", "even number", {"rope_parameters": {**ROPE, "partial_rotary_factor": 3.0}}),
    ("position_embedding_type", "even", {"position_embedding_type": "sinusoidal", "embedding_size": 5}),
    ("hidden_size", "choose an even one", {"hidden_size": 13, "position_embedding_type": "transformer_xl"}),
    ("memory_length", "0 (none) or more", {"memory_length": -1}),
    ("axial_shape", "two numbers", {**AXIAL, "axial_shape": [24]}),
    ("axial_shape", "two numbers", {**AXIAL, "axial_shape": [24, 0]}),
    ("axial_shape", "larger tables", {**AXIAL, "axial_shape": [4, 5]}),
    ("axial_dims", "`embedding_size=12`", {**AXIAL, "axial_dims": [5, 6]}),
    ("residual_streams", "1 or 2", {"residual_streams": 3}),
    ("residual_streams", "`norm_placement='pre'`", {"residual_streams": 2, "norm_placement": "post"}),
    ("residual_streams", "drop one of them", {"residual_streams": 2, "parallel_residual": True}),
    ("relative_attention_num_buckets", "2 or more", {**RELATIVE, "relative_attention_num_buckets": 1}),
    ("relative_attention_max_distance", "above", {**RELATIVE, "relative_attention_max_distance": 2}),
    *[(f"{name}_token_id", "vocab_size=19", {f"{name}_token_id": 19}) for name in ("pad", "bos", "eos")],
    ("eos_token_id", "vocab_size=19", {"eos_token_id": [1, -1]}),
]


@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@pytest.mark.parametrize(("name", "mend", "fields"), ILLEGAL, ids=[f"{name}-{mend}" for name, mend, _ in ILLEGAL])
def test_an_illegal_value_is_refused_by_name(shape, name, mend, fields):
    with pytest.raises(ValueError) as error:
        tiny(shape, **fields)
    message = str(error.value)
    assert re.search(rf"`{re.escape(name)}(=|`)", message), message
    assert mend in message
    assert "\n" not in message


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize(("name", "fields"), [(name, fields) for name, _, fields in ILLEGAL[:-6:4]])
def test_an_illegal_value_is_refused_inside_a_pair(side, name, fields):
    with pytest.raises(ValueError, match=f"`{re.escape(name)}"):
        tiny("encoder_decoder", **{side: fields})


def test_experts_that_choose_are_refused_in_a_decoder():
    for shape, fields in (("decoder", CHOOSING), ("encoder_decoder", {"decoder": CHOOSING})):
        with pytest.raises(
            ValueError, match=r"`router_type='expert_choice'` .* later ones too, .* use 'softmax_topk'"
        ):
            tiny(shape, **fields)
    assert tiny("encoder_decoder", encoder=CHOOSING).encoder.router_type == "expert_choice"


def test_capacity_in_evaluation_and_a_cache_are_refused_together():
    fields = {"num_experts": 4, "expert_capacity_factor": 1.0, "expert_capacity_in_eval": True}
    with pytest.raises(ValueError, match=r"`use_cache=True`: .* set one of them to False"):
        tiny("decoder", **fields)
    with pytest.raises(ValueError, match=r"`expert_capacity_in_eval=True` is for decoders"):
        tiny("encoder", **fields)
    assert tiny("decoder", **fields, use_cache=False).routes_by_row


@pytest.mark.parametrize("name", ["router_aux_loss_coef", "router_z_loss_coef"])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_the_losses_of_routers_belong_to_the_pair(side, name):
    experts = {"num_experts": 4}
    with pytest.raises(ValueError, match=f"`{side}.{name}=0.5` belongs to the pair"):
        tiny("encoder_decoder", **{side: {**experts, name: 0.5}})
    config = tiny("encoder_decoder", **{side: experts, name: 0.5})
    assert getattr(type(config).from_dict(config.to_dict()), name) == 0.5
    assert tiny("encoder_decoder", **{side: experts}).router_aux_loss_coef == 0.01
    assert tiny("encoder_decoder").router_aux_loss_coef == 0.0


def test_a_pooler_in_a_decoder_is_refused():
    for fields in ({"pooler": True}, {"decoder": {"pooler": True}}):
        with pytest.raises(ValueError, match=r"`pooler=True` is for encoders; .*`classifier_transform=True`"):
            tiny("encoder_decoder" if "decoder" in fields else "decoder", **fields)


def test_a_memory_in_an_encoder_is_refused():
    for fields in ({"memory_length": 4}, {"encoder": {"memory_length": 4}}):
        with pytest.raises(ValueError, match=r"`memory_length=4` is for decoders: .* drop it"):
            tiny("encoder_decoder" if "encoder" in fields else "encoder", **fields)


def test_a_memory_with_rope_by_layer_type_is_refused():
    with pytest.raises(ValueError, match=r"`memory_length=4` makes all layers of one type .*`rope_parameters`"):
        tiny("decoder", memory_length=4, rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE})


def test_two_streams_are_refused_with_tied_embeddings_and_beside_an_encoder():
    for shape in ("encoder", "decoder"):
        with pytest.raises(ValueError, match=r"`residual_streams=2` gives .* set `tie_word_embeddings=False`"):
            tiny(shape, residual_streams=2)
    with pytest.raises(ValueError, match=r"`decoder.residual_streams=2` .* use 1"):
        tiny("encoder_decoder", decoder={"residual_streams": 2})
    assert tiny("encoder_decoder", encoder={"residual_streams": 2}).encoder.output_size == 24


def test_a_chain_of_chunks_in_a_decoder_has_no_first_that_sees_the_last():
    with pytest.raises(ValueError, match=r"`cyclic=true` shows the first chunk the last one, which is its future"):
        tiny("decoder", attention_patterns=["chunked:4,before=1,cyclic=true"])


def test_sorted_texts_in_a_decoder_are_refused_with_a_cache_or_a_memory():
    sorted_texts = {"attention_patterns": ["lsh:4,chunked=true,chunk=4"]}
    with pytest.raises(
        ValueError, match=r"`use_cache=True`: `attention_patterns` .* set it to False, or use `chunked=false`"
    ):
        tiny("decoder", **sorted_texts)
    with pytest.raises(
        ValueError, match=r"`memory_length=4`: `attention_patterns` .* drop it, or use `chunked=false`"
    ):
        tiny("decoder", **sorted_texts, use_cache=False, memory_length=4)
    with pytest.raises(ValueError, match=r"`use_cache=True`: the decoder's `attention_patterns`"):
        tiny("encoder_decoder", decoder={**sorted_texts, "use_cache": False})
    assert not tiny("encoder_decoder", decoder=sorted_texts, use_cache=False).decoder.use_cache
    assert tiny("encoder", **sorted_texts).use_cache


@pytest.mark.parametrize("name", ["cross_attention_patterns", "cross_attention_pattern", "cross_attn_patterns"])
def test_patterns_of_cross_attention_are_refused(name):
    for fields in ({name: ["lsh:4"]}, {"decoder": {name: ["lsh:4"]}}):
        with pytest.raises(ValueError, match=f"`{name}` is not a field: cross-attention is always full"):
            tiny("encoder_decoder", **fields)


def test_an_odd_number_of_buckets_is_refused_both_ways():
    with pytest.raises(ValueError, match=r"`relative_attention_num_buckets=7`.*even"):
        tiny("encoder", position_embedding_type="relative_bias", relative_attention_num_buckets=7)


def test_a_causal_window_of_one_key_is_refused():
    """transformers' sliding caches keep `window - 1` keys by slicing `[-(window - 1):]`, which for 1 is all of them."""
    with pytest.raises(ValueError, match=r"`attention_patterns` .* a causal window of 1 key.*2 or more"):
        tiny("decoder", attention_patterns=["sliding_window:1"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "12"),
        ("gated_mlp", 1),
        ("norm_type", "batch_norm"),
        ("attention_patterns", "full"),
        ("pooler_act", None),
        ("classifier_transform", 1),
        ("classifier_bias", None),
        ("head_act", 3),
        ("head_bias", "no"),
        ("origin", "bert"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value):
    with pytest.raises((ValueError, StrictDataclassError), match=f"[`']{name}"):
        tiny("decoder", **{name: value})


@given(wild_forms())
@settings(max_examples=100)
def test_any_form_is_refused_by_name_or_runs(form):
    shape, fields = form
    try:
        config = CONFIGS[shape](**fields)
    except (ValueError, StrictDataclassError) as error:
        named = re.findall(r"[`'](\w+)", str(error))
        assert set(named) & {*fields, "partial_rotary_factor"}, error
        return
    try:
        output = build(config)(inputs(2, min(5, config.max_position_embeddings), min(19, config.vocab_size + 3)) - 3)
    except ValueError as error:
        assert "outside the table" in str(error)  # the ids of a tiny vocabulary
        return
    assert output.last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("num_atention_heads", "num_attention_heads"),
        ("hidden_sizes", "hidden_size"),
        ("n_layers", None),
        ("rope_parameter", "rope_parameters"),
        ("attention_pattern", "attention_patterns"),
    ],
)
@pytest.mark.parametrize("shape", ["encoder", "decoder"])
def test_an_unknown_key_is_refused_with_the_nearest(shape, wrong, right):
    with pytest.raises(ValueError, match=f"`{wrong}` is not a field" + (f".*`{right}`" if right else "")):
        tiny(shape, **{wrong: 3})


def test_an_unknown_key_of_a_pair_is_refused():
    with pytest.raises(ValueError, match=r"`tie_embeddings` is not a field of VariformEncoderDecoderConfig"):
        VariformEncoderDecoderConfig(tie_embeddings=True)


def test_a_key_of_a_newer_release_names_the_release():
    with pytest.raises(ValueError, match=r"`num_memory_tokens`.*pip install 'variform>=99.0.0'"):
        VariformDecoderConfig(num_memory_tokens=4, variform_version="99.0.0")


@pytest.mark.parametrize(
    "given",
    [{"num_labels": 3}, {"torch_dtype": "float16"}, {"_name_or_path": "x"}, {"rope_theta": 5.0}, {"top_k": 5}],
    ids=lambda given: next(iter(given)),
)
def test_keys_of_the_platform_pass(given):
    assert tiny("decoder", **given).model_type == "variform_decoder"


class TestDerived:
    def test_a_gated_network_has_two_thirds_of_four_widths(self):
        assert VariformDecoderConfig(hidden_size=96).intermediate_size == 256
        assert VariformDecoderConfig(hidden_size=96, gated_mlp=False).intermediate_size == 384

    def test_heads_share_the_width(self):
        config = VariformDecoderConfig(hidden_size=96, num_attention_heads=6)
        assert (config.head_dim, config.num_key_value_heads, config.embedding_size) == (16, 6, 96)

    @pytest.mark.parametrize(("placement", "has_one"), [("pre", True), ("post", False), ("reordered", True)])
    def test_a_final_norm_follows_the_placement(self, placement, has_one):
        assert tiny("decoder", norm_placement=placement).final_norm is has_one

    def test_patterns_are_tiled_over_the_layers(self):
        config = tiny("decoder", attention_patterns=["sliding_window:4", "full"], num_hidden_layers=3)
        assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
        assert config.sliding_window == 4

    def test_a_memory_is_a_sliding_cache_in_every_layer(self):
        config = tiny("decoder", attention_patterns=["sliding_window:9", "full"], memory_length=4)
        assert config.layer_types == ["sliding_attention", "sliding_attention"]
        assert config.sliding_window == 5  # transformers counts the query's own key

    def test_strings_and_dicts_of_a_pattern_are_one(self):
        spellings = ["sliding_window:4", "sliding_window:window=4", {"name": "sliding_window", "window": 4}]
        configs = [tiny("decoder", attention_patterns=[spelling]) for spelling in spellings]
        assert [config.attention_patterns for config in configs] == [[{"name": "sliding_window", "window": 4}]] * 3

    def test_the_dict_that_was_given_stays_as_it_was(self):
        given = {"rope_type": "default"}
        tiny("decoder", rope_parameters=given)
        assert given == {"rope_type": "default"}

    def test_no_layer_types_are_stored(self):
        assert not {"layer_types", "sliding_window"} & tiny("decoder").to_dict().keys()


@given(forms())
@settings(max_examples=40)
def test_a_config_survives_json(form):
    shape, fields = form
    config = CONFIGS[shape](**fields)
    stored = json.loads(config.to_json_string(use_diff=False))
    assert CONFIGS[shape].from_dict(stored).to_dict() == config.to_dict()
    assert CONFIGS[shape].from_dict(json.loads(config.to_json_string(use_diff=True))).to_dict() == config.to_dict()


@pytest.mark.parametrize("shape", list(CONFIGS))
def test_a_saved_config_loads_through_auto_config_and_names_every_class(shape, tmp_path):
    config = tiny(shape)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["auto_map"] == variform.AUTO_MAP[config.model_type]
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    unlike = {"auto_map": None, "_name_or_path": None}
    assert loaded.to_dict() | unlike == config.to_dict() | unlike


@pytest.mark.parametrize("shape", list(CONFIGS))
def test_the_origin_survives_a_save(shape, tmp_path):
    origin = {"model_type": "bert", "dtype": "float16", "rope": {"theta": [1, None]}, "architectures": ["BertModel"]}
    tiny(shape, origin=origin).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).origin == origin


def test_forms_are_compared_without_their_origin():
    assert tiny("encoder", origin={"model_type": "bert"}) == tiny("encoder")
    assert tiny("encoder", pooler_act="relu") != tiny("encoder")


class TestPair:
    @pytest.mark.parametrize(("name", "value"), [("label_smoothing", 0.1), ("origin", {"model_type": "gpt2"})])
    def test_what_belongs_to_the_pair_is_refused_in_a_stack(self, name, value):
        with pytest.raises(
            ValueError, match=rf"`decoder.{name}=.* belongs to the pair: set `{name}` beside `decoder`"
        ):
            tiny("encoder_decoder", decoder={name: value})

    def test_the_ids_of_the_pair_reach_both_stacks(self):
        config = tiny("encoder_decoder", pad_token_id=3)
        assert config.encoder.pad_token_id == config.decoder.pad_token_id == 3

    def test_a_stack_of_the_wrong_kind_is_refused(self):
        with pytest.raises(ValueError, match=r"`encoder` must be a variform_encoder config"):
            VariformEncoderDecoderConfig(encoder=VariformDecoderConfig())

    def test_a_config_serves_as_a_stack(self):
        config = VariformEncoderDecoderConfig(encoder=VariformEncoderConfig(hidden_size=64))
        assert (config.encoder.hidden_size, config.decoder.hidden_size) == (64, 512)

    def test_a_start_token_outside_the_vocabulary_is_refused(self):
        with pytest.raises(ValueError, match=r"`decoder_start_token_id=19`.*`decoder.vocab_size=19`"):
            tiny("encoder_decoder", decoder_start_token_id=19)

    def test_embeddings_are_shared_when_their_shapes_agree(self):
        assert tiny("encoder_decoder").tie_encoder_decoder_embeddings
        assert not tiny("encoder_decoder", encoder={"vocab_size": 20}).tie_encoder_decoder_embeddings

    def test_sharing_embeddings_of_two_shapes_is_refused(self):
        with pytest.raises(ValueError, match=r"`tie_encoder_decoder_embeddings=True` needs equal `vocab_size`"):
            tiny("encoder_decoder", encoder={"vocab_size": 20}, tie_encoder_decoder_embeddings=True)

    def test_the_sizes_of_the_decoder_are_mirrored(self):
        config = tiny("encoder_decoder", decoder={"hidden_size": 24, "num_hidden_layers": 3})
        assert (config.hidden_size, config.num_hidden_layers) == (24, 3)
        assert config.to_dict()["hidden_size"] == 24

    def test_the_text_config_of_each_side_is_its_stack(self):
        config = tiny("encoder_decoder")
        assert config.get_text_config(encoder=True) is config.encoder
        assert config.get_text_config(decoder=True) is config.decoder
