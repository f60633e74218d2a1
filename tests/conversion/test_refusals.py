"""What cannot be converted is refused, in words that name what stands in the way."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from native_models import config_class, random_config, random_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import build, tiny
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import variform
from variform.conversion import FAMILIES
from variform.conversion.convert import convert_folder, from_hf, to_hf
from variform.conversion.family import LANGUAGE_MODELS

LABELS = "AutoModelForSequenceClassification"
ROPE = {"rope_type": "default", "rope_theta": 100.0}
SPARSE = "local_global:4,global_projections=true"
HASHED = "lsh:8,chunked=true,chunk=4"
GROUPED = {"hidden_size": 12, "embedding_size": 12, "head_dim": 4, "num_attention_heads": 3, "num_key_value_heads": 1}


def form_of(model_type: str, changes: dict[str, Any], auto_class: str) -> PreTrainedConfig:
    """A form of a family, with other values for some fields; those of a stack are called `encoder.hidden_size`."""
    form = FAMILIES[model_type].read_form(random_config(model_type, 0), auto_class)
    values = form.to_dict()
    for name, value in changes.items():
        stack, _, inner = name.rpartition(".")
        (values[stack] if stack else values)[inner] = value
    return type(form)(**values)


def language_model(model_type: str) -> str:
    return next(name for name in FAMILIES[model_type].heads if name in LANGUAGE_MODELS)


# (family, what the form has instead, the field that is named, Auto class if not the language model's)
INEXPRESSIBLE = [
    (
        "bert",
        {"position_embedding_type": "rope", **GROUPED, "num_key_value_heads": 3, "rope_parameters": ROPE},
        "position_embedding_type",
    ),
    ("bert", {"norm_type": "rms_norm"}, "norm_type"),
    ("bert", {"attention_patterns": ["sliding_window:4"]}, "attention_patterns"),
    ("bert", {"gated_mlp": True}, "gated_mlp"),
    ("bert", GROUPED, "num_key_value_heads"),
    ("bert", {"pooler": False}, "pooler", "AutoModel"),
    ("bert", {"classifier_pooling": "mean"}, "classifier_pooling", LABELS),
    ("roberta", {"head_act": "tanh"}, "head_act"),
    ("roberta", {"position_offset": 7}, "position_offset"),
    ("roberta", {"lm_head_transform": False}, "lm_head_transform"),
    ("distilbert", {"type_vocab_size": 2}, "type_vocab_size"),
    ("distilbert", {"norm_eps": 1e-5}, "norm_eps"),
    ("distilbert", {"pooler_act": "tanh"}, "pooler_act", LABELS),
    ("albert", {"mlp_bias": False}, "mlp_bias"),
    ("modernbert", {"skip_first_norm": False}, "skip_first_norm"),
    ("modernbert", {"classifier_pooling": "last"}, "classifier_pooling", LABELS),
    ("modernbert", {"attention_bias": ["q"]}, "attention_bias"),
    ("modernbert", {"attention_patterns": ["sliding_window:3", "sliding_window:2"]}, "attention_patterns"),
    ("modernbert", {"attention_patterns": ["chunked:4"]}, "attention_patterns"),
    ("modernbert", {"attention_patterns": ["dilated:3,gap=2"]}, "attention_patterns"),
    ("longformer", {"attention_patterns": ["full"]}, "attention_patterns"),
    ("longformer", {"attention_patterns": ["sliding_window:4"]}, "attention_patterns"),
    ("longformer", {"attention_patterns": ["local_global:4"]}, "attention_patterns"),
    ("longformer", {"attention_patterns": [f"{SPARSE},tokens=1"]}, "attention_patterns"),
    ("longformer", {"attention_patterns": [SPARSE]}, "attention_patterns", LABELS),
    # Which its class reads and cannot run
    ("longformer", {"attention_patterns": [SPARSE.replace("4", "1")]}, "attention_patterns"),
    ("longformer", {"attention_patterns": [SPARSE, SPARSE.replace("4", "3")]}, "attention_patterns"),
    ("longformer", {"attention_patterns": [f"{SPARSE},tokens=2"]}, "attention_patterns", LABELS),
    ("longformer", {"position_offset": 0}, "position_offset"),
    ("big_bird", {"attention_patterns": ["big_bird:4,random=1"]}, "attention_patterns"),
    ("big_bird", {"attention_patterns": ["big_bird:4,placement=first", "full"]}, "attention_patterns"),
    ("big_bird", {"attention_patterns": ["big_bird:4,placement=first,random=0"]}, "attention_patterns"),
    ("big_bird", {"attention_patterns": ["strided:4"]}, "attention_patterns"),
    ("big_bird", {"attention_bias": ["q"]}, "attention_bias"),
    ("big_bird", {"embedding_scale": 2.0}, "embedding_scale"),
    ("big_bird", {"pooler_act": "sigmoid"}, "pooler_act", LABELS),
    ("big_bird", {"pooler_act": "sigmoid"}, "pooler_act", "AutoModel"),
    ("gpt2", GROUPED, "num_key_value_heads"),
    ("gpt2", {"attention_scale": 0.3}, "attention_scale"),
    ("gpt2", {"position_embedding_type": "alibi"}, "position_embedding_type"),
    ("gpt2", {"lm_head_bias": True}, "lm_head_bias"),
    ("llama", {"norm_placement": "post"}, "norm_placement"),
    ("llama", {"norm_placement": "reordered"}, "norm_placement"),
    ("llama", {"attention_patterns": ["sliding_window:4", "full"]}, "attention_patterns"),
    ("llama", {"qk_norm": "head"}, "qk_norm"),
    ("llama", {"attention_sinks": True}, "attention_sinks"),
    ("llama", {"attention_bias": ["q", "k", "v"]}, "attention_bias"),
    ("llama", {"gated_mlp": False}, "gated_mlp"),
    ("llama", {"glu_limit": 7.0}, "glu_limit"),
    ("llama", GROUPED | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "rope_parameters"),
    ("llama", {"position_embedding_type": "none"}, "position_embedding_type"),
    ("llama", {"embedding_scale": "sqrt"}, "embedding_scale"),
    ("llama", {"embedding_size": 5}, "embedding_size"),
    ("llama", {"layer_scale_init": 0.1}, "layer_scale_init"),
    ("llama", {"parallel_residual": True}, "parallel_residual"),
    ("llama", {"final_norm": False}, "final_norm"),
    ("llama", {"num_hidden_groups": 1}, "num_hidden_groups"),
    ("llama", {"logit_scale": 0.5}, "logit_scale"),
    ("llama", {"final_logit_softcapping": 5.0}, "final_logit_softcapping"),
    ("llama", {"classifier_bias": True}, "classifier_bias", LABELS),
    ("llama", {"classifier_transform": True}, "classifier_transform", LABELS),
    ("mistral", {"attention_patterns": ["sliding_window:4", "full"]}, "attention_patterns"),
    ("mistral", {"attention_patterns": ["sliding_window:4", "sliding_window:3"]}, "attention_patterns"),
    ("mistral", {"attention_patterns": ["chunked:4"]}, "attention_patterns"),
    ("mistral", {"attention_patterns": ["full"], "memory_length": 3}, "memory_length"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("llama", {"num_experts": 2}, "num_experts"),
    ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("mixtral", {"mlp_layer_types": ["sparse", "dense"]}, "mlp_layer_types"),
    ("mixtral", {"num_shared_experts": 1}, "num_shared_experts"),
    ("mixtral", {"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
    ("mixtral", {"router_type": "sigmoid_bias"}, "router_type"),
    ("mixtral", {"expert_capacity_factor": 1.25}, "expert_capacity_factor"),
    ("mixtral", {"gated_mlp": False}, "gated_mlp"),
    ("mixtral", {"mlp_bias": True}, "mlp_bias"),
    ("mixtral", {"glu_offset": 1.0}, "glu_offset"),
    ("mixtral", {"router_bias": True}, "router_bias"),
    ("gpt_oss", {"glu_limit": None}, "glu_limit"),
    ("gpt_oss", {"glu_offset": 0.0}, "glu_offset"),
    ("gpt_oss", {"hidden_act": "silu"}, "hidden_act"),
    ("gpt_oss", {"mlp_bias": False}, "mlp_bias"),
    ("gpt_oss", {"router_bias": False}, "router_bias"),
    ("gpt_oss", {"router_type": "sigmoid_bias"}, "router_type"),
    ("gpt_oss", {"attention_sinks": False}, "attention_sinks"),
    ("gpt_oss", {"attention_bias": ["q", "k", "v"]}, "attention_bias"),
    ("gpt_oss", {"attention_patterns": ["sliding_window:4", "sliding_window:3"]}, "attention_patterns"),
    ("qwen3_moe", {"num_shared_experts": 1}, "num_shared_experts"),
    ("qwen3_moe", {"router_type": "sigmoid_bias"}, "router_type"),
    ("qwen3_moe", {"attention_patterns": ["sliding_window:4", "full"]}, "attention_patterns"),
    ("qwen3_moe", {"attention_bias": ["q", "k", "v"]}, "attention_bias"),
    ("qwen3_moe", {"qk_norm": "full"}, "qk_norm"),
    ("qwen2_moe", {"shared_expert_gate": False}, "shared_expert_gate"),
    ("qwen2_moe", {"num_shared_experts": 0, "shared_expert_gate": False}, "num_shared_experts"),
    ("qwen2_moe", {"attention_bias": True}, "attention_bias"),
    ("olmoe", {"qk_norm": None}, "qk_norm"),
    ("olmoe", {"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types"),
    ("olmoe", {"head_dim": 2}, "head_dim"),
    ("qwen2", {"attention_patterns": ["sliding_window:4", "sliding_window:3"]}, "attention_patterns"),
    ("qwen3", {"attention_patterns": ["sliding_window:4", "chunked:4"]}, "attention_patterns"),
    ("qwen3", {"attention_patterns": ["local_global:4,tokens=1"]}, "attention_patterns"),
    ("qwen3", {"attention_patterns": ["prefix_lm"]}, "attention_patterns"),
    ("qwen2", {"attention_bias": False}, "attention_bias"),
    ("qwen3", {"qk_norm": "full"}, "qk_norm"),
    ("qwen3", {"mlp_bias": True}, "mlp_bias"),
    (
        "gemma2",
        {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE | {"rope_theta": 10.0}}},
        "rope_parameters",
    ),
    ("gemma2", {"attention_patterns": ["sliding_window:4", "sliding_window:3"]}, "attention_patterns"),
    ("gemma3_text", {"attention_patterns": ["sliding_window:4", "sliding_window:3"]}, "attention_patterns"),
    ("gemma3_text", {"attention_patterns": ["full", "fixed:4"]}, "attention_patterns"),
    ("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping"),
    ("gemma3_text", {"norm_unit_offset": False}, "norm_unit_offset"),
    ("gemma3_text", {"position_embedding_type": "none"}, "position_embedding_type"),
    ("gemma3_text", {"attention_scale": 2.0}, "attention_scale"),
    ("gemma3_text", {"attention_scale": 0.3}, "attention_scale"),  # the foreign field is a whole number
    (
        "switch_transformers",
        {"encoder.router_type": "softmax_topk", "encoder.norm_topk_prob": False},
        "encoder.router_type",
    ),
    ("switch_transformers", {"encoder.mlp_layer_types": ["sparse", "dense"]}, "encoder.mlp_layer_types"),
    (
        "switch_transformers",
        {"encoder.expert_capacity": None, "encoder.expert_capacity_factor": 1.25},
        "encoder.expert_capacity_factor",
    ),
    (
        "switch_transformers",
        {"decoder.expert_capacity_in_eval": True, "decoder.use_cache": False, "use_cache": False},
        "decoder.expert_capacity_in_eval",
    ),
    ("switch_transformers", {"encoder.num_experts": 7}, "decoder.num_experts"),
    ("switch_transformers", {"encoder.router_bias": True, "decoder.router_bias": False}, "decoder.router_bias"),
    ("switch_transformers", {"encoder.num_shared_experts": 1}, "encoder.num_shared_experts"),
    ("t5", {"encoder.attention_bias": True}, "encoder.attention_bias"),
    ("t5", {"decoder.logit_scale": 0.5}, "decoder.logit_scale"),
    (
        "t5",
        {"decoder.hidden_size": 30, "decoder.embedding_size": 30, "tie_encoder_decoder_embeddings": False},
        "decoder.hidden_size",
    ),
    ("t5", {"tie_encoder_decoder_embeddings": False}, "tie_encoder_decoder_embeddings"),
    ("mt5", {"decoder.logit_scale": 0.5}, "decoder.logit_scale"),
    ("bart", {"encoder.position_embedding_type": "none"}, "encoder.position_embedding_type"),
    ("bart", {"decoder.norm_eps": 1e-6}, "decoder.norm_eps"),
    ("bart", {"tie_word_embeddings": True, "tie_encoder_decoder_embeddings": False}, "tie_encoder_decoder_embeddings"),
    ("led", {"encoder.attention_patterns": ["full"]}, "encoder.attention_patterns"),
    ("led", {"decoder.attention_patterns": ["sliding_window:4"]}, "decoder.attention_patterns"),
    ("led", {"decoder.position_offset": 2}, "decoder.position_offset"),
    ("led", {"encoder.embedding_scale": "sqrt"}, "encoder.embedding_scale"),
    ("bart", {"encoder.attention_patterns": [SPARSE]}, "encoder.attention_patterns"),
    ("pegasus", {"decoder.norm_placement": "sandwich"}, "decoder.norm_placement"),
    ("pegasus", {"encoder.sinusoidal_layout": "interleaved"}, "encoder.sinusoidal_layout"),
    ("marian", {"encoder.embedding_norm": True}, "encoder.embedding_norm"),
    ("reformer", {"residual_streams": 1}, "residual_streams"),
    ("reformer", {"attention_patterns": ["lsh:4"]}, "attention_patterns"),
    ("reformer", {"attention_patterns": ["full"]}, "attention_patterns"),
    ("reformer", {"attention_bias": ["o"]}, "attention_bias"),
    ("reformer", {"position_embedding_type": "sinusoidal"}, "position_embedding_type"),
    ("reformer_encoder", {"attention_patterns": ["lsh:4,chunked=true,chunk=4", HASHED]}, "attention_patterns"),
    ("reformer_encoder", {"attention_patterns": ["chunked:4,before=1"]}, "attention_patterns"),
    ("reformer_encoder", {"pooler": True}, "pooler", "AutoModel"),
    ("reformer_encoder", {"final_norm": False}, "final_norm"),
]


@pytest.mark.parametrize("refused", INEXPRESSIBLE, ids=lambda refused: f"{refused[0]}-{refused[2]}")
def test_to_hf_names_what_a_family_cannot_express(refused):
    model_type, changes, field, *auto_class = refused
    auto_class = auto_class[0] if auto_class else language_model(model_type)
    model = build(form_of(model_type, changes, auto_class), getattr(hf, auto_class))
    native = FAMILIES[model_type].model_type
    with pytest.raises(ValueError, match=rf"^{native} cannot express `{field}="):
        to_hf(model, native)


def test_sizes_that_no_foreign_config_can_have_are_refused():
    sizes = {
        "hidden_size": 13,
        "embedding_size": 13,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 4,
    }
    with pytest.raises(ValueError, match=r"^bert cannot express this form: .*hidden"):
        to_hf(build(form_of("bert", sizes, "AutoModel")), "bert")


def test_a_form_without_experts_is_no_mixtral():
    with pytest.raises(ValueError, match=r"^mixtral cannot express this form: `num_experts=0`"):
        to_hf(build(tiny("decoder"), AutoModelForCausalLM), "mixtral")


# (family, foreign fields, the field that is named)
FOREIGN = [
    ("bert", {"is_decoder": True}, "is_decoder"),
    ("roberta", {"is_decoder": True, "add_cross_attention": True}, "is_decoder"),
    ("albert", {"inner_group_num": 2}, "inner_group_num"),
    ("big_bird", {"is_decoder": True, "attention_type": "original_full"}, "is_decoder"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    # The native class passes over this field, and ours would not
    ("llama", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "rope_parameters"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
    ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha"),
    ("switch_transformers", {"router_dtype": "bfloat16"}, "router_dtype"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("reformer", {"lsh_num_chunks_before": 2}, "lsh_num_chunks_before"),
    ("reformer", {"attn_layers": ["local"], "local_num_chunks_before": 2}, "local_num_chunks_before"),
    ("reformer_encoder", {"lsh_num_chunks_after": 1}, "lsh_num_chunks_after"),
    ("reformer_encoder", {"local_num_chunks_after": 1}, "local_num_chunks_after"),
]


@pytest.mark.parametrize(("model_type", "fields", "field"), FOREIGN, ids=[f"{case[0]}-{case[2]}" for case in FOREIGN])
def test_from_hf_names_a_feature_that_is_not_carried(model_type, fields, field):
    values = random_config(model_type, 0).to_dict() | fields
    native = FAMILIES[model_type].foreign_class("AutoModel")(config_class(model_type)(**values))
    with pytest.raises(ValueError, match=rf"^{native.config.model_type}: Variform does not carry `{field}="):
        from_hf(native)


def test_shared_experts_of_a_width_of_their_own_are_refused():
    values = random_config("qwen2_moe", 0).to_dict() | {
        "moe_intermediate_size": 4,
        "shared_expert_intermediate_size": 6,
    }
    with pytest.raises(ValueError, match=r"^qwen2_moe: `shared_expert_intermediate_size=6` must be a multiple of"):
        from_hf(hf.Qwen2MoeModel(hf.Qwen2MoeConfig(**values)))


def test_the_weight_of_a_single_expert_that_is_always_1_is_refused():
    native = hf.MixtralModel(hf.MixtralConfig(**random_config("mixtral", 0).to_dict() | {"num_experts_per_tok": 1}))
    with pytest.raises(
        ValueError, match=r"`norm_topk_prob=True` makes the weight of `num_experts_per_tok=1` always 1"
    ):
        from_hf(native)


def test_buckets_that_the_first_text_would_choose_are_refused():
    values = random_config("reformer", 0).to_dict() | {"attn_layers": ["lsh"], "num_buckets": None}
    with pytest.raises(ValueError, match=r"^reformer: `num_buckets=None` .* set it, to an even number"):
        from_hf(hf.ReformerModel(hf.ReformerConfig(**values)))


def test_a_form_goes_to_the_shape_that_its_family_has_of_it():
    for name in ("reformer", "reformer_encoder"):
        native = to_hf(build(form_of(name, {}, "AutoModel")), "reformer")
        assert type(native) is hf.ReformerModel and native.config.is_decoder == (name == "reformer")


def test_a_projection_between_equal_widths_is_refused_both_ways():
    """ALBERT has one there, and no form of ours."""
    values = random_config("albert", 0).to_dict() | {"embedding_size": random_config("albert", 0).hidden_size}
    with pytest.raises(ValueError, match=r"^albert: `embedding_size=\d+` must differ from `hidden_size`"):
        from_hf(hf.AlbertModel(hf.AlbertConfig(**values)))
    ours = build(form_of("albert", {"embedding_size": values["hidden_size"]}, "AutoModel"))
    with pytest.raises(ValueError, match=r"^albert cannot express this form: .*`embedding_size="):
        to_hf(ours, "albert")


def native_model(model_type: str, auto_class: str = "AutoModel") -> PreTrainedModel:
    return random_model(FAMILIES[model_type].foreign_class(auto_class), random_config(model_type, 0), 0)


def test_an_unknown_family_is_refused_with_those_that_are_known():
    config = hf.OPTConfig(
        vocab_size=19, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=8
    )
    with pytest.raises(ValueError, match=r"`model_type='opt'` is not one of \['albert', 'bart', 'bert'"):
        from_hf(hf.OPTModel(config))


MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def pack_experts(folder: Path) -> None:
    """Gives a folder random experts as gpt-oss was published: blocks of 32 numbers of 4 bits, and a scale each."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": MXFP4}))
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = state.pop(name).shape
        state[f"{name}_blocks"] = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        state[f"{name}_scales"] = torch.randint(119, 126, (experts, outputs, inputs // 32), dtype=torch.uint8)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def test_quantised_checkpoints_are_refused_with_a_mend_that_works(tmp_path):
    """transformers unpacks them into bfloat16."""
    sizes = {"hidden_size": 32, "intermediate_size": 32}
    config = hf.GptOssConfig(**random_config("gpt_oss", 0).to_dict() | sizes)
    random_model(hf.GptOssForCausalLM, config, 0).bfloat16().save_pretrained(tmp_path / "packed")
    pack_experts(tmp_path / "packed")
    mend = r"^The checkpoint is quantised \(mxfp4\): load it with `quantization_config=Mxfp4Config\(dequantize=True\)`, and "
    with pytest.raises(ValueError, match=mend):
        from_hf(tmp_path / "packed")
    with pytest.raises(ValueError, match=mend):
        convert_folder(tmp_path / "packed", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()

    unpacked = {"quantization_config": hf.Mxfp4Config(dequantize=True)}
    native = hf.GptOssForCausalLM.from_pretrained(tmp_path / "packed", experts_implementation="eager", **unpacked)
    native.save_pretrained(tmp_path / "unpacked", save_original_format=False)
    convert_folder(tmp_path / "unpacked", tmp_path / "ours")
    ids = torch.randint(5, 40, (2, 7))
    ours, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").float(), native.float()(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected)
    torch.testing.assert_close(from_hf(native)(ids).logits, expected)


def test_a_quantised_checkpoint_that_nothing_unpacks_is_refused(tmp_path):
    native_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ValueError, match=r"quantised \(gptq\): convert the weights that it was quantised from"):
        from_hf(tmp_path)


@pytest.mark.parametrize(
    ("config_class", "reason"),
    [
        (hf.DeepseekV2Config, "its attention compresses keys and values"),
        (hf.DeepseekV3Config, "its attention compresses keys and values"),
    ],
)
def test_a_family_that_no_form_expresses_is_refused_with_the_reason(config_class, reason):
    with torch.device("meta"):
        native = hf.AutoModelForCausalLM.from_config(config_class(num_hidden_layers=1, vocab_size=9))
    with pytest.raises(
        ValueError, match=rf"^{config_class.model_type}: Variform does not carry this family: {reason}"
    ):
        from_hf(native)


def test_a_head_without_counterpart_is_refused_and_can_be_left_behind():
    native = hf.BertForPreTraining(random_config("bert", 0)).eval()
    with pytest.raises(ValueError, match=r"class 'BertForPreTraining' has no counterpart.*`auto_class=`"):
        from_hf(native)
    masked = from_hf(native, auto_class="AutoModelForMaskedLM")
    ids = torch.randint(5, 40, (2, 7))
    torch.testing.assert_close(masked(ids).logits, native(ids).prediction_logits)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("big_bird", "BigBirdForQuestionAnswering"),
        ("big_bird", "BigBirdForPreTraining"),
        ("led", "LEDForQuestionAnswering"),
    ],
)
def test_a_head_of_a_sparse_family_without_counterpart_is_refused(model_type, name):
    native = getattr(hf, name)(random_config(model_type, 0))
    with pytest.raises(ValueError, match=rf"class '{name}' has no counterpart: of {model_type}, Variform has"):
        from_hf(native)


