"""Llama (arXiv:2302.13971, arXiv:2407.21783)."""

from typing import Any

from ..family import Family, Head, ropes
from ..tables import Row

SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "hidden_act": "hidden_act",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "attention_dropout": "attention_dropout",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}


def read(foreign) -> dict[str, Any]:
    # What a token classifier drops out where its config does not say
    dropout = getattr(foreign, "classifier_dropout", None)
    return {"rope_parameters": ropes(foreign), "classifier_dropout": 0.1 if dropout is None else dropout}


def write(form) -> dict[str, Any]:
    values = {"rope_parameters": form.rope_parameters_of(form.layer_types[0])}
    return values if form.classifier_dropout == 0.1 else values | {"classifier_dropout": form.classifier_dropout}


def rows(form) -> list[Row]:
    layer = "layers.{i}"
    return [
        Row("embed_tokens.weight", "embed_tokens.weight"),
        Row(f"{layer}.input_layernorm.weight", f"{layer}.attention_residual.input_norm.weight"),
        Row(f"{layer}.self_attn.{{qkv}}_proj.{{p}}", f"{layer}.self_attn.{{qkv}}_proj.{{p}}"),
        Row(f"{layer}.self_attn.{{qkv}}_norm.weight", f"{layer}.self_attn.{{qkv}}_norm.weight"),
        Row(f"{layer}.self_attn.o_proj.{{p}}", f"{layer}.self_attn.o_proj.{{p}}"),
        Row(f"{layer}.post_attention_layernorm.weight", f"{layer}.mlp_residual.input_norm.weight"),
        Row(f"{layer}.mlp.{{mlp}}_proj.{{p}}", f"{layer}.mlp.{{mlp}}_proj.{{p}}"),
        Row("norm.weight", "norm.weight"),
    ]


def heads(name: str, answers: str = "transformer.") -> dict[str, Head]:
    """The classes of Llama and its relatives, which are called the same but for the family's name.

    Args:
        answers: what stands before the names of the base model's tensors in the class that answers questions.
    """
    return {
        "AutoModel": Head(f"{name}Model"),
        "AutoModelForCausalLM": Head(f"{name}ForCausalLM", [Row("lm_head.weight", "lm_head.weight")]),
        "AutoModelForSequenceClassification": Head(
            f"{name}ForSequenceClassification",
            [Row("score.weight", "classifier.out_proj.weight")],
            fixed={"classifier_bias": False},
        ),
        "AutoModelForTokenClassification": Head(
            f"{name}ForTokenClassification", [Row("score.{p}", "classifier.out_proj.{p}")]
        ),
        "AutoModelForQuestionAnswering": Head(
            f"{name}ForQuestionAnswering", [Row("qa_outputs.{p}", "qa_outputs.{p}")], prefix=answers
        ),
    }


FAMILY = Family(
    model_type="llama",
    shape="variform_decoder",
    same=SAME,
    fixed={},
    read=read,
    write=write,
    inert=frozenset({"pretraining_tp"}),
    rows=rows,
    prefix="model.",
    heads=heads("Llama"),
    ignored=(r"(.*\.)?rotary_emb\.inv_freq",),
)
