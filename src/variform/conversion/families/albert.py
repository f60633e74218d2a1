"""ALBERT (arXiv:1909.11942): BERT whose layers share their weights, with narrow token embeddings."""

from dataclasses import replace
from typing import Any

from ..family import Head
from ..tables import Row
from . import bert


def rows(form) -> list[Row]:
    group, ours = "encoder.albert_layer_groups.{i}.albert_layers.0", "layers.{i}"
    return [
        *bert.embedding_rows(),
        Row("encoder.embedding_hidden_mapping_in.{p}", "embeddings.projection.{p}"),
        Row(f"{group}.attention.query.{{p}}", f"{ours}.self_attn.q_proj.{{p}}"),
        Row(f"{group}.attention.key.{{p}}", f"{ours}.self_attn.k_proj.{{p}}"),
        Row(f"{group}.attention.value.{{p}}", f"{ours}.self_attn.v_proj.{{p}}"),
        Row(f"{group}.attention.dense.{{p}}", f"{ours}.self_attn.o_proj.{{p}}"),
        Row(f"{group}.attention.LayerNorm.{{p}}", f"{ours}.attention_residual.output_norm.{{p}}"),
        Row(f"{group}.ffn.{{p}}", f"{ours}.mlp.up_proj.{{p}}"),
        Row(f"{group}.ffn_output.{{p}}", f"{ours}.mlp.down_proj.{{p}}"),
        Row(f"{group}.full_layer_layer_norm.{{p}}", f"{ours}.mlp_residual.output_norm.{{p}}"),
        Row("pooler.{p}", "pooler.dense.{p}"),
    ]


def read(foreign) -> dict[str, Any]:
    if foreign.embedding_size == foreign.hidden_size:
        # Theirs projects even then; ours has a projection where the widths differ
        raise ValueError(f"albert: `embedding_size={foreign.embedding_size}` must differ from `hidden_size`.")
    return {}


def write(form) -> dict[str, Any]:
    return {"num_hidden_groups": form.num_hidden_groups or form.num_hidden_layers}


SAME = bert.SAME | {
    "embedding_size": "embedding_size",
    "num_hidden_groups": "num_hidden_groups",
    "classifier_dropout": "classifier_dropout_prob",
}

FAMILY = replace(
    bert.FAMILY,
    model_type="albert",
    same=SAME,
    read=read,
    write=write,
    rows=rows,
    prefix="albert.",
    heads={
        "AutoModel": Head("AlbertModel"),
        "AutoModelForMaskedLM": Head(
            "AlbertForMaskedLM",
            bert.masked_lm_rows("predictions.dense", "predictions.LayerNorm", "predictions.decoder"),
        ),
        "AutoModelForSequenceClassification": Head("AlbertForSequenceClassification", bert.CLASSIFIER),
        "AutoModelForTokenClassification": Head("AlbertForTokenClassification", bert.CLASSIFIER),
        "AutoModelForQuestionAnswering": Head("AlbertForQuestionAnswering", bert.ANSWERS),
        "AutoModelForMultipleChoice": Head("AlbertForMultipleChoice", bert.CLASSIFIER),
    },
    idle={"predictions.bias": "predictions.decoder.bias"},
)
