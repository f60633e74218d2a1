"""RoBERTa (arXiv:1907.11692): BERT with positions after the padding id and a classifier of its own."""

from dataclasses import replace
from typing import Any

from ..family import Head
from ..tables import Row
from . import bert


def read(foreign) -> dict[str, Any]:
    # The rows up to the padding id hold no position
    offset = foreign.pad_token_id + 1
    positions = {"position_offset": offset, "max_position_embeddings": foreign.max_position_embeddings - offset}
    return bert.read(foreign) | positions


def write(form) -> dict[str, Any]:
    return bert.write(form) | {"max_position_embeddings": form.max_position_embeddings + form.position_offset}


CLASSIFIER = [
    Row("classifier.dense.{p}", "model.pooler.dense.{p}"),
    Row("classifier.out_proj.{p}", "classifier.out_proj.{p}"),
]

FAMILY = replace(
    bert.FAMILY,
    model_type="roberta",
    same={ours: name for ours, name in bert.SAME.items() if ours != "max_position_embeddings"},
    fixed=bert.FIXED | {"head_act": "gelu"},
    read=read,
    write=write,
    prefix="roberta.",
    heads={
        "AutoModel": Head("RobertaModel"),
        "AutoModelForMaskedLM": Head(
            "RobertaForMaskedLM",
            bert.masked_lm_rows("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
        ),
        "AutoModelForSequenceClassification": Head("RobertaForSequenceClassification", CLASSIFIER),
        "AutoModelForTokenClassification": Head("RobertaForTokenClassification", bert.CLASSIFIER),
        "AutoModelForQuestionAnswering": Head("RobertaForQuestionAnswering", bert.ANSWERS),
        "AutoModelForMultipleChoice": Head("RobertaForMultipleChoice", bert.CLASSIFIER),
    },
)