@pytest.mark.parametrize("auto_class", ["AutoModelForQuestionAnswering", "AutoModelForMultipleChoice"])
def test_longformers_search_for_separators_is_left_behind_with_a_warning(auto_class, caplog):
    with caplog.at_level(logging.WARNING):
        FAMILIES["longformer"].read_form(random_config("longformer", 0), auto_class)
    assert "marks tokens as global by the separators in a text; here, say which" in caplog.text


def test_adapters_are_refused_until_they_are_merged():
    native = native_model("llama", "AutoModelForCausalLM")
    wrapped = get_peft_model(native, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    for model in (wrapped, native):
        with pytest.raises(ValueError, match=r"LoRA adapters: call `merge_and_unload\(\)`"):
            from_hf(model)
    ids = torch.randint(5, 40, (2, 7))
    expected = wrapped(ids).logits
    torch.testing.assert_close(from_hf(wrapped.merge_and_unload())(ids).logits, expected)


def test_ours_is_not_brought_in_and_theirs_is_not_taken_out():
    with pytest.raises(ValueError, match="is a variform_decoder already"):
        from_hf(build(tiny("decoder")))
    with pytest.raises(ValueError, match="BertModel is not a Variform model"):
        to_hf(native_model("bert"))


@pytest.mark.parametrize(
    ("shape", "auto_class", "model_type", "message"),
    [
        ("encoder", hf.AutoModel, "llama", "llama is a variform_decoder, and this form a variform_encoder"),
        ("decoder", hf.AutoModel, "opt", r"`model_type='opt'` is not one of \['albert', 'bart', 'bert'"),
        ("decoder", hf.AutoModelForQuestionAnswering, "gemma3_text", "of gemma3_text, Variform has"),
    ],
    ids=["shape", "name", "head"],
)
def test_to_hf_refuses_a_family_that_is_not_of_this_shape_or_has_no_such_head(shape, auto_class, model_type, message):
    with pytest.raises(ValueError, match=message):
        to_hf(build(tiny(shape), auto_class), model_type)


def test_a_form_of_no_family_is_told_what_stands_in_the_way_of_each():
    with pytest.raises(ValueError, match="No native family expresses this form") as refusal:
        to_hf(build(tiny("decoder", position_embedding_type="alibi"), AutoModelForCausalLM))
    families = [name for name, family in FAMILIES.items() if family.shape == "variform_decoder"]
    assert [line.split()[1] for line in str(refusal.value).splitlines()[1:]] == families


def test_whole_numbers_are_written_as_foreign_configs_want_them():
    form = form_of("gemma2", {"final_logit_softcapping": 30, "norm_eps": 1}, "AutoModelForCausalLM")
    written = FAMILIES["gemma2"].write_config(form, "AutoModelForCausalLM")
    assert (written.final_logit_softcapping, written.rms_norm_eps) == (30.0, 1.0)


@torch.no_grad()
def test_a_decoder_made_from_a_config_leaves_as_a_llama():
    ours = build(tiny("decoder", num_key_value_heads=1), AutoModelForCausalLM)
    native = to_hf(ours)
    assert type(native) is hf.LlamaForCausalLM
    ids = torch.randint(3, 19, (2, 7))
    torch.testing.assert_close(native(ids).logits, ours(ids).logits)


def test_a_preset_leaves_as_the_family_it_is_named_after():
    families = {"bert-base": "bert", "longformer-base": "longformer", "bigbird-base": "big_bird", "gpt2": "gpt2"}
    families |= {"mixtral-8x7b": "mixtral", "qwen3-30b-a3b": "qwen3_moe", "olmoe-1b-7b": "olmoe"}
    families |= {"switch-base-8": "switch_transformers", "gpt-oss-20b": "gpt_oss"}
    for name, model_type in families.items():
        form = variform.load_config(name)
        assert FAMILIES[model_type].write_config(form, language_model(model_type)).model_type == model_type


def test_what_only_training_reads_is_lost_with_a_warning(caplog):
    fields = random_config("gpt2", 0).to_dict() | {"embd_pdrop": 0.3}
    native = hf.GPT2Model(hf.GPT2Config(**fields)).eval()
    with caplog.at_level(logging.WARNING):
        ours = from_hf(native)
    assert "gpt2: `embd_pdrop=0.3`, which matters in training only" in caplog.text
    assert to_hf(ours).config.embd_pdrop == 0.3


@pytest.mark.parametrize("field", ["hidden_dropout", "layerdrop", "label_smoothing", "z_loss_coef"])
def test_what_a_family_lacks_in_training_only_is_no_obstacle(field, caplog):
    ours = build(tiny("decoder", **{field: 0.1}), AutoModelForCausalLM)
    with caplog.at_level(logging.WARNING):
        native = to_hf(ours, "llama")
    assert f"llama has no `{field}=0.1`" in caplog.text
    assert type(native) is hf.LlamaForCausalLM


@pytest.mark.parametrize("model_type", ["roberta", "longformer"])
def test_positions_after_a_padding_id_that_is_missing_are_refused(model_type):
    values = random_config(model_type, 0).to_dict() | {"pad_token_id": None}
    with pytest.raises(ValueError, match=f"{model_type}: `pad_token_id=None`"):
        FAMILIES[model_type].read_form(hf.CONFIG_MAPPING[model_type](**values), "AutoModel")
