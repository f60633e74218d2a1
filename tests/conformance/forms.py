"""The forms that are tested: each shape in styles that share as little as possible with one another."""

from harness import Family, Form

import variform

DECODER = Family(
    "decoder",
    variform.VariformDecoderConfig,
    {
        "base": variform.VariformDecoderModel,
        "causal_lm": variform.VariformDecoderForCausalLM,
        "sequence_classification": variform.VariformDecoderForSequenceClassification,
        "token_classification": variform.VariformDecoderForTokenClassification,
        "question_answering": variform.VariformDecoderForQuestionAnswering,
    },
)
ENCODER = Family(
    "encoder",
    variform.VariformEncoderConfig,
    {
        "base": variform.VariformEncoderModel,
        "masked_lm": variform.VariformEncoderForMaskedLM,
        "sequence_classification": variform.VariformEncoderForSequenceClassification,
        "token_classification": variform.VariformEncoderForTokenClassification,
        "question_answering": variform.VariformEncoderForQuestionAnswering,
        "multiple_choice": variform.VariformEncoderForMultipleChoice,
    },
)
ENCODER_DECODER = Family(
    "encoder_decoder",
    variform.VariformEncoderDecoderConfig,
    {
        "base": variform.VariformEncoderDecoderModel,
        "seq2seq_lm": variform.VariformEncoderDecoderForConditionalGeneration,
    },
)

SIZE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Layer norms, biases and a plain feed-forward: the Transformers up to 2019; the defaults are the modern ones
CLASSIC = {
    **SIZE,
    "norm_type": "layer_norm",
    "hidden_act": "gelu",
    "gated_mlp": False,
    "mlp_bias": True,
    "attention_bias": True,
}
T5 = {
    **SIZE,
    "position_embedding_type": "relative_bias",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "attention_scale": 1.0,
    "hidden_act": "relu",
    "gated_mlp": False,
}
SWITCH = {"num_experts": 4, "router_type": "switch"}
BART = {
    **CLASSIC,
    "position_embedding_type": "learned",
    "position_offset": 2,
    "norm_placement": "post",
    "embedding_norm": True,
}
MARIAN = {
    **CLASSIC,
    "position_embedding_type": "sinusoidal",
    "norm_placement": "post",
    "embedding_scale": "sqrt",
    "hidden_act": "silu",
}


def rope(theta: float, **others: float) -> dict[str, float | str]:
    return {"rope_type": "default", "rope_theta": theta, **others}


def pair(encoder: dict, decoder: dict, **fields) -> dict:
    return {"encoder": encoder, "decoder": decoder, **IDS, "decoder_start_token_id": 0, **fields}


FORMS = [
    Form("llama", DECODER, {**SIZE, **IDS, "num_key_value_heads": 2, "tie_word_embeddings": False}),
    Form("gpt2", DECODER, {**CLASSIC, **IDS, "position_embedding_type": "learned", "hidden_act": "gelu_new"}),
    Form(
        "alibi",
        DECODER,
        {
            **SIZE,
            **IDS,
            "position_embedding_type": "alibi",
            "num_key_value_heads": 2,
            "norm_placement": "sandwich",
            "qk_norm": "head",
        },
    ),
    Form(
        "bert",
        ENCODER,
        {
            **CLASSIC,
            **IDS,
            "position_embedding_type": "learned",
            "norm_placement": "post",
            "embedding_norm": True,
            "type_vocab_size": 2,
            "lm_head_transform": True,
            "lm_head_bias": True,
            "pooler": True,
            "classifier_pooling": "first",
        },
    ),
    Form(
        "modernbert",
        ENCODER,
        {
            **SIZE,
            **IDS,
            "norm_type": "layer_norm",
            "norm_bias": False,
            "embedding_norm": True,
            "skip_first_norm": True,
            "hidden_act": "gelu",
            "attention_patterns": ["full", "sliding_window:4"],
            "rope_parameters": {"full_attention": rope(160_000.0), "sliding_attention": rope(10_000.0)},
            "lm_head_transform": True,
            "classifier_transform": True,
        },
    ),
    # A cache of the last keys beside one of all, heads that differ, random blocks
    Form(
        "sparse",
        DECODER,
        {
            **SIZE,
            **IDS,
            "num_key_value_heads": 2,
            "attention_patterns": ["dilated:3,gap=1/2", "big_bird:2,random=1"],
        },
    ),
    Form(
        "longformer",
        ENCODER,
        {
            **CLASSIC,
            **IDS,
            "position_embedding_type": "learned",
            "norm_placement": "post",
            "attention_patterns": ["local_global:2,tokens=1,global_projections=true", "fixed:4"],
        },
    ),
    # T5's encoder with ALBERT's savings: one set of weights for all layers, narrow embeddings
    Form("relative_bias", ENCODER, {**T5, **IDS, "num_hidden_groups": 1, "embedding_size": 16}),
    # Each token to two experts of four, chosen with a bias of theirs, and to a shared one; a first layer without
    Form(
        "experts",
        DECODER,
        {
            **SIZE,
            **IDS,
            "num_key_value_heads": 2,
            "mlp_layer_types": ["dense", "sparse"],
            "num_experts": 4,
            "router_type": "sigmoid_bias",
            "num_shared_experts": 1,
            "moe_intermediate_size": 16,
        },
    ),
    Form("t5", ENCODER_DECODER, pair(T5, T5)),
    Form(
        "switch",
        ENCODER_DECODER,
        pair({**T5, **SWITCH}, {**T5, **SWITCH}),
        exclude={
            "test_moe_models_record_router_logits": "Switch Transformers' names: encoder_router_logits, decoder_router_logits"
        },
    ),
    Form("bart", ENCODER_DECODER, pair(BART, BART)),
    Form("marian", ENCODER_DECODER, pair(MARIAN, MARIAN)),
    Form(
        "rope_pair",
        ENCODER_DECODER,
        pair(
            {**SIZE, "attention_patterns": ["sliding_window:4"]},
            {
                **SIZE,
                "hidden_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "qk_norm": "head",
                "rope_parameters": rope(10_000.0, partial_rotary_factor=0.5),
            },
            tie_encoder_decoder_embeddings=False,
        ),
    ),
]
