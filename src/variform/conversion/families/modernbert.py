"""ModernBERT (arXiv:2412.13663): rope, gated layers without biases, windows in most layers."""

from typing import Any

from ..family import Family, Head, patterns, ropes, windows
from ..tables import Row

SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "norm_eps": "norm_eps",
    "norm_bias": "norm_bias",
    "hidden_act": "hidden_activation",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "head_act": "classifier_activation",
    "head_bias": "classifier_bias",
    "lm_head_bias": "decoder_bias",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "mlp_dropout",
    "classifier_dropout": "classifier_dropout",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}
FIXED: dict[str, Any] = {
    "embedding_norm": True,
    "norm_type": "layer_norm",
    "skip_first_norm": True,
    "lm_head_transform": True,
    "classifier_transform": True,
}
POOLING = {"cls": "first", "mean": "mean"}


def read(foreign) -> dict[str, Any]:
    return {
        "attention_patterns": patterns(foreign),
        "rope_parameters": ropes(foreign),
        "classifier_pooling": POOLING[foreign.classifier_pooling],
    }


def write(form) -> dict[str, Any]:
    types, window = windows(form)
    values = {
        "layer_types": types,
        "rope_parameters": {name: form.rope_parameters_of(name) for name in ("full_attention", "sliding_attention")},
        "classifier_pooling": "mean" if form.classifier_pooling == "mean" else "cls",
        "classifier_activation": form.head_act or form.hidden_act,
        "classifier_bias": form.mlp_bias if form.head_bias is None else form.head_bias,
    }
    # The native window is that of both sides together
    return values if window is None else values | {"local_attention": 2 * window}


def rows(form) -> list[Row]:
    layer, ours = "layers.{i}", "layers.{i}"
    return [
        Row("embeddings.tok_embeddings.weight", "embed_tokens.weight"),
        Row("embeddings.norm.{p}", "embeddings.norm.{p}"),
        Row(f"{layer}.attn_norm.{{p}}", f"{ours}.attention_residual.input_norm.{{p}}"),
        Row(f"{layer}.attn.Wqkv.{{p}}", tuple(f"{ours}.self_attn.{n}_proj.{{p}}" for n in "qkv"), ("split",)),
        Row(f"{layer}.attn.Wo.{{p}}", f"{ours}.self_attn.o_proj.{{p}}"),
        Row(f"{layer}.mlp_norm.{{p}}", f"{ours}.mlp_residual.input_norm.{{p}}"),
        Row(f"{layer}.mlp.Wi.{{p}}", (f"{ours}.mlp.gate_proj.{{p}}", f"{ours}.mlp.up_proj.{{p}}"), ("split",)),
        Row(f"{layer}.mlp.Wo.{{p}}", f"{ours}.mlp.down_proj.{{p}}"),
        Row("final_norm.{p}", "norm.{p}"),
    ]


def head_rows(transform: str, foreign: str, ours: str) -> list[Row]:
    return [
        Row("head.dense.{p}", f"{transform}.dense.{{p}}"),
        Row("head.norm.{p}", f"{transform}.norm.{{p}}"),
        Row(f"{foreign}.{{p}}", f"{ours}.{{p}}"),
    ]


CLASSIFIER = head_rows("classifier.transform", "classifier", "classifier.out_proj")
ANSWERS = head_rows("qa_outputs.transform", "classifier", "qa_outputs.out_proj")


FAMILY = Family(
    model_type="modernbert",
    shape="variform_encoder",
    same=SAME,
    fixed=FIXED,
    read=read,
    write=write,
    inert=frozenset(
        [
            "local_attention",
            "deterministic_flash_attn",
            "sparse_prediction",
            "sparse_pred_ignore_index",
            "cls_token_id",
            "sep_token_id",
            "initializer_cutoff_factor",
        ]
    ),
    in_training=frozenset({"embedding_dropout"}),
    rows=rows,
    prefix="model.",
    heads={
        "AutoModel": Head("ModernBertModel"),
        "AutoModelForMaskedLM": Head("ModernBertForMaskedLM", head_rows("head_transform", "decoder", "lm_head")),
        "AutoModelForSequenceClassification": Head("ModernBertForSequenceClassification", CLASSIFIER),
        "AutoModelForTokenClassification": Head("ModernBertForTokenClassification", CLASSIFIER),
        "AutoModelForQuestionAnswering": Head("ModernBertForQuestionAnswering", ANSWERS),
        "AutoModelForMultipleChoice": Head("ModernBertForMultipleChoice", CLASSIFIER),
    },
)
