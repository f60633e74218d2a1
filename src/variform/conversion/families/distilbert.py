"""DistilBERT (arXiv:1910.01108): BERT without token types, with its pooler inside the classifiers."""

from typing import Any

from ..family import Family, Head
from ..tables import Row
from . import bert

SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "max_position_embeddings",
    "hidden_act": "activation",
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "classifier_dropout": "seq_classif_dropout",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}
FIXED: dict[str, Any] = bert.FIXED | {"norm_eps": 1e-12, "pooler": False}
# Its classifiers bring a dense layer of their own
POOLED = {"pooler": True, "pooler_act": "relu"}
POOLED_ROWS = [Row("pre_classifier.{p}", "model.pooler.dense.{p}"), *bert.CLASSIFIER]


def rows(form) -> list[Row]:
    layer, ours = "transformer.layer.{i}", "layers.{i}"
    return [
        *bert.embedding_rows(),
        Row(f"{layer}.attention.q_lin.{{p}}", f"{ours}.self_attn.q_proj.{{p}}"),
        Row(f"{layer}.attention.k_lin.{{p}}", f"{ours}.self_attn.k_proj.{{p}}"),
        Row(f"{layer}.attention.v_lin.{{p}}", f"{ours}.self_attn.v_proj.{{p}}"),
        Row(f"{layer}.attention.out_lin.{{p}}", f"{ours}.self_attn.o_proj.{{p}}"),
        Row(f"{layer}.sa_layer_norm.{{p}}", f"{ours}.attention_residual.output_norm.{{p}}"),
        Row(f"{layer}.ffn.lin1.{{p}}", f"{ours}.mlp.up_proj.{{p}}"),
        Row(f"{layer}.ffn.lin2.{{p}}", f"{ours}.mlp.down_proj.{{p}}"),
        Row(f"{layer}.output_layer_norm.{{p}}", f"{ours}.mlp_residual.output_norm.{{p}}"),
    ]


FAMILY = Family(
    model_type="distilbert",
    shape="variform_encoder",
    same=SAME,
    fixed=FIXED,
    inert=frozenset({"sinusoidal_pos_embds"}),  # the table is stored either way
    in_training=frozenset({"qa_dropout"}),
    rows=rows,
    prefix="distilbert.",
    heads={
        "AutoModel": Head("DistilBertModel"),
        "AutoModelForMaskedLM": Head(
            "DistilBertForMaskedLM",
            bert.masked_lm_rows("vocab_transform", "vocab_layer_norm", "vocab_projector"),
        ),
        "AutoModelForSequenceClassification": Head("DistilBertForSequenceClassification", POOLED_ROWS, fixed=POOLED),
        "AutoModelForTokenClassification": Head("DistilBertForTokenClassification", bert.CLASSIFIER),
        "AutoModelForQuestionAnswering": Head("DistilBertForQuestionAnswering", bert.ANSWERS),
        "AutoModelForMultipleChoice": Head("DistilBertForMultipleChoice", POOLED_ROWS, fixed=POOLED),
    },
    ignored=(bert.POSITION_IDS,),
)
