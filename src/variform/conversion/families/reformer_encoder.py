"""Reformer that sees both ways: the native `reformer` without `is_decoder`. Its first chunk also sees the last one."""

from dataclasses import replace

from ..family import Head
from ..tables import Row
from . import reformer

POOLED = {"pooler": True, "pooler_act": "tanh"}
CLASSIFIER = [
    Row("classifier.dense.{p}", "model.pooler.dense.{p}"),
    Row("classifier.out_proj.{p}", "classifier.out_proj.{p}"),
]

FAMILY = replace(
    reformer.FAMILY,
    shape="variform_encoder",
    takes=lambda foreign: not foreign.is_decoder,
    fixed=reformer.FIXED | {"classifier_pooling": "first"},
    heads={
        "AutoModel": Head("ReformerModel", differs=reformer.DIFFERS),
        "AutoModelForMaskedLM": Head(
            "ReformerForMaskedLM", reformer.LANGUAGE_MODEL, unread=reformer.UNREAD, differs=reformer.DIFFERS
        ),
        "AutoModelForSequenceClassification": Head(
            "ReformerForSequenceClassification", CLASSIFIER, fixed=POOLED, differs=reformer.DIFFERS
        ),
        "AutoModelForQuestionAnswering": Head(
            "ReformerForQuestionAnswering", [Row("qa_outputs.{p}", "qa_outputs.{p}")], differs=reformer.DIFFERS
        ),
    },
)
