"""RoBERTa (arXiv:1907.11692): BERT with positions after the padding id and a classifier of its own."""

from dataclasses import replace
from typing import Any

from ..family import Head
from ..tables import Row
from . import bert


def first_row(config) -> int:
    """The row of the first position: those up to the padding id's hold none.

    Raises:
        ValueError: if there is no padding id.
    """
    if config.pad_token_id is None:
        raise ValueError(f"{config.model_type}: `pad_token_id=None` leaves its first position undefined; set it.")
    return config.pad_token_id + 1


def read(foreign) -> dict[str, Any]:
    offset = first_row(foreign)
    positions = {"position_offset": offset, "max_position_embeddings": foreign.max_position_embeddings - offset}
    return bert.read(foreign) | positions


def write(form) -> dict[str, Any]:
    return bert.write(form) | {"max_position_embeddings": form.max_position_embeddings + first_row(form)}


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
            bert.masked_lm_rows("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
        ),
        "AutoModelForSequenceClassification": Head("RobertaForSequenceClassification", CLASSIFIER),
        "AutoModelForTokenClassification": Head("RobertaForTokenClassification", bert.CLASSIFIER),
        "AutoModelForQuestionAnswering": Head("RobertaForQuestionAnswering", bert.ANSWERS),
        "AutoModelForMultipleChoice": Head("RobertaForMultipleChoice", bert.CLASSIFIER),
    },
    idle={"lm_head.bias": "lm_head.decoder.bias"},
)
