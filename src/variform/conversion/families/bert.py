"""BERT (arXiv:1810.04805)."""

from typing import Any

from ..family import Family, Head
from ..tables import Row

SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
    "hidden_act": "hidden_act",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}
FIXED: dict[str, Any] = {
    "position_embedding_type": "learned",
    "embedding_norm": True,
    "norm_type": "layer_norm",
    "norm_placement": "post",
    "attention_bias": True,
    "gated_mlp": False,
    "mlp_bias": True,
    "lm_head_transform": True,
    "lm_head_bias": True,
    "pooler": True,
    "classifier_pooling": "first",
}


def read(foreign) -> dict[str, Any]:
    dropout = foreign.classifier_dropout
    return {"classifier_dropout": foreign.hidden_dropout_prob if dropout is None else dropout}


def write(form) -> dict[str, Any]:
    return {"classifier_dropout": form.classifier_dropout}


def embedding_rows() -> list[Row]:
    return [
        Row("embeddings.word_embeddings.weight", "embed_tokens.weight"),
        Row("embeddings.position_embeddings.weight", "embeddings.positions.weight"),
        Row("embeddings.token_type_embeddings.weight", "embeddings.token_types.weight"),
        Row("embeddings.LayerNorm.{p}", "embeddings.norm.{p}"),
    ]


def rows(form) -> list[Row]:
    layer, ours = "encoder.layer.{i}", "layers.{i}"
    return [
        *embedding_rows(),
        Row(f"{layer}.attention.self.query.{{p}}", f"{ours}.self_attn.q_proj.{{p}}"),
        Row(f"{layer}.attention.self.key.{{p}}", f"{ours}.self_attn.k_proj.{{p}}"),
        Row(f"{layer}.attention.self.value.{{p}}", f"{ours}.self_attn.v_proj.{{p}}"),
        Row(f"{layer}.attention.output.dense.{{p}}", f"{ours}.self_attn.o_proj.{{p}}"),
        Row(f"{layer}.attention.output.LayerNorm.{{p}}", f"{ours}.attention_residual.output_norm.{{p}}"),
        Row(f"{layer}.intermediate.dense.{{p}}", f"{ours}.mlp.up_proj.{{p}}"),
        Row(f"{layer}.output.dense.{{p}}", f"{ours}.mlp.down_proj.{{p}}"),
        Row(f"{layer}.output.LayerNorm.{{p}}", f"{ours}.mlp_residual.output_norm.{{p}}"),
        Row("pooler.dense.{p}", "pooler.dense.{p}"),
    ]


def masked_lm_rows(dense: str, norm: str, decoder: str) -> list[Row]:
    """The head of BERT and its relatives, by the names that its parts have there."""
    return [
        Row(f"{dense}.{{p}}", "head_transform.dense.{p}"),
        Row(f"{norm}.{{p}}", "head_transform.norm.{p}"),
        Row(f"{decoder}.{{p}}", "lm_head.{p}"),
    ]


CLASSIFIER = [Row("classifier.{p}", "classifier.out_proj.{p}")]
ANSWERS = [Row("qa_outputs.{p}", "qa_outputs.{p}")]
POSITION_IDS = r"(.*\.)?embeddings\.(position|token_type)_ids"

FAMILY = Family(
    model_type="bert",
    shape="variform_encoder",
    same=SAME,
    fixed=FIXED,
    read=read,
    write=write,
    rows=rows,
    prefix="bert.",
    heads={
        "AutoModel": Head("BertModel"),
        "AutoModelForMaskedLM": Head(
            "BertForMaskedLM",
            masked_lm_rows(
                "cls.predictions.transform.dense",
                "cls.predictions.transform.LayerNorm",
                "cls.predictions.decoder",
            ),
        ),
        "AutoModelForSequenceClassification": Head("BertForSequenceClassification", CLASSIFIER),
        "AutoModelForTokenClassification": Head("BertForTokenClassification", CLASSIFIER),
        "AutoModelForQuestionAnswering": Head("BertForQuestionAnswering", ANSWERS),
        "AutoModelForMultipleChoice": Head("BertForMultipleChoice", CLASSIFIER),
    },
    idle={"cls.predictions.bias": "cls.predictions.decoder.bias"},
    ignored=(POSITION_IDS,),
)
